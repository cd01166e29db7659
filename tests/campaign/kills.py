"""Runs that SIGKILL ends at one call, and the same command again."""

import hashlib
import re
import shutil
import signal
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tests.campaign.outcome import (
    VOLATILE,
    clear,
    content,
    done,
    is_whole,
    no_litter,
    recorded,
    reference,
    refused,
    told_of,
)
from tests.campaign.process import COUNT, KILL, STOP, TEAR, Fault, command
from tests.campaign.world import COMMANDS, OUT
from ulbq.artifacts.disk import TEMPORARY_PREFIX
from ulbq.data.calibration import CALIBRATION_FILE, TEXT_FILE

_REPEATED = frozenset({CALIBRATION_FILE, TEXT_FILE})
"""Written by every run from the samples that it drew or read; not the work that a run resumes."""


def states(folder: str, name: str, world: str) -> list[int]:
    """Scenario: for each call of a run, the first before which the same lay on the disk."""
    return [number for number, _ in _snapshots(name, world, Path(folder) / "place")]


def before(folder: str, name: str, world: str, at: int, alike: int) -> list[str]:
    """Scenario: what lies on the disk before a call, and the same command there.

    Args:
        folder: of the zygote.
        name: of the command.
        world: where its inputs lie.
        at: number of the call; the first of those that find the same.
        alike: how many these are. A sync or a close changes nothing on a disk that stays.

    Returns:
        What a kill there leaves, once for each of them: "whole", "resumed" where a run went on there, "anew" where
        none could.
    """
    place = Path(folder) / "place"
    reference(name, world, str(place))
    kept = _snapshots(name, world, place)
    clear(place)
    shutil.copytree(_kept(place) / str(at), place, symlinks=True, dirs_exist_ok=True)
    assert _lying(place, told=False) == kept[at][1], "copied, and not the same"
    return [_outcome(place, name, world)] * alike


def killed(folder: str, name: str, world: str, at: Sequence[int], torn: bool = False) -> str:
    """Scenario: a run that is killed at a call; or again and again, at each of several.

    Args:
        folder: of the zygote.
        name: of the command.
        world: where its inputs lie.
        at: numbers of the calls, each counted from the run's own start.
        torn: half of what that call was to write is written.

    Returns:
        What the kill left, as in :func:`before`.
    """
    place, asked = Path(folder) / "place", COMMANDS[name]
    known, kept = reference(name, world, str(place)), _snapshots(name, world, place)
    words = asked.spelled(Path(world), place / OUT)
    clear(place)
    asked.prepare(Path(world), place / OUT)
    for number in at:
        told = command(words, place, Fault(TEAR if torn else KILL, number))
        if told.code != -signal.SIGKILL:
            # A run that goes on makes fewer calls, and may have come to its end.
            assert number != at[0], f"not killed: {told.code} {told.err}"
            done(told)
            return "whole" if _replaces(name) else _complete(place, words, known.made, asked.in_place)
        assert "Traceback" not in told.err, told.err
        if number == at[0] and not torn:
            left, lay = _lying(place, told=False), kept[number][1]
            assert left == lay, f"killed in truth: {_differing(left, lay)}"
        if len(at) > 1 and standing(place) and is_whole(place, known, asked.in_place) and not _replaces(name):
            break
    return _outcome(place, name, world)


def _kept(place: Path) -> Path:
    return place.with_name("states")


@lru_cache(1)
def _snapshots(name: str, world: str, place: Path) -> list[tuple[int, dict[str, str]]]:
    """For each call of a run: the first before which the same lay in the folder, and hashes of what every run leaves.

    Copies lie in :func:`_kept`, by the number of that first call.
    """
    found: list[tuple[int, dict[str, str]]] = []
    first: dict[str, int] = {}

    def keep() -> None:
        state = str(_lying(place, told=True))
        if state not in first:
            first[state] = len(found)
            shutil.copytree(place, _kept(place) / str(len(found)), symlinks=True)
        found.append((first[state], _lying(place, told=False)))

    clear(_kept(place))
    clear(place)
    COMMANDS[name].prepare(Path(world), place / OUT)
    told = command(COMMANDS[name].spelled(Path(world), place / OUT), place, Fault(STOP), stopped=keep)
    done(told)
    assert len(found) == len(told.calls)
    return found


_CHANGING = re.compile(rb'"(seconds|sum|created|digest)": ?("[^"]*"|[-\d.e]+)')
TEMPORARY = re.compile(r"\.tmp\w{6}$")


def _lying(place: Path, told: bool) -> dict[str, str]:
    """Hashes of all that lies in a folder; two runs leave the same, but for times and the names of temporary files.

    Args:
        place: the folder.
        told: with the times that files tell, by which two runs differ.
    """
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        data = path.read_bytes() if path.is_file() else b"a folder"
        if not told:
            name = TEMPORARY.sub(".tmp", name)
            plain = told_of(name).removeprefix(f"{TEMPORARY_PREFIX}-")
            data = b"" if plain.removesuffix(".tmp") in VOLATILE else _CHANGING.sub(b"", data)
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _outcome(place: Path, name: str, world: str) -> str:
    """What was left, by what the same command then does."""
    known, asked = reference(name, world, str(place)), COMMANDS[name]
    words = asked.spelled(Path(world), place / OUT)
    if standing(place) and is_whole(place, known, asked.in_place) and not _replaces(name):
        return _complete(place, words, known.made, asked.in_place)
    return _again(place, words, known.made)


def _again(place: Path, words: list[str], made: dict[str, str]) -> str:
    """The same command, where a kill left it unfinished."""
    finished = recorded(place)
    again = command(words, place, Fault(COUNT))
    done(again)
    lost = finished - _REPEATED & {_inside(path) for kind, path in again.calls if kind == "open"}
    assert not lost, f"finished before, and written again: {sorted(lost)}"
    assert content(place / OUT) == made, _differing(content(place / OUT), made)
    no_litter(place)
    return "resumed" if finished else "anew"


def standing(place: Path) -> bool:
    """Whether what was at the output of a command stands there still, or something new does."""
    # Between the two renames of a replacement the old artifact is aside; the next run moves it back.
    return not (place / f".{OUT}.replaced").exists() or (place / OUT).exists()


def _replaces(name: str) -> bool:
    return "--force" in COMMANDS[name].words


def _complete(place: Path, words: list[str], made: dict[str, str], in_place: bool) -> str:
    """The artifact stood at its place when the kill came."""
    again = command(words, place)
    if in_place:
        done(again)
    else:
        assert "exists" in refused(again, 3)
    assert content(place / OUT) == made
    no_litter(place)
    return "whole"


def _inside(path: str) -> str:
    """What a file of the partial folder will be called; files are written under a name before."""
    return path.removeprefix(f"/{OUT}.partial/").removeprefix(f"{TEMPORARY_PREFIX}-")


def _differing(found: dict[str, str], wanted: dict[str, str]) -> str:
    return f"differs: {sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))}"

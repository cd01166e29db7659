"""Runs that SIGKILL ends at one call, and the same command again."""

import hashlib
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from tests.campaign.outcome import clear, content, done, is_whole, no_litter, recorded, reference, refused
from tests.campaign.process import COUNT, KILL, TEAR, Fault, command
from tests.campaign.world import COMMANDS, OUT
from ulbq.artifacts.disk import TEMPORARY_PREFIX
from ulbq.artifacts.partial import JOURNAL
from ulbq.data.calibration import CALIBRATION_FILE, TEXT_FILE

_REPEATED = frozenset({CALIBRATION_FILE, TEXT_FILE})
"""Written by every run from the samples that it drew or read; not the work that a run resumes."""


def trial(folder: str, name: str, world: str, at: Sequence[int], torn: bool = False) -> str:
    """Scenario: a run that is killed at a call; or again and again, at each of several.

    Args:
        folder: of the zygote.
        name: of the command.
        world: where its inputs lie.
        at: numbers of the calls, each counted from the run's own start.
        torn: half of what that call was to write is written.

    A kill that leaves what an earlier one of this command left, to the bit but for times and the names of temporary
    files, has the same end: a sync or a close changes nothing on a disk that stays.

    Returns:
        What the kill left: "whole", "resumed" where a run went on there, "anew" where none could.
    """
    place = Path(folder) / "place"
    known, asked = reference(name, world, str(place)), COMMANDS[name]
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
        if standing(place) and is_whole(place, known, asked.in_place) and not _replaces(name):
            return _complete(place, words, known.made, asked.in_place)
    state = (name, _state(place))
    if state not in _SEEN:
        _SEEN[state] = _again(place, words, known.made)
    return _SEEN[state]


_SEEN: dict[tuple[str, str], str] = {}
_CHANGING = re.compile(rb'"(seconds|sum|created|digest)": ?("[^"]*"|[-\d.e]+)')
TEMPORARY = re.compile(r"\.tmp\w{6}$")


def _state(place: Path) -> str:
    """A hash of all that lies in a folder."""
    found = hashlib.sha256()
    for path in sorted(place.rglob("*")):
        found.update(f"{TEMPORARY.sub('.tmp', str(path))} {path.is_file()}\n".encode())
        if path.is_file():
            data = path.read_bytes()
            found.update(_CHANGING.sub(b"", data) if path.name in (JOURNAL, "manifest.json") else data)
    return found.hexdigest()


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

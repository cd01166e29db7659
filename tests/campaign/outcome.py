"""What a trial may end with, and how it is looked at."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from tests.campaign.process import COUNT, Fault, Told, command
from tests.campaign.world import COMMANDS, OUT
from ulbq.artifacts.partial import JOURNAL

VOLATILE = frozenset({"manifest.json", "results.json", "report.html", "finetune.html", "README.md", "table.csv"})
"""Files that tell times, and differ between two runs of one command."""

SECONDS = 10.0
MEMORY = 1 << 30


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by name relative to it; empty where there is no folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def content(path: Path) -> dict[str, str]:
    """The same without what tells times, and without what a killed run leaves for the next to clear up."""
    return {name: value for name, value in hashes(path).items() if told_of(name) not in VOLATILE and name[0] != "."}


def told_of(name: str) -> str:
    """A file's own name: artifacts of a sweep's runs have what all have."""
    return name.rpartition("/")[2]


def refused(told: Told, *codes: int) -> str:
    """The sentence of a command that says no, with one of these codes.

    Raises:
        AssertionError: it ended otherwise, or with more than a sentence and a hint.
    """
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert told.code in codes, f"exit code {told.code} after {told.seconds:.1f} s: {told.err[-2000:]}"
    assert "Traceback" not in told.err, told.err[-3000:]
    assert len(errors) == 1, f"{len(errors)} sentences: {told.err[-2000:]}"
    return errors[0].removeprefix("error: ")


def done(told: Told) -> None:
    """Raises AssertionError unless a command did what it was asked."""
    assert told.code == 0, f"exit code {told.code} after {told.seconds:.1f} s: {told.err[-2000:]}"
    assert "Traceback" not in told.err, told.err[-3000:]


def modest(told: Told) -> None:
    """Raises AssertionError for a command that took long, or much memory."""
    assert told.seconds < SECONDS, f"{told.seconds:.1f} s"
    assert told.memory < MEMORY, f"{told.memory >> 20} MiB"


class Reference:
    """What a command makes and does where nothing goes wrong.

    Attributes:
        calls: kind and path of every call that changes files.
        made: content of its artifact.
        before: content of what lay there before.
    """

    def __init__(self, name: str, world: Path, place: Path) -> None:
        asked, out = COMMANDS[name], place / OUT
        clear(place)
        asked.prepare(world, out)
        self.before = content(out)
        told = command(asked.spelled(world, out), place, Fault(COUNT))
        done(told)
        self.calls = told.calls
        self.made = content(out)
        clear(place)
        asked.prepare(world, out)
        done(command(asked.spelled(world, out), place))
        again = content(out)
        odd = sorted(file for file in again.keys() | self.made.keys() if again.get(file) != self.made.get(file))
        assert not odd, f"two runs of '{name}' differ in {odd}"
        no_litter(place)


@cache
def reference(name: str, world: str, place: str) -> Reference:
    """Made once in a zygote: paths stand in what is written."""
    return Reference(name, Path(world), Path(place))


def calls(folder: str, name: str, world: str) -> list[tuple[str, str]]:
    """Scenario: the calls of a run in which nothing goes wrong."""
    return list(reference(name, world, str(Path(folder) / "place")).calls)


def clear(place: Path) -> None:
    """Empty a folder, or make it."""
    import shutil

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


def no_litter(place: Path) -> None:
    """Raises AssertionError where anything lies beside the artifact, or in it that is none of its."""
    out = place / OUT
    beside = sorted(set(os.listdir(place)) - {OUT})
    assert not beside, f"left beside the artifact: {beside}"
    hidden = [name for name in hashes(out) if any(part.startswith(".") for part in name.split("/"))]
    assert not hidden, f"left in the artifact: {hidden}"


def is_whole(place: Path, known: Reference, in_place: bool = False) -> bool:
    """Whether a new artifact stands at its place; raises AssertionError where one only seems to.

    Args:
        place: the folder that it stands in.
        known: the run in which nothing goes wrong.
        in_place: it was there before, with an edit that its manifest does not know.
    """
    out = place / OUT
    if not (out / "manifest.json").exists():
        assert not out.exists() or not any(out.iterdir()), f"'{OUT}' is no artifact: {sorted(os.listdir(out))}"
        return False
    told = command(["inspect", out, "--verify", "-q"], place)
    if in_place and told.code != 0:
        assert "changed" in refused(told, 3)
        return False
    done(told)
    assert content(out) in (known.made, known.before), "what stands there is neither the old nor the new"
    return content(out) == known.made


def recorded(place: Path) -> set[str]:
    """Files that the journal of an unfinished run holds for finished, checkpoints and the like among them."""
    path = place / f"{OUT}.partial" / JOURNAL
    if not path.exists():
        return set()
    names: dict[str, set[str]] = {}
    for line in path.read_bytes().splitlines(keepends=True)[1:]:
        if line.endswith(b"\n"):
            step = json.loads(line)
            for key in (step["key"], *step["forgets"]):
                names.pop(key, None)
            names[step["key"]] = set(step["files"])
    return {file for files in names.values() for file in files}

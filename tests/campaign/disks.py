"""Disks that are full, from a call on or truly, and calls that fail for want of room; then the same command again."""

import errno
import subprocess
from pathlib import Path

from tests.campaign.kills import standing
from tests.campaign.outcome import clear, content, done, is_whole, no_litter, reference, refused
from tests.campaign.process import FAIL, FULL, Fault, Told, command
from tests.campaign.world import COMMANDS, OUT

_CODES = {errno.ENOSPC: (3,), errno.EDQUOT: (3,), errno.EIO: (3, 4)}


def failing(folder: str, name: str, world: str, at: int, error: int, once: bool = False) -> str:
    """Scenario: a call fails, and all after it that take room unless ``once``.

    Returns:
        How the run ended: "refused", or "done" where it could do without.
    """
    place = Path(folder) / "place"
    clear(place)
    return _then_again(place, name, Path(world), Fault(FAIL if once else FULL, at, error), _CODES[error])


def small(folder: str, name: str, world: str, size: int) -> str:
    """Scenario: a disk of so many bytes, and later of more. Returns as :func:`failing` does."""
    place = Path(folder) / "place"
    reference(name, world, str(place))
    clear(place)
    _mount(place, f"size={size}")
    try:
        try:
            COMMANDS[name].prepare(Path(world), place / OUT)
        except OSError:
            return "no room to begin"
        return _then_again(place, name, Path(world), None, (3,), prepared=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def unheard(folder: str, world: str, words: list[str]) -> str:
    """Scenario: standard output on a full disk; words as in the world's commands."""
    place = Path(folder) / "place"
    clear(place)
    spelled = [str(Path(world) / word[1:]) if word.startswith("@") else word for word in words]
    refused(command(spelled, place, output="/dev/full"), 3, 4)
    return "refused"


def _then_again(
    place: Path, name: str, world: Path, fault: Fault | None, codes: tuple[int, ...], prepared: bool = False
) -> str:
    known, asked = reference(name, str(world), str(place)), COMMANDS[name]
    words = asked.spelled(world, place / OUT)
    if not prepared:
        clear(place)
        asked.prepare(world, place / OUT)
    told = command(words, place, fault)
    if told.code == 0:
        done(told)
        assert content(place / OUT) == known.made
        no_litter(place)
        return "done"
    _one_sentence(told, codes)
    if fault is None:
        _mount(place, "remount,size=64m")
    if standing(place) and is_whole(place, known, asked.in_place) and "--force" not in words:
        again = command(words, place)
        done(again) if asked.in_place else refused(again, 3)
    else:
        done(command(words, place))
    assert content(place / OUT) == known.made, "another result after there was room"
    no_litter(place)
    return "refused"


def _one_sentence(told: Told, codes: tuple[int, ...]) -> None:
    refused(told, *codes)
    hints = [line for line in told.err.splitlines() if line.startswith("hint: ")]
    assert len(hints) == 1 or 3 not in codes or told.code != 3, f"{len(hints)} hints: {told.err[-1000:]}"


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)

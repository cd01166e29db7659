"""Every command that changes files, on disks that are full."""

import errno
import random
import re
from collections.abc import Sequence

import pytest

from tests.campaign.conftest import Campaign
from tests.campaign.world import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

_FROM, _ONCE = 10, 10
_SIZES = (2, 8, 20, 40, 64, 90, 128, 224)
"""Pages of 4 KiB."""


def chosen(calls: Sequence[tuple[str, str]], most: int) -> list[int]:
    """Numbers of at most so many calls: first and last of each kind on each kind of file, and others between them."""
    if len(calls) <= most:
        return list(range(len(calls)))
    alike: dict[tuple[str, str], list[int]] = {}
    for number, (kind, path) in enumerate(calls):
        alike.setdefault((kind, re.sub(r"\d+|\.tmp\w{6}$", "#", path)), []).append(number)
    ends = sorted({number for numbers in alike.values() for number in (numbers[0], numbers[-1])})
    if len(ends) > most:
        return sorted(random.Random(0).sample(ends, most))
    rest = sorted(set(range(len(calls))) - set(ends))
    return sorted([*ends, *random.Random(0).sample(rest, most - len(ends))])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name: str, world: str, campaign: Campaign) -> None:
    calls = campaign.pool.ask("outcome:calls", name=name, world=world)
    known, draw = {"name": name, "world": world}, random.Random(name)
    room = [n for n, (kind, _) in enumerate(calls) if kind in ("open", "write", "fsync", "close", "mkdir", "truncate")]
    at = sorted(draw.sample(room, min(_FROM, len(room))))
    trials = [{**known, "at": n, "error": errno.EDQUOT if n % 4 == 3 else errno.ENOSPC} for n in at]
    campaign.run("full disk from a call on", name, "disks:failing", trials, len(room))
    ends = [n for n in chosen(calls, 60) if calls[n][0] in ("fsync", "close", "write", "open")]
    once = sorted(draw.sample(ends, min(_ONCE, len(ends))))
    trials = [{**known, "at": n, "error": errno.EIO if n % 3 == 2 else errno.ENOSPC, "once": True} for n in once]
    campaign.run("one call fails", name, "disks:failing", trials, len(room))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_small_disk(name: str, world: str, campaign: Campaign) -> None:
    if not campaign.pool.mounts:
        pytest.skip("mounting a small disk in a namespace of its own is not possible here")
    trials = [{"name": name, "world": world, "size": pages << 12} for pages in _SIZES]
    outcomes = campaign.run("disk of 8 to 896 KiB", name, "disks:small", trials)
    assert campaign.faults or "done" in outcomes


def test_a_full_standard_output(world: str, campaign: Campaign) -> None:
    spoken = (
        ["inspect", "@affine"],
        ["inspect", "@affine", "--json"],
        ["generate", "@affine", "-p", "hi", "-n", "4", "--device", "cpu"],
        ["generate", "@affine", "-p", "hi", "-n", "4", "--device", "cpu", "--json"],
        ["quantize", "--list-recipes"],
        ["finetune", "--list-tasks"],
    )
    for words in spoken:
        subject = " ".join(word for word in words if word[0] != "@")
        campaign.run("full standard output", subject, "disks:unheard", [{"world": world, "words": words}])

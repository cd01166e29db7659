"""Every command that changes files, killed at its calls, and begun again."""

import random
import re
from collections.abc import Sequence

import pytest

from tests.campaign.conftest import Campaign
from tests.campaign.world import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MOST = 110
"""Calls of one command at which it is killed."""
_TORN, _TWICE = 6, 3


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
def test_a_killed_command(name: str, world: str, campaign: Campaign) -> None:
    calls = campaign.pool.ask("outcome:calls", name=name, world=world)
    known = {"name": name, "world": world}
    at = chosen(calls, MOST)
    campaign.run("killed before a call", name, "kills:trial", [{**known, "at": [n]} for n in at], len(calls))
    writes = [number for number, (kind, _) in enumerate(calls) if kind == "write"]
    draw = random.Random(name)
    torn = sorted(draw.sample(writes, min(_TORN, len(writes))))
    trials = [{**known, "at": [number], "torn": True} for number in torn]
    campaign.run("killed within a write", name, "kills:trial", trials, len(writes))
    # The last calls come after the artifact stands: a second run would not begin.
    often = [sorted(draw.sample(range(len(calls) * 2 // 3), 3)) for _ in range(_TWICE if len(calls) > 20 else 0)]
    campaign.run("killed up to three times", name, "kills:trial", [{**known, "at": at} for at in often])

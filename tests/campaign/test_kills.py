"""Every command that changes files, killed at each of its calls, and begun again."""

import random

import pytest

from tests.campaign.conftest import Campaign
from tests.campaign.world import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

_IN_TRUTH, _TORN, _TWICE = 8, 6, 3


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command(name: str, world: str, campaign: Campaign) -> None:
    calls = campaign.pool.ask("outcome:calls", name=name, world=world)
    known = {"name": name, "world": world}
    first = campaign.pool.ask("kills:states", **known)
    assert len(first) == len(calls)
    trials = [{**known, "at": number, "alike": first.count(number)} for number in sorted(set(first))]
    campaign.run("killed before a call", name, "kills:before", trials, len(calls))
    draw = random.Random(name)
    sample = sorted(draw.sample(range(len(calls)), min(_IN_TRUTH, len(calls))))
    campaign.run("killed by SIGKILL", name, "kills:killed", [{**known, "at": [n]} for n in sample], len(calls))
    writes = [number for number, (kind, _) in enumerate(calls) if kind == "write"]
    torn = sorted(draw.sample(writes, min(_TORN, len(writes))))
    trials = [{**known, "at": [number], "torn": True} for number in torn]
    campaign.run("killed within a write", name, "kills:killed", trials, len(writes))
    # The last calls come after the artifact stands: a second run would not begin.
    often = [sorted(draw.sample(range(len(calls) * 2 // 3), 3)) for _ in range(_TWICE if len(calls) > 20 else 0)]
    campaign.run("killed up to three times", name, "kills:killed", [{**known, "at": at} for at in often])

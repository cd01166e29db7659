"""One bit of one file that is another."""

import random

import pytest

from tests.campaign.conftest import Campaign
from tests.campaign.flips import KINDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

_UNFINISHED = {
    "saliency": (0.6, 0.85),
    "quantize rtn": (0.5, 0.9),
    "quantize db-llm, end to end": (0.4, 0.7, 0.9),
    "quantize apiq, self, end to end": (0.4, 0.6, 0.9),
    "finetune instructions": (0.3, 0.7),
    "finetune end-to-end": (0.6,),
    "convert gguf": (0.6,),
    "eval": (0.5,),
}
"""Commands, and after which shares of their calls they are killed."""


def bits(size: int, seed: str, most: int) -> list[int]:
    """Bits of a file: of its first, middle and last byte, and others."""
    if size == 0:
        return []
    draw = random.Random(seed)
    bytes_ = [0, size // 2, size - 1, *(draw.randrange(size) for _ in range(most))][:most]
    return [byte * 8 + draw.randrange(8) for byte in bytes_]


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact(kind: str, world: str, campaign: Campaign) -> None:
    most = 3 if kind in ("affine", "saliency") else 4
    trials = [
        {"world": world, "kind": kind, "file": name, "bit": bit}
        for name, size in campaign.pool.ask("flips:files", world=world, kind=kind)
        for bit in bits(size, f"{kind} {name}", most)
    ]
    campaign.run("flipped bit", kind, "flips:read", trials)


@pytest.mark.parametrize("name", _UNFINISHED)
def test_an_unfinished_run(name: str, world: str, campaign: Campaign) -> None:
    calls = campaign.pool.ask("outcome:calls", name=name, world=world)
    trials = []
    for share in _UNFINISHED[name]:
        known = {"name": name, "world": world, "at": int(len(calls) * share)}
        for file, size in campaign.pool.ask("flips:left_at", **known):
            trials += [{**known, "file": file, "bit": bit} for bit in bits(size, f"{share} {file}", 2)]
    campaign.run("flipped bit in .partial", name, "flips:go_on", trials)

"""Second moments of a mixture's experts: their own where they saw enough, and what stands in where they did not."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ulbq.blockwise.activations import ActivationStore
from ulbq.config.training import TokenWeighting
from ulbq.methods.base import BlockTask
from ulbq.methods.in_sequence import FEWEST_TOKENS, solve_in_sequence
from ulbq.nn.experts import Experts, place_of, showing
from ulbq.solvers.hessian import HessianSum
from ulbq.training.objective import BlockData
from ulbq.training.precision import Precision

HIDDEN, INNER, SAMPLES, LENGTH = 16, 8, 6, 20


class Block(nn.Module):
    """Three experts: nearly all tokens go to the first, six to the second, none to the third."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=3)
        self.experts = Experts(Qwen3MoeExperts(config))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, 1)
        index = (rows[:, :1] > 9).long()
        result: torch.Tensor = hidden + self.experts(rows, index, torch.ones_like(rows[:, :1])).view_as(hidden)
        return result


@pytest.fixture
def task(tmp_path: Path) -> BlockTask:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        block = Block().requires_grad_(False)
        hidden = torch.randn(SAMPLES + 2, LENGTH, HIDDEN)
    hidden[:SAMPLES, 3, 0] = 10
    store = ActivationStore((SAMPLES + 2, LENGTH, HIDDEN), torch.float32, limit=2**30, directory=tmp_path)
    store.set(0, hidden)
    linears = tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))
    data = BlockData(store, store, None, {}, SAMPLES)
    return BlockTask(0, block, linears, {}, data, Precision(torch.device("cpu"), torch.float32), 0, lambda error: None)


def moments(task: BlockTask, linear: str, *, all_tokens: bool) -> HessianSum:
    """What a layer sees, or would see if all tokens went to its expert."""
    assert task.data is not None
    found, place = HessianSum(task.weight(linear).shape[1]), place_of(task.block, linear)
    assert place is not None
    handle = task.block.get_submodule(linear).register_forward_pre_hook(lambda module, given: found.add(given[0]))
    with showing({task.block.get_submodule("experts"): [place.expert] if all_tokens else []}):  # type: ignore[dict-item]
        task.block(task.data.inputs.get(slice(0, SAMPLES)))
    handle.remove()
    return found


@pytest.mark.parametrize("one_by_one", [False, True])
def test_few_tokens_are_made_up_for_by_all(one_by_one: bool, task: BlockTask) -> None:
    found: dict[str, HessianSum] = {}

    def solve(linears, inputs):  # type: ignore[no-untyped-def]
        found.update(dict.fromkeys(linears, inputs))
        return {}

    solve_in_sequence(task, solve, one_by_one=one_by_one, weighting=TokenWeighting.UNIFORM)
    assert found.keys() == set(task.linears)
    for linear, inputs in found.items():
        own, every = moments(task, linear, all_tokens=False), moments(task, linear, all_tokens=True)
        assert (inputs.tokens, every.tokens) == (own.tokens, SAMPLES * LENGTH)
        lent = FEWEST_TOKENS * len(own.matrix) if own.tokens < len(own.matrix) else 0
        expected = (own.tokens * own.matrix + lent * every.matrix) / (own.tokens + lent)
        torch.testing.assert_close(inputs.matrix, expected, rtol=1e-4, atol=1e-6, msg=linear)
        assert inputs.known_by == own.tokens + (every.tokens if lent else 0)
    seen = {place.expert: count for name, count in task.tokens.items() if (place := place_of(task.block, name))}
    assert seen == {0: SAMPLES * LENGTH - 6, 1: 6, 2: 0}


def test_every_expert_can_be_shown_every_token(task: BlockTask) -> None:
    found: dict[str, HessianSum] = {}

    def solve(linears, inputs):  # type: ignore[no-untyped-def]
        found.update(dict.fromkeys(linears, inputs))
        return {}

    solve_in_sequence(task, solve, one_by_one=True, weighting=TokenWeighting.UNIFORM, all_experts=True)
    for linear, inputs in found.items():
        expected = moments(task, linear, all_tokens=True)
        assert inputs.tokens == SAMPLES * LENGTH
        torch.testing.assert_close(inputs.matrix, expected.matrix, rtol=1e-4, atol=1e-6)

"""The method on a toy block; what it does to a whole model is the pipeline's tests' matter."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ulbq import formats
from ulbq.blockwise.activations import ActivationStore
from ulbq.errors import NumericsError
from ulbq.formats import BinaryMosScheme, binary_mos
from ulbq.methods.base import BlockResult, BlockStart, BlockTask
from ulbq.methods.binary_mos import BinaryMos
from ulbq.quantizers.binary_mos import BinaryMosQuantizer, closed_form_start
from ulbq.training.objective import BlockData
from ulbq.training.precision import Precision

WIDTH, INNER = 24, 40
CPU = Precision(torch.device("cpu"), torch.float32)


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return output


def task(folder: Path, seed: int = 0, start: BlockStart | None = None) -> BlockTask:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ToyBlock().requires_grad_(False)
        x = torch.randn(20, 8, WIDTH)
    inputs = ActivationStore(tuple(x.shape), torch.float32, limit=2**30, directory=folder)
    targets = ActivationStore(tuple(x.shape), torch.float32, limit=2**30, directory=folder)
    inputs.set(0, x)
    targets.set(0, block(x))
    hidden = block.norm(x).flatten(0, 1)
    importance = {"up": hidden.square().mean(0), "down": torch.relu(block.up(hidden)).square().mean(0)}
    data = BlockData(inputs, targets, None, {}, training=16)
    return BlockTask(0, block, ("up", "down"), importance, data, CPU, seed, lambda error: None, start=start)


def method(experts: int = 4, epochs: int = 4, **options: object) -> BinaryMos:
    return BinaryMos.from_options(BinaryMos.Options(experts=experts, epochs=epochs, **options), group_size=64)


def same(one: BlockResult, other: BlockResult) -> bool:
    return all(torch.equal(t, other.packed[layer][name]) for layer, p in one.packed.items() for name, t in p.items())


@pytest.mark.parametrize(("experts", "zeros"), [(1, "none"), (4, "output"), (2, "input")])
def test_a_block_learns_and_is_packed_as_announced(experts: int, zeros: str, tmp_path: Path) -> None:
    # Rates for a toy of a few hundred weights; the defaults are measured on a language model.
    made = method(experts, epochs=4, zeros=zeros, weight_lr=0.015, scale_lr=0.005)
    result = made.quantize_block(task(tmp_path))
    assert result.outcome is not None
    assert result.outcome.end_error < 0.9 * result.outcome.start_error
    assert result.adapters == {}
    for linear, shape in {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}.items():
        specs = made.scheme.tensors(*shape)
        assert {name: tuple(t.shape) for name, t in result.packed[linear].items()} == {
            name: spec.shape for name, spec in specs.items()
        }


def test_the_seed_decides_the_router(tmp_path: Path) -> None:
    results = [method(epochs=0).quantize_block(task(tmp_path, seed)) for seed in (0, 0, 1)]
    assert same(results[0], results[1])
    assert not torch.equal(results[0].packed["up"]["router"], results[2].packed["up"]["router"])
    assert torch.equal(results[0].packed["up"]["codes"], results[2].packed["up"]["codes"])


def test_frozen_signs_stay_those_of_the_weight(tmp_path: Path) -> None:
    given = task(tmp_path)
    weight = given.weight("up").clone()
    packed = method(train_weights=False).quantize_block(given).packed["up"]
    assert torch.equal(binary_mos.unpack(BinaryMosScheme(), packed, WIDTH).signs > 0, weight >= 0)


def test_no_epochs_from_an_artifact_give_it_back(tmp_path: Path) -> None:
    first = method(zeros="output").quantize_block(task(tmp_path))
    again = method(zeros="output", epochs=0).quantize_block(
        task(tmp_path, seed=7, start=BlockStart(first.packed, first.adapters))
    )
    assert same(first, again)


def test_far_better_than_plain_signs(tmp_path: Path) -> None:
    """Signs with one scale a row (binary-weight networks) against the closed-form start."""
    given = task(tmp_path)
    weight, cost = given.weight("down"), given.importance["down"]
    packed = method(1, epochs=0).quantize_block(task(tmp_path)).packed["down"]
    dense = formats.dequantize(BinaryMosScheme(experts=1), packed, INNER)
    plain = weight.sign() * weight.abs().mean(1, keepdim=True)
    errors = [((found - weight).square() * cost).sum() for found in (dense, plain)]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("name", ["router", "out_scales", "codes"])
def test_a_packed_layer_that_answers_otherwise_is_noticed(name: str) -> None:
    weight = torch.randn(INNER, WIDTH, generator=torch.Generator().manual_seed(0))
    scheme = BinaryMosScheme(experts=2)
    start = closed_form_start(weight, scheme, generator=torch.Generator().manual_seed(0))
    start = start._replace(out_scales=start.out_scales * torch.tensor([[1.0], [2.0]]))
    quantizer = BinaryMosQuantizer(weight, start, scheme)
    packed = quantizer.finalize()
    quantizer.check_product("layer", packed)
    packed[name] = packed[name].flip(0 if packed[name].shape[0] > 1 else 1)
    with pytest.raises(NumericsError, match="'layer'"):
        quantizer.check_product("layer", packed)

"""A block's layers solved in execution order, each from the second moments of its inputs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from ulbq import distributed
from ulbq.blockwise.walk import run_block
from ulbq.config.training import TokenWeighting
from ulbq.methods.base import BlockTask
from ulbq.models.watch import Enough, Input, distinct_inputs, watching
from ulbq.nn.quant_linear import linear_layer
from ulbq.solvers.hessian import HessianSum
from ulbq.training.objective import BlockData

Solve = Callable[[Sequence[str], HessianSum], Mapping[str, torch.Tensor]]
"""Quantizes the layers of some names, which share second moments; gives their weights ``[out, in]`` as stored."""


FEWEST_TOKENS = 1 / 4
"""Tokens a column. With fewer, errors go to where these samples happen not to look: on other samples of correlated
random inputs, the error is then no lower than that of rounding to nearest; at two a column it is a quarter of that."""


@torch.no_grad()
def solve_in_sequence(
    task: BlockTask, solve: Solve, *, one_by_one: bool, weighting: TokenWeighting = TokenWeighting.ENERGY
) -> None:
    """Solve every layer of a block. Layers that are called with the very same tensor are solved together.

    Args:
        task: with activations. The block is left with the weights that ``solve`` gave. Where it tells what errors at
            the outputs of a layer cost, the tokens count by that too, and each layer is solved by itself.
        solve: called once for every distinct input, or for every layer.
        one_by_one: what a layer reads comes from the quantized layers before it (GPTQ's true-sequential), in as many
            passes over the samples as there are inputs. Members of one list, a mixture's experts, are solved from the
            same pass: none of them reads what another made. Otherwise one pass serves all layers.
        weighting: how much each token counts in the second moments.
    """
    stages: dict[str, list[Input]] = {}
    known: dict[str, str] = {}
    # The first sample is the first process's; with experts, another sample may well call other layers.
    inputs = distributed.on_main(lambda: distinct_inputs(_layers(task.block, task.linears), lambda: _run(task, 0)))
    for one in inputs:
        places = [_place(task.block, layer) for layer in one.layers]
        # An expert that the first sample missed comes where its like do.
        stage = known.get(places[0], places[0]) if one_by_one else ""
        known |= dict.fromkeys(places, stage)
        stages.setdefault(stage, []).append(one)
    for together in stages.values():
        sums = _gather(task, together, weighting)
        for one in together:
            for layers in [one.layers] if task.outputs is None else [(name,) for name in one.layers]:
                # Taken out, so that each goes as soon as it has served.
                for name, weight in solve(layers, sums.pop(layers[0])).items():
                    # A new parameter: the old one's values are still wanted to compare with.
                    linear_layer(task.block, name).weight = nn.Parameter(weight, requires_grad=False)


def _place(block: nn.Module, name: str) -> str:
    """A layer's name without its place in lists of modules, ``experts.*.up_proj`` for ``experts.3.up_proj``."""
    parts = name.split(".")
    listed = [isinstance(block.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(len(parts))]
    return ".".join("*" if inside else part for part, inside in zip(parts, listed, strict=True))


def _gather(task: BlockTask, inputs: Sequence[Input], weighting: TokenWeighting) -> dict[str, HessianSum]:
    """Second moments over the samples that train, by the first layer that reads an input, or for every layer."""
    samples = _activations(task).training
    costs, device = task.outputs, task.precision.device
    relative = weighting is TokenWeighting.ENERGY
    # Each is added up for the layers that it serves.
    served = {one.layers[0]: one.layers if costs is not None else one.layers[:1] for one in inputs}
    sums = {
        name: HessianSum(
            linear_layer(task.block, name).in_features,
            device,
            relative=relative,
            groups=1 if costs is None else costs[name].tokens.shape[2],
        )
        for names in served.values()
        for name in names
    }
    # Where a layer was missed, as experts are, another sample may well call it, and no call is known to be the last.
    expected = sum(one.calls for one in inputs) if all(one.calls for one in inputs) else 0
    seen, sample = 0, 0

    def add(first: str, tensor: torch.Tensor) -> None:
        nonlocal seen
        for name in served[first]:
            sums[name].add(tensor, None if costs is None else costs[name].tokens[sample])
        seen += 1
        if seen == expected:
            raise Enough

    with watching(_layers(task.block, list(served)), add):
        for sample in distributed.own(range(samples)):
            seen = 0
            with suppress(Enough):
                _run(task, sample // distributed.size())
    for one in sums.values():
        one.reduce()
    return sums


def _layers(block: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: block.get_submodule(name) for name in names}


def _run(task: BlockTask, row: int) -> None:
    """Pass one sample of the quantized stream, of those that this process holds, through the block."""
    data = _activations(task)
    with task.precision.autocast():
        run_block(task.block, data.inputs.get(slice(row, row + 1)).to(task.precision.device), data.kwargs)


def _activations(task: BlockTask) -> BlockData:
    if task.data is None:
        raise ValueError("second moments need activations")
    return task.data

"""A block's layers solved in execution order, each from the second moments of its inputs."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import nn

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.arguments import run_block
from ulbq.config.training import TokenWeighting
from ulbq.methods.base import BlockTask
from ulbq.models.watch import Enough, Input, distinct_inputs, watching
from ulbq.nn.experts import Experts, Place, place_of, showing
from ulbq.nn.quant_linear import linear_layer
from ulbq.solvers.drift import Drift
from ulbq.solvers.hessian import FEWEST_TOKENS, HessianSum
from ulbq.training.objective import BlockData

Solve = Callable[[Sequence[str], HessianSum], Mapping[str, torch.Tensor]]
"""Quantizes the layers of some names, which share second moments; gives their weights ``[out, in]`` as stored."""


class _InputSums(NamedTuple):
    """What is known of one input: its second moments, and how far it is from that of the full-precision model.

    Where errors at outputs cost something, also the second moments of its own for each layer that reads it.
    """

    hessian: HessianSum
    drift: Drift | None
    own: dict[str, HessianSum]


@torch.no_grad()
def solve_in_sequence(
    task: BlockTask,
    solve: Solve,
    *,
    one_by_one: bool,
    weighting: TokenWeighting = TokenWeighting.ENERGY,
    all_experts: bool = False,
    full_inputs: bool = False,
    heldout: bool = False,
    rounds_few: bool = False,
    settle: Callable[[], None] | None = None,
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
        all_experts: show every expert of a mixture every token. Otherwise it sees those that are sent to it, and
            second moments over all tokens stand in where these are few, as :func:`_lend` has it.
        full_inputs: ``solve`` finds weights that make good how far the inputs are from those of the full-precision
            model (:mod:`ulbq.solvers.drift`), whose activations the task has. Members of a list are left out: other
            tokens may call them.
        heldout: give ``solve`` second moments of the samples that are held out, too.
        rounds_few: ``solve`` looks at the diagonal alone where :attr:`HessianSum.few` tokens tell of an input: nothing
            else is added up of one that will have too few. Of members of a list nobody knows that before.
        settle: called after each pass, when what it served is solved.
    """
    reference = copy.deepcopy(task.block) if full_inputs and _activations(task).originals is not None else None
    mixtures = [module for module in task.block.modules() if isinstance(module, Experts)]
    for together in _passes(task, one_by_one=one_by_one):
        with showing({mixture: range(len(mixture)) for mixture in mixtures} if all_experts else {}):
            empty = _empty(
                task, together, weighting, drifts=reference is not None, heldout=heldout, rounds_few=rounds_few
            )
            sums = _gather(task, together, empty, reference)
        members = {name: place for name in sums if (place := place_of(task.block, name)) is not None}
        task.tokens.update({name: sums[name].hessian.tokens for name in members})
        if not all_experts:
            _lend(task, members, {name: sums[name].hessian for name in members}, weighting)
        for one in together:
            # Taken out, so that each goes as soon as it has served.
            hessian, drift, own = sums.pop(one.layers[0])
            if drift is not None and not hessian.few:
                correction = drift.correction(hessian.matrix)
                _put(task, {name: torch.addmm(w, w, correction) for name in one.layers for w in [task.weight(name)]})
            if task.outputs is None:
                _put(task, solve(one.layers, hessian))
            for name in list(own):
                _put(task, solve((name,), own.pop(name)))
        if settle is not None:
            settle()


def _passes(task: BlockTask, *, one_by_one: bool) -> list[list[Input]]:
    """The inputs that each pass over the samples serves, in execution order."""
    passes: dict[str, list[Input]] = {}
    known: dict[str, str] = {}
    # The first sample is the first process's; with experts, another sample may well call other layers.
    inputs = distributed.on_main(lambda: distinct_inputs(_layers(task.block, task.linears), lambda: _run(task, 0)))
    for one in inputs:
        places = [_place(task.block, layer) for layer in one.layers]
        # An expert that the first sample missed comes where its like do.
        stage = known.get(places[0], places[0]) if one_by_one else ""
        known |= dict.fromkeys(places, stage)
        passes.setdefault(stage, []).append(one)
    return list(passes.values())


def _put(task: BlockTask, weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        task.set_aside(name)
        linear_layer(task.block, name).weight = nn.Parameter(weight, requires_grad=False)


def _lend(
    task: BlockTask, places: Mapping[str, Place], sums: Mapping[str, HessianSum], weighting: TokenWeighting
) -> None:
    """Lend second moments H over all tokens of a block to experts that saw fewer tokens than a layer has columns.

    With n tokens of its own one has ``(n·Hₑ + λ·H) / (n + λ)``, where λ is :data:`FEWEST_TOKENS` a column: one that saw
    none has H. What enters the experts is the same for all of them, so that H is the mean of theirs; what their last
    layers read is each one's own, and comes of showing it all tokens.
    """
    poor = {name: place for name, place in places.items() if sums[name].tokens < sums[name].columns}
    inner = [name for name, place in poor.items() if place.projection == "down_proj"]
    whole = _shown_all(task, inner, weighting) if inner else {}
    for owner in {place.owner for name, place in poor.items() if name not in whole}:
        entering = {n: p for n, p in places.items() if p.owner == owner and p.projection != "down_proj"}
        # Of each expert once, and before any of them borrows.
        mean = HessianSum.mean(list({place.expert: sums[name] for name, place in entering.items()}.values()))
        whole |= dict.fromkeys(entering.keys() & poor.keys(), mean)
    for name in poor:
        sums[name].borrow(whole[name], FEWEST_TOKENS * sums[name].columns)


def _shown_all(task: BlockTask, linears: Sequence[str], weighting: TokenWeighting) -> dict[str, HessianSum]:
    """Second moments of layers of experts that are shown all tokens."""
    shown: dict[Experts, list[int]] = {}
    for place in filter(None, (place_of(task.block, linear) for linear in linears)):
        mixture = task.block.get_submodule(place.owner)
        if isinstance(mixture, Experts):
            shown.setdefault(mixture, []).append(place.expert)
    inputs = [Input((linear,), 0, 0) for linear in linears]
    empty = _empty(task, inputs, weighting, drifts=False, heldout=False, rounds_few=False)
    with showing(shown):
        found = _gather(task, inputs, empty, None)
    return {name: one.hessian for name, one in found.items()}


def _place(block: nn.Module, name: str) -> str:
    """A layer's name without its place in lists of modules, ``experts.*.up_proj`` for ``experts.3.up_proj``."""
    parts = name.split(".")
    listed = [isinstance(block.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(len(parts))]
    return ".".join("*" if inside else part for part, inside in zip(parts, listed, strict=True))


def _gather(
    task: BlockTask,
    inputs: Sequence[Input],
    sums: dict[str, _InputSums],
    reference: nn.Module | None,
) -> dict[str, _InputSums]:
    """Sums over the samples that train, of some inputs, by the first layer that reads them; they come empty."""
    samples, originals = _activations(task).training, _activations(task).originals
    costs = task.outputs
    heldout = any(one.hessian.heldout is not None for one in sums.values())
    # Where a layer was missed, as experts are, another sample may well call it, and no call is known to be the last.
    expected = sum(one.calls for one in inputs) if all(one.calls for one in inputs) else 0
    drifting = {one.layers[0]: one.calls for one in inputs if sums[one.layers[0]].drift is not None}
    wanted: dict[str, list[torch.Tensor]] = {}
    seen, sample = 0, 0

    def add(name: str, tensor: torch.Tensor) -> None:
        nonlocal seen
        hessian, drift, own = sums[name]
        if sample < samples:
            hessian.add(tensor)
            if drift is not None:
                drift.add(wanted[name].pop(0), tensor)
            for layer, total in own.items():
                total.add(tensor, None if costs is None else costs[layer].tokens[sample])
        elif hessian.heldout is not None:
            hessian.heldout.add(tensor)
        seen += 1
        if seen == expected:
            raise Enough

    count = int(distributed.total(len(_activations(task).inputs))[0]) if heldout else samples
    with watching(_layers(task.block, list(sums)), add):
        for sample in distributed.own(range(count)):
            row = sample // distributed.size()
            if sample < samples and reference is not None and originals is not None and drifting:
                wanted = _wanted(task, reference, originals, drifting, row)
            seen = 0
            with suppress(Enough):
                _run(task, row)
    for hessian, drift, own in sums.values():
        for total in filter(None, (hessian, hessian.heldout, *own.values())):
            total.reduce()
        if drift is not None:
            drift.reduce()
    return sums


def _empty(
    task: BlockTask,
    inputs: Sequence[Input],
    weighting: TokenWeighting,
    *,
    drifts: bool,
    heldout: bool,
    rounds_few: bool,
) -> dict[str, _InputSums]:
    """Sums of nothing yet."""
    device, relative = task.precision.device, weighting is TokenWeighting.ENERGY
    sums: dict[str, _InputSums] = {}
    for one in inputs:
        name = one.layers[0]
        width = linear_layer(task.block, name).in_features
        alone = _place(task.block, name) == name
        few = rounds_few and alone and _has_few(_activations(task), one, width)
        drift = Drift(width, device, relative=relative) if drifts and alone and not few else None
        costs = {} if task.outputs is None else {layer: task.outputs[layer].tokens.shape[2] for layer in one.layers}
        own = {layer: HessianSum(width, device, groups=groups, diagonal=few) for layer, groups in costs.items()}
        hessian = HessianSum(width, device, relative=relative, diagonal=few)
        hessian.heldout = HessianSum(width, device, relative=relative) if heldout else None
        sums[name] = _InputSums(hessian, drift, own)
    return sums


def _has_few(data: BlockData, one: Input, width: int) -> bool:
    """Whether an input of so many columns will have too few tokens, by what the first sample gave of it."""
    # A sample's own arguments, as states of its images are, may have other rows than those of the first.
    alike = isinstance(data.kwargs, dict) or one.rows == data.inputs.shape[1]
    return alike and 0 < one.rows * data.training < FEWEST_TOKENS * width


def _wanted(
    task: BlockTask, reference: nn.Module, originals: ActivationStore, calls: Mapping[str, int], row: int
) -> dict[str, list[torch.Tensor]]:
    """What some layers read in the full-precision model at every one of so many calls, for one sample."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in calls}

    def keep(name: str, tensor: torch.Tensor) -> None:
        found[name].append(tensor)
        if all(calls.values()) and all(len(found[one]) == count for one, count in calls.items()):
            raise Enough  # what comes after in the block is of no interest

    with watching(_layers(reference, list(calls)), keep), suppress(Enough):
        _pass(task, reference, originals, row)
    return found


def _layers(block: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: block.get_submodule(name) for name in names}


def _run(task: BlockTask, row: int) -> None:
    """Pass one sample of the quantized stream, of those that this process holds, through the block."""
    _pass(task, task.block, _activations(task).inputs, row)


def _pass(task: BlockTask, block: nn.Module, inputs: ActivationStore, row: int) -> None:
    with task.precision.autocast():
        hidden = inputs.get(slice(row, row + 1), task.precision.device)
        run_block(block, hidden, _activations(task).kwargs, [row])


def _activations(task: BlockTask) -> BlockData:
    if task.data is None:
        raise ValueError("second moments need activations")
    return task.data

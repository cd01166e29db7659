"""Layer-wise training (ApiQ-lw): every linear layer learns its own full-precision output, in the order they run.

Layers that read the same input (q, k and v; gate and up) train together. The input of a layer comes from the block
as it is by then, with the layers before it quantized already; its target is the full-precision layer's output on the
full-precision stream.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import nn

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.arguments import Arguments, run_block
from ulbq.config.stages import Stage
from ulbq.config.training import TrainSettings
from ulbq.errors import InputError
from ulbq.models.watch import Enough, distinct_inputs, watching
from ulbq.training.block import BlockTrainer, TrainOutcome
from ulbq.training.linear import TrainedLinear
from ulbq.training.objective import BlockData, Objective, Penalty
from ulbq.training.pieces import Pieces
from ulbq.training.precision import Precision


class _LayerGroup(nn.Module):
    """Layers that read the same input, side by side, as if they were a block."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


class LayerwiseTrainer:
    """Trains the layers of one block group by group.

    Args:
        block: the block, its linears already replaced by :class:`TrainedLinear`.
        reference: the same block in full precision.
        data: of the block, ``originals`` among them.
        settings: rates and the rest; norms do not train.
        precision: device and dtype.
        stages: as :class:`~ulbq.training.block.BlockTrainer` takes them, for every group anew.
        penalty: makes the penalty of some layers, by their names; None where they have none.
        pieces: as :class:`~ulbq.training.block.BlockTrainer` takes them.
        sharded: as it takes that.
    """

    def __init__(
        self,
        block: nn.Module,
        reference: nn.Module,
        data: BlockData,
        settings: TrainSettings,
        precision: Precision,
        *,
        stages: Sequence[Stage] | None = None,
        penalty: Callable[[Sequence[str]], Penalty | None] = lambda names: None,
        pieces: Pieces | None = None,
        sharded: bool = False,
    ) -> None:
        if data.originals is None:
            raise ValueError("layer-wise training needs the full-precision inputs")
        self._block = block
        self._reference = reference
        self._data = data
        self._originals = data.originals
        self._settings = settings
        self._precision = precision
        self._stages = stages
        self._penalty = penalty
        self._pieces = pieces or Pieces()
        self._sharded = sharded

    def train(self, seed: int, on_epoch: Callable[[float], None] = lambda error: None) -> TrainOutcome:
        """Train group after group; errors are of the whole block. ``on_epoch`` hears of the last group's epochs."""
        whole = Objective(self._block, self._data, self._settings, self._precision, None)
        start = whole.validation_output()
        # The first sample is the first process's.
        groups = distributed.on_main(
            input_groups, self._reference, self._originals, self._data.kwargs, tuple(whole.layers), self._precision
        )
        ends = []
        for number, names in enumerate(groups):
            listener = on_epoch if number == len(groups) - 1 else lambda error: None
            ends.append(self._group(names, whole.layers).train(seed + number, listener))
        end = whole.validation_output()
        return TrainOutcome(
            start_error=start.error,
            end_error=end.error,
            steps=sum(end.steps for end in ends),
            retries=sum(end.retries for end in ends),
            fallback=all(end.fallback for end in ends),
            diverged=any(end.diverged for end in ends),
            sinks=end.sinks,
            at_once=self._pieces.fewest(),
        )

    def _group(self, names: Sequence[str], layers: dict[str, TrainedLinear]) -> BlockTrainer:
        """A trainer of some layers on what they read and should give."""
        full = self._capture(self._reference, names, self._originals)
        inputs = self._capture(self._block, names, self._data.inputs)
        dense = _LayerGroup([self._reference.get_submodule(name) for name in names])
        targets = self._outputs(dense, full)
        augmented = None if self._data.augmented is None else self._outputs(dense, inputs)
        data = BlockData(inputs, targets, augmented, {}, self._data.training)
        group = _LayerGroup([layers[name] for name in names])
        by_index = {f"layers.{i}": name for i, name in enumerate(names)}
        own = self._penalty(names)
        penalty = None if own is None else lambda found: own({by_index[key]: layer for key, layer in found.items()})
        return BlockTrainer(
            group,
            data,
            self._settings,
            self._precision,
            stages=self._stages,
            penalty=penalty,
            pieces=self._pieces,
            sharded=self._sharded,
        )

    def _capture(self, block: nn.Module, names: Sequence[str], hidden: ActivationStore) -> ActivationStore:
        """What the layers of a group read for every sample, ``[samples, length, in]``."""

        def run(rows: torch.Tensor, sample: int) -> torch.Tensor:
            found = _inputs_of(block, names, rows, sample, self._data.kwargs, self._precision)
            for name in names:
                if name not in found or found[name].shape[:-1] != rows.shape[:-1]:
                    raise _partial(name)
            return found[names[0]]

        return _store(hidden, run, self._precision.device)

    def _outputs(self, group: nn.Module, inputs: ActivationStore) -> ActivationStore:
        def run(rows: torch.Tensor, sample: int) -> torch.Tensor:
            with self._precision.autocast():
                result: torch.Tensor = group(rows)
            return result

        return _store(inputs, run, self._precision.device)


@torch.no_grad()
def input_groups(
    block: nn.Module,
    hidden: ActivationStore,
    kwargs: Arguments,
    linears: Sequence[str],
    precision: Precision,
) -> list[list[str]]:
    """Layers in execution order, those that are called with the very same tensor together.

    Raises:
        InputError: the first sample does not call every layer once.
    """

    def run() -> None:
        with precision.autocast():
            run_block(block, hidden.get(slice(0, 1), precision.device), kwargs, [0])

    found = distinct_inputs({name: block.get_submodule(name) for name in linears}, run)
    for one in found:
        if one.calls != 1:
            raise _partial(one.layers[0])
    return [list(one.layers) for one in found]


def _partial(name: str) -> InputError:
    return InputError(
        f"The layer '{name}' does not see every token: layers cannot be trained one by one here.",
        hint="Use `granularity=block`.",
    )


def _inputs_of(
    block: nn.Module, names: Sequence[str], rows: torch.Tensor, sample: int, kwargs: Arguments, precision: Precision
) -> dict[str, torch.Tensor]:
    """What layers inside a block are called with, those that are; the block runs no further than the last of them."""
    caught: dict[str, torch.Tensor] = {}

    def catch(name: str, tensor: torch.Tensor) -> None:
        caught.setdefault(name, tensor)
        if len(caught) == len(names):
            raise Enough

    layers = {name: block.get_submodule(name) for name in names}
    with watching(layers, catch), precision.autocast(), suppress(Enough):
        run_block(block, rows, kwargs, [sample])
    return caught


@torch.no_grad()
def _store(
    inputs: ActivationStore, run: Callable[[torch.Tensor, int], torch.Tensor], device: torch.device
) -> ActivationStore:
    """What ``run`` makes of every sample on a device, stored as ``inputs`` are."""
    made: ActivationStore | None = None
    for start in range(len(inputs)):
        rows = run(inputs.get(slice(start, start + 1), device), start).float()
        if made is None:
            made = inputs.alike(rows.shape[1], rows.shape[2])
        made.set(start, rows)
    if made is None:
        raise ValueError("no samples")
    return made

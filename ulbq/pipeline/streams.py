"""The two activation streams of a quantization run: through the full-precision blocks, and through the packed ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.errors import InputError
from ulbq.formats import AnyScheme
from ulbq.models.source import ModelSource
from ulbq.models.watch import watching
from ulbq.nn.experts import Place, place_of
from ulbq.nn.quant_linear import linear_layer
from ulbq.pipeline import layout
from ulbq.pipeline.quantization_plan import Job
from ulbq.training.attention import chunked_attention
from ulbq.training.fused import FusedParts
from ulbq.training.objective import BlockData


class Streams:
    """The streams, standing before one block; of several processes each has those of its share of the samples.

    Args:
        job: the run.
        samples: of all processes, the held-out ones last.
        scratch: for activations beyond the run's ``activation_memory``; the blocks' adapters lie there too.

    Attributes:
        importance: ``[in]`` mean squared input of each linear layer of the block that ``x_fp`` passed last.
        tokens: how many of them each layer of its experts saw.
    """

    def __init__(self, job: Job, samples: Samples, scratch: Path) -> None:
        self._job = job
        self._scratch = scratch
        self._training = job.request.samples
        self._batch = job.request.batch_size
        needs = job.method.needs
        self._positions = samples.tokens.numel()
        own = distributed.own(samples)
        # Packed tables give the quantized blocks other inputs.
        ours = None if job.embedded is None else self._begin(job.embedded, own).hidden
        self._walk = self._begin(job.source, own)
        self._full = self._walk.hidden
        self._quantized = self._full.copy() if ours is None else ours
        self._augmented = self._full.copy() if needs.augmented else None
        self._originals = self._full.copy() if needs.originals else None
        self.importance: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def _begin(self, source: ModelSource, own: Samples) -> BlockWalk:
        """The samples of this process at the first block of a model."""
        return BlockWalk(
            self._job.model,
            source,
            own,
            dtype=torch.float32,
            device=self._job.precision.device,
            limit=self._job.request.activation_memory // self._job.method.needs.stores,
            directory=self._scratch,
        )

    @property
    def extras(self) -> int | None:
        """Values that the last block returned behind the hidden states; None where it returned no tuple."""
        return self._walk.extras

    def load(self, index: int) -> nn.Module:
        """A block in full precision, as :meth:`BlockWalk.load` has it."""
        return self._walk.load(index)

    @torch.no_grad()
    def called(self, index: int, block: nn.Module) -> tuple[str, ...]:
        """Names of the layers to quantize that the first sample calls; those in lists, as experts are, all count.

        A model uses the weights of the others by itself, or not at all.
        """
        _, linears = self._job.names(index)
        seen = {linear for linear in linears if _in_list(block, linear)}
        alone = {linear: block.get_submodule(linear) for linear in linears if linear not in seen}
        with watching(alone, lambda linear, _: seen.add(linear)), chunked_attention(self._job.precision):
            if len(self._quantized):
                with self._job.precision.autocast():
                    self._walk.call(index, block, self._quantized.get(slice(0, 1)))
        seen = _of_all(seen)
        return tuple(linear for linear in linears if linear in seen)

    def advance_full_precision(self, index: int, block: nn.Module, linears: tuple[str, ...] = ()) -> None:
        """Run ``x_fp`` through a block in place; note what linear layers see and the like.

        Args:
            index: of the block.
            block: as :meth:`load` gives it; it stays as it is.
            linears: names of the layers; none where nothing is quantized.
        """
        # It tries the block out: before somebody watches.
        fused = FusedParts(block, self._job.precision)
        if not linears:
            self._run(block, index, self._full, self._full, fused)
            return
        if self._originals is not None:
            for start in range(len(self._full)):
                self._originals.set(start, self._full.get(slice(start, start + 1)))
        with _mean_squares(block, linears) as sums:
            self._run(block, index, self._full, self._full, fused)
        places = {linear: place for linear in linears if (place := place_of(block, linear)) is not None}
        self.tokens = {linear: sums.tokens.get(linear, 0) for linear in places}
        self.importance = {
            linear: _importance(index, linear, sums.squares, places) / self._positions for linear in linears
        }
        if self._augmented is not None:
            self._run(block, index, self._quantized, self._augmented, fused)

    def advance_quantized(self, index: int, shard: Path, schemes: Mapping[str, AnyScheme]) -> None:
        """Run ``x_q`` through the packed block that a shard holds, in place; ``schemes`` of its packed layers.

        Then both streams stand before the next block.
        """
        job, prefix = self._job, self._job.names(index)[0]
        block = layout.packed_block(job.model, index, shard, tuple(schemes), job.method.scheme, schemes)
        if job.method.needs.adapter is not None:
            adapters = self._scratch / layout.adapter_shard(index)
            layout.restore_adapters(block, prefix, adapters, job.method.needs.adapter)
        block.to(job.precision.device)
        fused = FusedParts(block, self._job.precision)
        self._run(block, index, self._quantized, self._quantized, fused)
        self._walk.add_between(index, self._full, self._quantized)

    def check_called(self, index: int, block: nn.Module, linears: tuple[str, ...], called: set[str]) -> None:
        """Refuse a block with a layer that no sample calls; for methods that do without the full-precision stream.

        Args:
            index: of the block.
            block: it, as the method left it.
            linears: names of the layers that were quantized.
            called: the layers that were called in this process on samples that train. The others get the held-out ones.

        Raises:
            InputError: names the layer.
        """
        # An expert that nobody chose borrows what the others saw.
        missed = {linear for linear in linears if place_of(block, linear) is None} - _of_all(called)
        if not missed:
            return
        late: set[str] = set()
        layers = {linear: block.get_submodule(linear) for linear in sorted(missed)}
        fused = FusedParts(block, self._job.precision)  # which calls layers to see what they do
        with watching(layers, lambda linear, _: late.add(linear)):
            self._run(block, index, self._quantized, self._quantized.copy(), fused)
        if missed := missed - _of_all(late):
            raise _never_called(index, min(missed))

    def ends(self) -> tuple[ActivationStore, ActivationStore]:
        """Both streams where they stand: in full precision, and through the packed blocks."""
        return self._full, self._quantized

    def data(self, index: int) -> BlockData:
        """What the block is trained on."""
        kwargs = self._walk.block_kwargs[index]
        return BlockData(self._quantized, self._full, self._augmented, kwargs, self._training, self._originals)

    def _run(
        self, block: nn.Module, index: int, inputs: ActivationStore, outputs: ActivationStore, fused: FusedParts
    ) -> None:
        @contextmanager
        def context() -> Iterator[None]:
            with chunked_attention(self._job.precision), fused.active(), self._job.precision.autocast():
                yield

        self._walk.advance(index, block, inputs, outputs, batch_size=self._batch, context=context)


class _Seen(NamedTuple):
    """What layers saw: sums over tokens of their squared inputs, ``[in]`` float32, and how many tokens."""

    squares: dict[str, torch.Tensor]
    tokens: dict[str, int]


@contextmanager
def _mean_squares(block: nn.Module, linears: tuple[str, ...]) -> Iterator[_Seen]:
    """What each layer sees, filled while the block runs; behind the context that of all processes."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(linear: str, inputs: torch.Tensor) -> None:
        nonlocal last
        # Layers that read the same tensor are called one after the other.
        if last is None or last[0] is not inputs:
            last = (inputs, inputs.float().square().flatten(0, -2).sum(0))
        square = last[1]
        # Each its own: those of other processes are added in place.
        sums[linear] = sums[linear] + square if linear in sums else square.clone()
        counts[linear] = counts.get(linear, 0) + inputs[..., 0].numel()

    with watching({linear: block.get_submodule(linear) for linear in linears}, add):
        yield _Seen(sums, counts)
    # An expert may be called in some processes only.
    called = _of_all(set(sums))
    for linear in linears:
        if linear in called:
            weight = linear_layer(block, linear).weight
            sums.setdefault(linear, torch.zeros(weight.shape[1], device=weight.device))
            distributed.sum_(sums[linear])
            counts[linear] = int(distributed.total(counts.get(linear, 0))[0])


def _in_list(block: nn.Module, name: str) -> bool:
    """Whether a layer is one of a list's, or a part of one."""
    parts = name.split(".")
    return any(isinstance(block.get_submodule(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _of_all(names: set[str]) -> set[str]:
    """What all processes have together."""
    return {name for some in distributed.gather(names) for name in some}


def _never_called(index: int, linear: str) -> InputError:
    return InputError(
        f"Block {index} never calls its layer '{linear}' on the calibration samples.",
        hint="Take more samples; where the model uses the layer's weight by itself, `method=rtn` needs none.",
    )


def _importance(index: int, linear: str, sums: Mapping[str, torch.Tensor], places: Mapping[str, Place]) -> torch.Tensor:
    """A layer's sums; of an expert that no token reached those of all experts; the same for every column without any.

    Args:
        places: those of experts' layers.
    """
    if linear in sums and sums[linear].any():
        return sums[linear]
    alike = [name for name, place in places.items() if linear in places and place.like(places[linear])]
    seen = [sums[name] for name in (alike or [linear]) if name in sums]
    if not seen:
        raise _never_called(index, linear)
    total = torch.stack(seen).sum(0)
    return total if total.any() else torch.ones_like(total)

"""A model that memory does not hold: one of its blocks is there at a time, read from disk as it runs."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.end import ModelEnd
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.models.adapter_files import adapter_folder, load_adapters
from ulbq.models.blocks import block_list, empty_copy, load_block, load_outer
from ulbq.models.load import model_memory, unfilled_model
from ulbq.models.source import ModelSource
from ulbq.models.tables import embed_from_disk
from ulbq.nn.adapter import AdaptedLinear, Adapter
from ulbq.nn.quant_linear import QuantLinear
from ulbq.progress import Progress, Silent

ACTIVATION_MEMORY = 1 << 30
"""Bytes of activations that stay in memory; beyond it they lie on disk."""


class StreamedModel:
    """Stands in for a loaded model, and computes the same.

    Many samples pass each block together, which is read once for all of them (:meth:`pass_blocks`). The model that
    writes, :meth:`whole`, reads every block for each token.

    Args:
        source: the model.
        dtype: as of :func:`~ulbq.models.load.load_model`, and so are the next three.
        device: where the block, embeddings and head are; stored activations are on the CPU.
        adapter: run the blocks with the adapter of an artifact that has one. Its sums round in ``dtype``, where peft
            takes float32.
        prefill_cache: keep dense copies of a block's weights while samples pass it.
        directory: for activations beyond ``limit``.
        limit: bytes of them that stay in memory.
        progress: told of every block that many samples pass.

    Attributes:
        config, dtype, device: as a model has them.

    Raises:
        InputError: as :func:`~ulbq.models.load.load_model`; of weights, when they are read.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        directory: Path,
        adapter: bool = True,
        prefill_cache: bool = False,
        limit: int = ACTIVATION_MEMORY,
        progress: Progress | None = None,
    ) -> None:
        self._source, self._directory, self._limit = source, directory, limit
        self._progress = progress or Silent()
        self._cache = prefill_cache
        self._model = unfilled_model(source, dtype)
        self.config = self._model.config
        self.dtype, self.device = dtype, device
        prefix, blocks = block_list(self._model)
        self._prefixes = [f"{prefix}.{index}." for index in range(len(blocks))]
        folder = adapter_folder(source) if adapter else None
        self._adapters: dict[str, Adapter] = {} if folder is None else load_adapters(self._model, folder)
        self._held: dict[int, int] = {}

    def whole(self) -> PreTrainedModel:
        """The model itself, with its head in memory; each of its blocks is read whenever it is called.

        Of an embedding that the head does not share, rows are read as their tokens come.
        """
        model = empty_copy(self._model)
        embed_from_disk(model, self._source.rows, self.dtype, self.device)
        load_outer(model, self._source, None, self.device)
        for index, block in enumerate(block_list(model)[1]):
            block.forward = partial(self._call, index)
        return model

    @torch.no_grad()
    def pass_blocks(self, tokens: torch.Tensor, batch_size: int, *, head_on_disk: bool = False) -> "PassedBlocks":
        """Run samples through all blocks, each of which is read once.

        Args:
            tokens: int64 ``[samples, length]``.
            batch_size: samples that run at once.
            head_on_disk: read the head anew for every batch of logits, a part at a time, where it can be read so.

        Raises:
            InputError: tokens beyond the vocabulary, or a model whose blocks are no plain chain.
            ResourceError: the disk has no room for the activations.
        """
        with self._progress.phase(f"Blocks of {self._source.name}", len(self._prefixes)) as phase:
            walk = BlockWalk(
                self._model,
                self._source,
                Samples(tokens),
                dtype=None,
                device=self.device,
                limit=self._limit,
                directory=self._directory,
                batch_size=batch_size,
            )
            for index in range(len(self._prefixes)):
                self._pass(walk, index, batch_size)
                phase.advance()
        end = ModelEnd(self._model, self._source, None, self.device, extras=walk.extras, head_on_disk=head_on_disk)
        return PassedBlocks(end, walk.hidden)

    @property
    def held(self) -> int:
        """Bytes of weights that the model would hold if it were loaded. Blocks that never ran are read for it."""
        for index in range(len(self._prefixes)):
            if index not in self._held:
                self._ready(index, load_block(self._model, self._source, index, None, self.device))
        blocks = self._prefixes[0].removesuffix("0.")
        every = [*self._model.named_parameters(), *self._model.named_buffers()]
        outer = sum(tensor.nbytes for name, tensor in every if not name.startswith(blocks))
        return sum(self._held.values()) + outer

    def _pass(self, walk: BlockWalk, index: int, batch_size: int) -> None:
        block = self._ready(index, walk.load(index))
        walk.advance(index, block, walk.hidden, walk.hidden, batch_size=batch_size, context=nullcontext)

    def _call(self, index: int, *args: Any, **kwargs: Any) -> Any:
        return self._ready(index, load_block(self._model, self._source, index, None, self.device))(*args, **kwargs)

    def _ready(self, index: int, block: nn.Module) -> nn.Module:
        """A block as it runs: packed weights in the layout of their products, adapters beside their layers."""
        for layer in block.modules():
            if isinstance(layer, QuantLinear):
                layer.cache = self._cache
                layer.prepare()
        prefix = self._prefixes[index]
        for name, adapter in self._adapters.items():
            if name.startswith(prefix):
                linear = name.removeprefix(prefix)
                block.set_submodule(linear, AdaptedLinear(block.get_submodule(linear), adapter.to(self.device)))
        self._held[index] = model_memory(block).weights
        return block


class PassedBlocks:
    """Samples behind the last block of a model, and what makes logits of them.

    Args:
        end: of the model.
        states: the samples' hidden states.
    """

    def __init__(self, end: ModelEnd, states: ActivationStore) -> None:
        self._end, self._states = end, states

    @torch.no_grad()
    def logits(self, rows: slice, positions: slice = slice(None)) -> torch.Tensor:
        """Logits ``[batch, n, vocabulary]`` of some samples at some positions, as the model itself gives them."""
        return self._end.logits(self._states.get(rows)[:, positions].to(self._end.device))


AnyModel = PreTrainedModel | StreamedModel
"""A model that gives logits and writes, whether its weights are in memory or not."""


def whole_model(model: AnyModel) -> PreTrainedModel:
    """What is called for the tokens of a text, one after the other."""
    return model.whole() if isinstance(model, StreamedModel) else model

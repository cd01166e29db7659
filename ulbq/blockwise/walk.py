"""One walk over the blocks of a model: each is read once, and all samples pass it before the next is read."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.blockwise.activations import ActivationStore, Hidden
from ulbq.blockwise.arguments import Arguments, OnDevice, joined, moved, outputs_of
from ulbq.blockwise.recording import check_broadcast, embed, no_chain, record
from ulbq.blockwise.samples import Samples
from ulbq.errors import InputError
from ulbq.models.blocks import block_list, check_values, empty_copy, load_block, materialize
from ulbq.models.source import ModelSource
from ulbq.models.tables import embed_from_disk, tables_as_stored


class BlockWalk:
    """Samples, embedded, at the first block; and the blocks of the full-precision model, one in memory at a time.

    Args:
        model: a skeleton; it stays as it is.
        samples: those of this process.
        dtype: of the embeddings, the stored activations, the blocks and their arguments; None for the skeleton's own.
        device: where the embeddings are computed and the arguments of the blocks lie.
        limit: bytes of activations that may stay in memory.
        directory: for activations beyond the limit.
        batch_size: samples that are embedded at once.
        embeddings: read the table of tokens; without, every token's embedding is zero.

    Attributes:
        hidden: output of the embeddings, the input of block 0.
        block_kwargs: keyword arguments of each block (attention mask, position embeddings, …): one for all samples of
            text, and one for each sample of images. Blocks of one layer type share their tensors.
        extras: values that the block which ran last returned behind the hidden states; None where it returned no tuple.

    Raises:
        InputError: tokens beyond the vocabulary or the model's positions, or a model whose blocks are no plain chain,
            or that cannot take the samples' images.
        ResourceError: the disk has no room for the activations.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        samples: Samples,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        limit: int,
        directory: Path,
        batch_size: int = 8,
        embeddings: bool = True,
    ) -> None:
        tokens = samples.tokens
        _check_tokens(model, tokens)
        self._model, self._source, self._dtype, self._device = model, source, dtype, device
        self.extras: int | None = None
        self.block_kwargs: list[Arguments]
        self._between: dict[int, ActivationStore] = {}
        # Images come in the dtype that the whole model has.
        halved = dtype == torch.float32 and samples.inputs is None
        outer = _without_head(model, source, dtype, device, embeddings=embeddings, halved=halved)
        blocks = list(block_list(outer)[1])
        with torch.no_grad():
            # Where there are more processes than samples some have none: any tokens tell what blocks are called with.
            plain = samples.inputs is None and len(tokens) > 0
            sample = (tokens[:1] if plain else tokens.new_zeros(1, tokens.shape[1])).to(device)
            first = load_block(model, source, 0, dtype, device)
            recorded = record(outer, blocks, first, sample)
            self._first: nn.Module | None = first
            if recorded.hidden.shape[:-1] != sample.shape:  # several streams, as in Gemma 3n, or a prompt before
                raise no_chain(outer)
            shape = (tokens.shape[0], tokens.shape[1], recorded.hidden.shape[-1])
            self.hidden = ActivationStore(shape, dtype or model.dtype, limit=limit, directory=directory)
            if samples.inputs is not None:
                self.block_kwargs = self._record_each(outer, blocks, first, samples, directory)
                return
            self.block_kwargs = [*recorded.arguments]
            twice = record(outer, blocks, first, sample.repeat(2, 1))
            check_broadcast(outer, recorded.arguments[0], twice.arguments[0])
            for start in range(0, len(tokens), batch_size):
                self.hidden.set(start, embed(outer, blocks[0], tokens[start : start + batch_size].to(device)))

    def _record_each(
        self, outer: PreTrainedModel, blocks: Sequence[nn.Module], first: nn.Module, samples: Samples, directory: Path
    ) -> list[Arguments]:
        """Run every sample up to the blocks with its images; gives what each block is called with, by sample."""
        own: list[list[dict[str, Any]]] = [[] for _ in blocks]
        for row, inputs in enumerate(samples.inputs or ()):
            tokens = samples.tokens[row : row + 1].to(self._device)
            recorded = record(outer, blocks, first, tokens, inputs())
            if recorded.hidden.shape[:-1] != tokens.shape:
                raise no_chain(outer)
            self.hidden.set(row, recorded.hidden)
            seen: dict[int, torch.Tensor] = {}
            for calls, arguments in zip(own, recorded.arguments, strict=True):
                calls.append(moved(arguments, torch.device("cpu"), seen))
            for index, added in recorded.between.items():
                if index not in self._between:
                    # On disk: there may be several, each as large as the activations.
                    self._between[index] = ActivationStore(
                        self.hidden.shape, self.hidden.dtype, limit=0, directory=directory
                    )
                self._between[index].set(row, added)
        return [OnDevice(calls, self._device) for calls in own]

    def load(self, index: int) -> nn.Module:
        """A block in full precision, on the device. The first was read before, and is not read again.

        Raises:
            InputError: as :func:`ulbq.models.blocks.load_block`.
        """
        first, self._first = self._first, None
        if first is not None and index == 0:
            return first
        return load_block(self._model, self._source, index, self._dtype, self._device)

    def call(self, index: int, block: nn.Module, hidden: Hidden, first: int = 0) -> Hidden:
        """Output of a block on hidden states of any device, ``[batch, length, hidden]``; ``first`` is their sample."""
        rows = range(first, first + len(hidden))
        outputs = outputs_of(block, hidden.to(self._device), self.block_kwargs[index], rows)
        self.extras = len(outputs[0]) - 1 if isinstance(outputs[0], tuple) else None
        return joined(outputs)

    def add_between(self, index: int, *stores: ActivationStore) -> None:
        """Add, in place, what the model itself adds to the hidden states of images behind a block (DeepStack)."""
        added = self._between.pop(index, None)
        if added is None:
            return
        for row in range(len(added)):
            one = slice(row, row + 1)
            for store in stores:
                store.set(row, store.get(one) + added.get(one))

    @torch.no_grad()
    def advance(
        self,
        index: int,
        block: nn.Module,
        inputs: ActivationStore,
        outputs: ActivationStore,
        *,
        batch_size: int,
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Run all samples through a block.

        Args:
            index: of the block, for what it is called with.
            block: it, or what takes its place.
            inputs: before it.
            outputs: behind it; may be the inputs, which are overwritten then.
            batch_size: samples that run at once.
            context: what every batch runs in.
        """
        for start in range(0, len(inputs), batch_size):
            with context():
                result = self.call(index, block, inputs.get(slice(start, start + batch_size), self._device), start)
            outputs.set(start, result.float())


def _check_tokens(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens must be [samples, length], not {list(tokens.shape)}")
    config = model.config.get_text_config()
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"The samples hold token {min(low, 0) or high}, the model's vocabulary is 0 to {config.vocab_size - 1}.",
            hint="They were made with the tokenizer of another model.",
        )
    check_length(model, tokens.shape[1])


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse samples that are longer than the model's positions. Raises InputError."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise InputError(
            f"Samples of {length} tokens are longer than the model's {positions} positions.",
            hint=f"Use a sequence length of at most {positions}.",
        )


def _read_stored(source: ModelSource, name: str) -> torch.Tensor | None:
    """A parameter as it is stored, if its values are sound; None for one that another name stands for."""
    if name not in source.names:
        return None
    tensor = source.read(name)
    check_values(source, name, tensor)
    return tensor


def _without_head(
    model: PreTrainedModel,
    source: ModelSource,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    embeddings: bool,
    halved: bool,
) -> PreTrainedModel:
    """A copy of the skeleton that can run up to its last block; the head, often the largest part, stays on meta."""
    outer = empty_copy(model)
    if embeddings and dtype is None:
        embed_from_disk(outer, source.rows, outer.dtype, device, head=False)
    elif embeddings and halved:
        tables_as_stored(outer, partial(_read_stored, source), device, head=False)
    elif not embeddings:
        table = outer.get_input_embeddings()
        shape = table.get_parameter("weight").shape
        table.weight = nn.Parameter(torch.zeros(1, 1, dtype=dtype, device=device).expand(shape), False)
    head = outer.get_output_embeddings()
    heads = [f"{name}." for name, module in outer.named_modules() if head is not None and module is head]
    materialize(outer, source, dtype, device=device, without=(f"{block_list(outer)[0]}.", *heads))
    return outer

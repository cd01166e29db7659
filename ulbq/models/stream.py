"""Activations on their way through a model, one block in memory at a time."""

import copy
import inspect
import mmap
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.artifacts.disk import writing
from ulbq.errors import InputError
from ulbq.models.blocks import block_list, load_block, materialize
from ulbq.models.source import ModelSource

Hidden = torch.Tensor
"""Hidden states ``[batch, length, hidden]``."""


class ActivationStore:
    """A float tensor ``[samples, length, hidden]``, in memory up to a limit and in a memory-mapped file beyond it.

    Args:
        shape: ``(samples, length, hidden)``.
        dtype: of the stored values.
        limit: bytes that may stay in memory.
        directory: where the file lies if there has to be one; it has no name there, so that nothing is left behind.

    Raises:
        ResourceError: the disk has no room for the file.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, limit: int, directory: Path) -> None:
        self.shape = shape
        self.dtype = dtype
        self._limit = limit
        self._directory = directory
        self._map: mmap.mmap | None = None
        if self.nbytes <= limit:
            self._tensor = torch.empty(shape, dtype=dtype)
        else:
            self._map = _mapped_file(directory, self.nbytes)
            self._tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def in_memory(self) -> bool:
        """Whether the values are in memory rather than in a file."""
        return self._map is None

    def __len__(self) -> int:
        return self.shape[0]

    def get(self, indices: slice | Sequence[int] | torch.Tensor) -> Hidden:
        """Copy of some samples ``[n, length, hidden]``, on the CPU."""
        rows = self._tensor[indices]
        # A slice is a view, and later calls of set() must not show in it; lists of indices copy by themselves.
        taken = rows.clone() if isinstance(indices, slice) else rows
        self._release()
        return taken

    def set(self, start: int, values: Hidden) -> None:
        """Overwrite the samples from ``start`` on with ``[n, length, hidden]`` of any device and float dtype."""
        self._tensor[start : start + len(values)].copy_(values.detach())
        self._release()

    def copy(self) -> "ActivationStore":
        """A store of its own with the same values, limit and directory."""
        other = ActivationStore(self.shape, self.dtype, limit=self._limit, directory=self._directory)
        for start in range(len(self)):
            other.set(start, self.get(slice(start, start + 1)))
        return other

    def alike(self, length: int, width: int) -> "ActivationStore":
        """An empty store for as many samples of ``[length, width]``, with the same dtype, limit and directory."""
        shape = (len(self), length, width)
        return ActivationStore(shape, self.dtype, limit=self._limit, directory=self._directory)

    def _release(self) -> None:
        # The file's pages stay in the system's cache, which gives way under pressure, but leave our resident memory.
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_file(directory: Path, size: int) -> mmap.mmap:
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            # Reserved now: a full disk must be an error here, not a bus error at some later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)


class BlockStream:
    """Samples, embedded, at the door of the first block, and what every block is called with beside them.

    Args:
        model: a skeleton; it stays as it is.
        tokens: int64 ``[samples, length]``, no padding.
        dtype: of the embeddings, the stored activations and the arguments of the blocks.
        device: where the embeddings are computed and the arguments of the blocks lie.
        limit: bytes of activations that may stay in memory.
        directory: for activations beyond the limit.
        batch_size: samples that are embedded at once.

    Attributes:
        hidden: output of the embeddings, the input of block 0.
        block_kwargs: keyword arguments of each block (attention mask, position embeddings, …), of batch size 1 so
            that they broadcast over any batch. Blocks of one layer type share their tensors.

    Raises:
        InputError: tokens beyond the vocabulary or the model's positions, or a model whose blocks are no plain chain.
        ResourceError: the disk has no room for the activations.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        tokens: torch.Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device,
        limit: int,
        directory: Path,
        batch_size: int = 8,
    ) -> None:
        _check_tokens(model, tokens)
        outer = _without_head(model, source, dtype, device)
        blocks = list(block_list(outer)[1])
        with torch.no_grad():
            # Where there are more processes than samples some have none: any tokens tell what blocks are called with.
            sample = (tokens[:1] if len(tokens) else tokens.new_zeros(1, tokens.shape[1])).to(device)
            first = load_block(model, source, 0, dtype, device)
            self.block_kwargs = _arguments(outer, blocks, first, sample)
            _check_broadcast(outer, self.block_kwargs[0], _arguments(outer, blocks, first, sample.repeat(2, 1))[0])
            del first
            embed = partial(_embed, outer, blocks[0])
            width = embed(sample).shape[-1]
            shape = (tokens.shape[0], tokens.shape[1], width)
            self.hidden = ActivationStore(shape, dtype, limit=limit, directory=directory)
            for start in range(0, len(tokens), batch_size):
                self.hidden.set(start, embed(tokens[start : start + batch_size].to(device)))


def run_block(block: nn.Module, hidden: Hidden, kwargs: dict[str, Any]) -> Hidden:
    """Output ``[batch, length, hidden]`` of a block, whether it returns a tensor or a tuple that starts with it."""
    output = block(hidden, **kwargs)
    result: Hidden = output[0] if isinstance(output, tuple) else output
    return result


class _Arrived(Exception):
    """Carries hidden states out of a model's forward."""

    def __init__(self, hidden: Hidden) -> None:
        super().__init__()
        self.hidden = hidden


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


def _without_head(
    model: PreTrainedModel, source: ModelSource, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A copy of the skeleton that can run up to its last block; the head, often the largest part, stays on meta."""
    outer = copy.deepcopy(model)
    head = outer.get_output_embeddings()
    heads = [f"{name}." for name, module in outer.named_modules() if head is not None and module is head]
    materialize(outer, source, dtype, device=device, without=(f"{block_list(outer)[0]}.", *heads))
    return outer


def _arguments(
    outer: PreTrainedModel, blocks: Sequence[nn.Module], first: nn.Module, tokens: torch.Tensor
) -> list[dict[str, Any]]:
    """What each block is called with beside the hidden states, from one run in which no block does anything.

    ``first``, the real first block, is asked once what a block returns: some architectures take a tensor from their
    blocks, others a tuple. Everything else of the blocks, attributes included, stays in place.
    """
    recorded: list[dict[str, Any]] = []
    handed: Hidden | None = None
    rest: tuple[Any, ...] | None = None

    def take(index: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal handed, rest
        hidden, call = _split(first, args, kwargs)
        passed_on = handed is None or hidden is handed or torch.equal(hidden, handed)
        if index != len(recorded) or not passed_on:
            raise _no_chain(outer)
        recorded.append(call)
        handed = hidden
        if len(recorded) == len(blocks):
            raise _Arrived(hidden)
        if index == 0:
            output = first(hidden, **call)
            rest = output[1:] if isinstance(output, tuple) else None
        return hidden if rest is None else (hidden, *rest)

    for index, block in enumerate(blocks):
        block.forward = partial(take, index)
    try:
        _run(outer, tokens)
    finally:
        # `take` knows `outer`: left in place it would be a cycle that keeps the embeddings in memory.
        for block in blocks:
            del block.forward
    return recorded


def _embed(outer: PreTrainedModel, first: nn.Module, tokens: torch.Tensor) -> Hidden:
    """Hidden states ``[batch, length, hidden]`` as the first block gets them."""

    def arrive(*args: Any, **kwargs: Any) -> NoReturn:
        raise _Arrived(_split(first, args, kwargs)[0])

    first.forward = arrive
    return _run(outer, tokens)


def _split(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hidden, dict[str, Any]]:
    """A block's call as its hidden states and everything else by name."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    hidden: Hidden = call.pop(names[0])
    return hidden, call


def _check_broadcast(outer: PreTrainedModel, single: dict[str, Any], double: dict[str, Any]) -> None:
    """Refuse arguments that depend on the batch in another way than by a leading dimension of 1.

    Bloom is such a case: it folds the batch into the heads of its position biases.
    """
    for name, one in single.items():
        two = double[name]
        if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
            continue
        if one.ndim != two.ndim or any(a not in (1, b) for a, b in zip(one.shape, two.shape, strict=True)):
            raise InputError(
                f"Blocks of the model type '{outer.config.model_type}' take an argument, '{name}', whose shape "
                "is tied to the batch.",
                hint="ulbq cannot stream this architecture.",
            )


def _run(outer: PreTrainedModel, tokens: torch.Tensor) -> Hidden:
    """Run a model whose forward ends in :class:`_Arrived`."""
    try:
        outer(input_ids=tokens, use_cache=False)
    except _Arrived as arrived:
        return arrived.hidden
    raise _no_chain(outer)


def _no_chain(model: PreTrainedModel) -> InputError:
    return InputError(
        f"The model type '{model.config.model_type}' does not pass its hidden states straight from block to block.",
        hint="ulbq quantizes models whose decoder blocks form a plain chain.",
    )

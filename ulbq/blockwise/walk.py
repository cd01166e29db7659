"""One walk over the blocks of a model: each is read once, and all samples pass it before the next is read."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.blockwise.activations import ActivationStore, Hidden
from ulbq.errors import InputError
from ulbq.models.blocks import block_list, empty_copy, load_block, materialize
from ulbq.models.source import ModelSource


class BlockWalk:
    """Samples, embedded, at the first block; and the blocks of the full-precision model, one in memory at a time.

    Args:
        model: a skeleton; it stays as it is.
        tokens: int64 ``[samples, length]``, no padding.
        dtype: of the embeddings, the stored activations and the arguments of the blocks.
        device: where the embeddings are computed and the arguments of the blocks lie.
        limit: bytes of activations that may stay in memory.
        directory: for activations beyond the limit.
        batch_size: samples that are embedded at once.
        embeddings: read the table of tokens; without, every token's embedding is zero.

    Attributes:
        hidden: output of the embeddings, the input of block 0.
        block_kwargs: keyword arguments of each block (attention mask, position embeddings, …), of batch size 1 so
            that they broadcast over any batch. Blocks of one layer type share their tensors.
        extras: values that the block which ran last returned behind the hidden states; None where it returned no tuple.

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
        embeddings: bool = True,
    ) -> None:
        _check_tokens(model, tokens)
        self._model, self._source, self._dtype, self._device = model, source, dtype, device
        self.extras: int | None = None
        outer = _without_head(model, source, dtype, device, embeddings)
        blocks = list(block_list(outer)[1])
        with torch.no_grad():
            # Where there are more processes than samples some have none: any tokens tell what blocks are called with.
            sample = (tokens[:1] if len(tokens) else tokens.new_zeros(1, tokens.shape[1])).to(device)
            first = load_block(model, source, 0, dtype, device)
            self.block_kwargs = _arguments(outer, blocks, first, sample)
            _check_broadcast(outer, self.block_kwargs[0], _arguments(outer, blocks, first, sample.repeat(2, 1))[0])
            self._first: nn.Module | None = first
            embed = partial(_embed, outer, blocks[0])
            states = embed(sample)
            if states.shape[:-1] != sample.shape:  # several streams side by side, as in Gemma 3n, or a prompt before
                raise _no_chain(outer)
            shape = (tokens.shape[0], tokens.shape[1], states.shape[-1])
            self.hidden = ActivationStore(shape, dtype, limit=limit, directory=directory)
            for start in range(0, len(tokens), batch_size):
                self.hidden.set(start, embed(tokens[start : start + batch_size].to(device)))

    def load(self, index: int) -> nn.Module:
        """A block in full precision, on the device. The first was read before, and is not read again.

        Raises:
            InputError: as :func:`ulbq.models.blocks.load_block`.
        """
        first, self._first = self._first, None
        if first is not None and index == 0:
            return first
        return load_block(self._model, self._source, index, self._dtype, self._device)

    def call(self, index: int, block: nn.Module, hidden: Hidden) -> Hidden:
        """Output of a block on hidden states of any device, ``[batch, length, hidden]``."""
        output = block(hidden.to(self._device), **self.block_kwargs[index])
        self.extras = len(output) - 1 if isinstance(output, tuple) else None
        result: Hidden = output if self.extras is None else output[0]
        return result

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
                result = self.call(index, block, inputs.get(slice(start, start + batch_size)))
            outputs.set(start, result.float())


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
    model: PreTrainedModel, source: ModelSource, dtype: torch.dtype, device: torch.device, embeddings: bool
) -> PreTrainedModel:
    """A copy of the skeleton that can run up to its last block; the head, often the largest part, stays on meta."""
    outer = empty_copy(model)
    if not embeddings:
        table = outer.get_input_embeddings()
        shape = table.get_parameter("weight").shape
        table.weight = nn.Parameter(torch.zeros(1, 1, dtype=dtype, device=device).expand(shape), False)
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

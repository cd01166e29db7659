"""Runs of a model up to its blocks: what the first one gets, and what each is called with."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.blockwise.activations import Hidden
from ulbq.errors import InputError
from ulbq.models.skeleton import BUILD_ERRORS
from ulbq.printable import one_line


class _Arrived(Exception):
    """Carries hidden states out of a model's forward."""

    def __init__(self, hidden: Hidden) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass
class Passage:
    """One run in which no block does anything.

    Attributes:
        hidden: what the first block gets.
        arguments: what each block is called with beside it.
        between: what the model adds behind a block, by the block; where there are images.
    """

    hidden: Hidden
    arguments: list[dict[str, Any]] = field(default_factory=list)
    between: dict[int, Hidden] = field(default_factory=dict)


def record(
    outer: PreTrainedModel,
    blocks: Sequence[nn.Module],
    first: nn.Module,
    tokens: torch.Tensor,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Passage:
    """Run a model up to its last block with no block doing anything.

    ``first``, the real first block, is asked once what a block returns: some architectures take a tensor from their
    blocks, others a tuple. Everything else of the blocks, attributes included, stays in place. ``inputs`` are what the
    model takes beside the tokens; with them, it may add to what it passes on.
    """
    recorded = Passage(torch.empty(0))
    handed: Hidden | None = None
    rest: tuple[Any, ...] | None = None

    def take(index: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal handed, rest
        hidden, call = _split(first, args, kwargs)
        if index != len(recorded.arguments):
            raise no_chain(outer)
        if handed is None:
            recorded.hidden = hidden
        elif hidden is not handed and not torch.equal(hidden, handed):
            if inputs is None or hidden.shape != handed.shape:
                raise no_chain(outer)
            recorded.between[index - 1] = hidden - handed
        recorded.arguments.append(call)
        handed = hidden
        if len(recorded.arguments) == len(blocks):
            raise _Arrived(hidden)
        if index == 0:
            output = first(hidden, **call)
            rest = output[1:] if isinstance(output, tuple) else None
        return hidden if rest is None else (hidden, *rest)

    for index, block in enumerate(blocks):
        block.forward = partial(take, index)
    try:
        _run(outer, tokens, inputs)
    finally:
        # `take` knows `outer`: left in place it would be a cycle that keeps the embeddings in memory.
        for block in blocks:
            del block.forward
    return recorded


def embed(outer: PreTrainedModel, first: nn.Module, tokens: torch.Tensor) -> Hidden:
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


def check_broadcast(outer: PreTrainedModel, single: dict[str, Any], double: dict[str, Any]) -> None:
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


def _run(outer: PreTrainedModel, tokens: torch.Tensor, inputs: Mapping[str, torch.Tensor] | None = None) -> Hidden:
    """Run a model whose forward ends in :class:`_Arrived`."""
    known = inspect.signature(type(outer).forward).parameters
    beside = {
        name: value.to(tokens.device, outer.dtype if value.is_floating_point() else value.dtype)
        for name, value in (inputs or {}).items()
        if name in known
    }
    try:
        outer(input_ids=tokens, use_cache=False, **beside)
    except _Arrived as arrived:
        return arrived.hidden
    except torch.OutOfMemoryError:
        raise
    except BUILD_ERRORS as error:
        if inputs is None:
            raise
        cause = one_line(f"{type(error).__name__}: {error}")
        raise InputError(
            f"The model type '{outer.config.model_type}' does not take what its processor makes of images ({cause}).",
            hint="Calibrate on text: a model of images takes it too.",
        ) from error
    raise no_chain(outer)


def no_chain(model: PreTrainedModel) -> InputError:
    return InputError(
        f"The model type '{model.config.model_type}' does not pass its hidden states straight from block to block.",
        hint="ulbq quantizes models whose decoder blocks form a plain chain.",
    )

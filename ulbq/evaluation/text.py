"""Windows of token ids for perplexity and fidelity, and how many of them a device takes at once."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ulbq.blockwise.streamed import StreamedModel
from ulbq.data.windows import leading_tokens, token_stream
from ulbq.errors import InputError, ResourceError
from ulbq.models.config import cache_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ulbq.blockwise.streamed import AnyModel

_CPU_LOGITS = 512 << 20  # bytes that the logits of one batch may take on a CPU, where larger batches gain nothing
_CPU_CACHE = 1 << 30  # bytes that keys and values of one batch may take on a CPU
_CPU_SEQUENCES = 32
_GPU_SEQUENCES = 64
_LOGIT_BYTES = 6  # bytes a logit: bf16 as the model gives it, float32 as it is scored


def text_windows(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    limit: int | None = None,
    bos: bool = False,
    name: str = "The text",
) -> torch.Tensor:
    r"""Consecutive, non-overlapping windows of texts joined with blank lines and tokenised once.

    Args:
        texts: joined with ``"\n\n"``; read only as far as ``limit`` windows need.
        tokenizer: the model's own.
        context: tokens a window.
        limit: at most this many windows; None: all that fit.
        bos: where the tokenizer puts a beginning-of-text token before a text, put it before every window (what a
            model sees at inference) instead of once before the whole text (the published perplexity protocol).
        name: what the error calls the text.

    Returns:
        int64 ``[windows, context]``; tokens that do not fill a window are left out.

    Raises:
        InputError: the text does not fill one window.
    """
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    length = context - len(leading) if bos else context
    stream = token_stream(texts, tokenizer, sys.maxsize if limit is None else limit * length)
    if not bos:
        stream = torch.cat([leading, stream])
    count = stream.numel() // length
    if limit is not None:
        count = min(count, limit)
    if not count:
        raise InputError(
            f"{name} holds {stream.numel():,} tokens, which do not fill one window of {context:,}.",
            hint="Lower `context`.",
        )
    windows = stream[: count * length].view(count, length)
    return torch.cat([leading.expand(count, -1), windows], dim=1) if bos else windows


def tokens_per_batch(model: "AnyModel") -> int:
    """Tokens that one batch may hold: their logits take 512 MiB on a CPU, a quarter of a GPU's free memory."""
    device = model.device
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _CPU_LOGITS
    return max(1, room // (int(model.config.get_text_config().vocab_size) * _LOGIT_BYTES))


def sequences_per_batch(model: "AnyModel", tokens: int) -> int:
    """Sequences of ``tokens`` tokens, written ones included, to write side by side.

    As many as have their keys and values, twice over because a growing cache is copied, in 1 GiB on a CPU, in a quarter
    of the free memory on a GPU. But no more than are of use: finished answers wait for the longest one beside them.
    """
    device = model.device
    each = 2 * cache_bytes(model.config, model.dtype.itemsize) * tokens
    room, most = _CPU_CACHE, _CPU_SEQUENCES
    if device.type == "cuda":
        room, most = torch.cuda.mem_get_info(device)[0] // 4, _GPU_SEQUENCES
    return max(1, min(most, room // each))


def predictions(
    model: "AnyModel", windows: torch.Tensor, batch_size: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of windows and the model's logits for them, which a streamed model makes once all passed its blocks.

    Args:
        model: in eval mode.
        windows: int64 ``[n, t]``.
        batch_size: windows a batch; None: as many as the device's memory takes.

    Returns:
        Pairs of ``[b, t]`` on the model's device and :func:`logits_of` them.
    """
    size = batch_size or max(1, tokens_per_batch(model) // windows.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(windows), size)]
    if isinstance(model, StreamedModel):
        passed = model.pass_blocks(windows, size, head_on_disk=True)
        return ((windows[rows].to(model.device), passed.logits(rows)) for rows in parts)
    return ((batch, logits_of(model, batch)) for batch in (windows[rows].to(model.device) for rows in parts))


def logits_of(model: "PreTrainedModel", tokens: torch.Tensor) -> torch.Tensor:
    """The model's logits ``[b, t, vocabulary]`` in its own dtype, for token ids ``[b, t]``.

    Raises:
        ResourceError: the device has no memory for them.
    """
    try:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The device has no memory for {tokens.shape[0]} windows of {tokens.shape[1]} tokens.",
            hint="Lower `batch_size` or `context`, or use `device=cpu`.",
        ) from error
    return logits

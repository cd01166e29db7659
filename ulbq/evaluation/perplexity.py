"""Perplexity, the standard protocol of the quantization literature (GPTQ and since)."""

import math
from typing import TYPE_CHECKING

import torch

from ulbq import distributed
from ulbq.errors import NumericsError, UsageError
from ulbq.evaluation.results import Perplexity
from ulbq.evaluation.text import predictions
from ulbq.progress import Progress, Silent

if TYPE_CHECKING:
    from ulbq.blockwise.streamed import AnyModel

_CHUNK = 256  # positions scored in float32 at a time: a whole window of a large vocabulary would take gigabytes


@torch.inference_mode()
def perplexity(
    model: "AnyModel",
    windows: torch.Tensor,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "Perplexity",
) -> Perplexity:
    """Perplexity of a causal language model over windows of text.

    Every token of a window but its first is predicted from those before it in the same window. Likelihoods are taken in
    float32 and summed in float64, whatever the model computes in. Several processes take turns with the windows.

    Args:
        model: in eval mode, on its device.
        windows: int64 ``[n, context]``, see :func:`ulbq.evaluation.text.text_windows`.
        batch_size: windows a batch; None: as many as the device's memory takes.
        progress: told about every window.
        label: what the progress calls the work.

    Raises:
        UsageError: windows of less than two tokens predict nothing.
        NumericsError: logits that are not finite.
        ResourceError: a batch does not fit into the device's memory.
    """
    count, context = windows.shape
    if context < 2:
        raise UsageError("A window of one token predicts nothing.", hint="Raise `context`.")
    total, tokens = 0.0, 0
    own = distributed.own(windows)
    predicted = predictions(model, own, batch_size)
    with (progress or Silent()).phase(label, len(own)) as phase:
        for batch, logits in predicted:
            total += negative_log_likelihood(logits[:, :-1], batch[:, 1:])
            tokens += len(batch) * (context - 1)
            phase.advance(len(batch), f"{_perplexity(total, tokens):.2f}")
    total, everything = distributed.total(total, tokens)
    return Perplexity(value=_perplexity(total, everything), windows=count, context=context, tokens=int(everything))


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum over all positions, in nats: logits ``[b, t, vocabulary]`` of any float dtype, targets int64 ``[b, t]``."""
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    pieces = zip(flat.split(_CHUNK), wanted.split(_CHUNK), strict=True)
    losses = [torch.nn.functional.cross_entropy(piece.float(), ids, reduction="none") for piece, ids in pieces]
    return float(torch.cat(losses).sum(dtype=torch.float64))


def _perplexity(total: float, tokens: float) -> float:
    try:
        value = math.exp(total / tokens)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise NumericsError("The model's logits are not finite: it has no perplexity.", hint="Try `dtype=fp32`.")
    return value

"""The end of a model: from hidden states behind the last block to the loss, and back."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.blockwise.end import ModelEnd
from ulbq.models.source import ModelSource
from ulbq.runtime import logits_room
from ulbq.training.precision import Precision

HEAD_MEMORY = 256 << 20
"""Bytes that the logits of one chunk may take on a CPU, with all that is made of them."""

# Float32 copies that live together: logits, what caps or scales them, log-probabilities, gradient.
_COPIES = 4


def head_memory(vocabulary: int, positions: int, device: torch.device) -> int:
    """Bytes that the logits of one chunk take, of so many positions at most."""
    return min(logits_room(device, HEAD_MEMORY), vocabulary * 4 * _COPIES * max(16, positions))


class LossHead:
    """Final norm, head and cross-entropy of a model, float32; a long sequence goes through in chunks.

    Args:
        model: a skeleton; it stays as it is.
        precision: of the head's product; the loss is float32.
        extras: values that a block returns behind the hidden states; None where it returns no tuple.

    Attributes:
        chunk: positions that may go through at once.

    Raises:
        InputError, NumericsError: as :func:`ulbq.models.blocks.materialize`.
    """

    def __init__(
        self, model: PreTrainedModel, source: ModelSource, precision: Precision, *, extras: int | None
    ) -> None:
        self._precision = precision
        self._end = ModelEnd(model, source, torch.float32, precision.device, extras=extras)
        vocabulary = model.config.get_text_config().vocab_size
        self.chunk = max(16, logits_room(precision.device, HEAD_MEMORY) // (vocabulary * 4 * _COPIES))

    def gradient(
        self, hidden: torch.Tensor, tokens: torch.Tensor, drawn: torch.Generator | None = None
    ) -> tuple[float, torch.Tensor]:
        """Loss of one sequence, and its gradient.

        Args:
            hidden: ``[1, length, hidden]``, float32, on the device.
            tokens: int64 ``[1, length]``, on the device.
            drawn: draws what follows each token by the model's own predictions, in the place of the text's own, on
                the device; None for the text's own.

        Returns:
            The mean cross-entropy of the ``length - 1`` predicted tokens, and ``[1, length, hidden]`` float32.
        """
        predicted = tokens.shape[1] - 1
        gradient = torch.zeros_like(hidden)
        loss = 0.0
        for start in range(0, predicted, self.chunk):
            stop = min(start + self.chunk, predicted)
            part = hidden[:, start:stop].detach().requires_grad_()
            logits = self._logits(part)[0].float()
            following = tokens[0, start + 1 : stop + 1]
            if drawn is not None:
                following = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
            entropy = nn.functional.cross_entropy(logits, following, reduction="sum")
            entropy = entropy / predicted
            (gradient[:, start:stop],) = torch.autograd.grad(entropy, part)
            loss += entropy.item()
        return loss, gradient

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, vocabulary]`` float32 of hidden states ``[n, hidden]`` float32 behind the last block."""
        return self._logits(hidden.unsqueeze(0))[0].float()

    @torch.no_grad()
    def gains(self, hidden: torch.Tensor) -> tuple[str, ...]:
        """Full names of the vectors by which the logits can be scaled: the last norm's.

        They are found by what they do, on some hidden states ``[n, hidden]``: each changes the logits, and twice all of
        them give twice the logits. Empty where that is not so, as with logits that are soft-capped.
        """
        before, found = self.logits(hidden), []
        for name, vector in self._end.vectors.items():
            kept = vector.clone()
            vector.mul_(2)
            if not torch.equal(self.logits(hidden), before):
                found.append((name, kept))
            vector.copy_(kept)
        for name, kept in found:
            self._end.vectors[name].copy_(2 * kept)
        doubled = self.logits(hidden)
        for name, kept in found:
            self._end.vectors[name].copy_(kept)
        exact = (doubled - 2 * before).abs().max() <= 1e-2 * before.abs().max()
        return tuple(name for name, _ in found) if exact else ()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._precision.autocast():
            return self._end.logits(hidden)

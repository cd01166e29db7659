"""The text of an end-to-end training: which samples train, and which of their tokens are to be learnt."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """A few samples, cut behind the last token that any of them has to learn.

    A block sees nothing of what comes after a token, so what fills the shorter samples up needs no attention mask; it
    only must not count.

    Attributes:
        tokens: int64 ``[batch, length]``.
        counted: bool ``[batch, length]``, positions whose prediction counts.
        following: int64 ``[batch, length]``, the token that comes next; -100 where a sample ends.
    """

    tokens: torch.Tensor
    counted: torch.Tensor
    following: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.tokens.to(device), self.counted.to(device), self.following.to(device))


class Samples:
    """Token samples.

    Args:
        tokens: int64 ``[samples, length]``.
        training: the first so many rows train, the others are held out.
        taught: bool ``[samples, length]``, tokens that are to be learnt; None for all.

    Attributes:
        counted: bool ``[samples, length]``, positions whose prediction counts: those before a token that is to be
            learnt, and the last one of a sample that is to be learnt to its end. A teacher has an opinion about what
            comes after that too; the text has none.
    """

    def __init__(self, tokens: torch.Tensor, training: int, taught: torch.Tensor | None = None) -> None:
        self.tokens = tokens
        self.training = training
        taught = torch.ones_like(tokens, dtype=torch.bool) if taught is None else taught
        self.counted = torch.cat([taught[:, 1:], taught[:, -1:]], 1)
        ends = torch.arange(1, tokens.shape[1] + 1)
        self._lengths = (taught * ends).amax(1)

    def batch(self, indices: torch.Tensor) -> Batch:
        """Some samples, as short as they may be."""
        length = int(self._lengths[indices].max())
        tokens = self.tokens[indices]
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
        return Batch(tokens[:, :length], self.counted[indices, :length], following[:, :length])

    def predictions(self, indices: torch.Tensor) -> int:
        """How many predictions of some samples count."""
        return int(self.counted[indices].sum())

"""The examples of a training: which of them train, and which of their tokens the loss counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100
"""What follows where nothing follows; the label that cross-entropies leave out."""


@dataclass(frozen=True)
class Batch:
    """A few examples, cut behind the last token that any of them has to learn.

    A block sees nothing of what comes after a token, so the padding of the shorter examples needs no attention mask; it
    only must not count.

    Attributes:
        tokens: int64 ``[batch, length]``.
        counted: bool ``[batch, length]``, positions whose prediction counts.
        following: int64 ``[batch, length]``, the token that comes next; -100 where an example ends.
    """

    tokens: torch.Tensor
    counted: torch.Tensor
    following: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.tokens.to(device), self.counted.to(device), self.following.to(device))


class Examples:
    """Examples of one length or of many.

    Args:
        tokens: int64 ``[length]`` of each.
        training: the first so many train, the others validate.
        masks: bool ``[length]`` of each, tokens that are to be learnt; None for all.
        padding: token behind the ends of the shorter ones.

    Attributes:
        tokens: as given.
        training: as given.
        length: of the longest.
        ragged: whether batches differ in length.
    """

    def __init__(
        self,
        tokens: Sequence[torch.Tensor] | torch.Tensor,
        training: int,
        masks: Sequence[torch.Tensor] | torch.Tensor | None = None,
        *,
        padding: int = 0,
    ) -> None:
        self.tokens = tokens
        self.training = training
        self.length = max(len(own) for own in tokens)
        self._padding = padding
        masks = [torch.ones_like(own, dtype=torch.bool) for own in tokens] if masks is None else masks
        # The position before a token that is to be learnt, and the last one of an example that is to be learnt to its
        # end: what comes after that, a teacher knows too.
        self._counted = [torch.cat([mask[1:], mask[-1:]]) for mask in masks]
        self._predictions = torch.tensor([int(counted.sum()) for counted in self._counted])
        self._lengths = torch.tensor([int((mask * torch.arange(1, len(mask) + 1)).max()) for mask in masks])
        self.ragged = bool((self._lengths != self._lengths[0]).any())

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: torch.Tensor) -> Batch:
        """Some examples, as short as they may be."""
        length = int(self._lengths[indices].max())
        tokens = torch.full((len(indices), length), self._padding)
        following = torch.full((len(indices), length), IGNORED)
        counted = torch.zeros((len(indices), length), dtype=torch.bool)
        for row, index in enumerate(indices.tolist()):
            own, coming = self.tokens[index][:length], self.tokens[index][1 : length + 1]
            tokens[row, : len(own)] = own
            following[row, : len(coming)] = coming
            counted[row, : len(own)] = self._counted[index][:length]
        return Batch(tokens, counted, following)

    def predictions(self, indices: torch.Tensor) -> int:
        """How many predictions of some examples count."""
        return int(self._predictions[indices].sum())

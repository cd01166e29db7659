"""Lessons side by side, and the order in which the processes of a run take them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from ulbq.data.lessons import Lesson

IGNORED = -100
"""The label of what is not learnt, which transformers' losses leave out."""

_EMPTY = Lesson([0], [False])


class Batch(NamedTuple):
    """Lessons side by side, filled up at their ends, where nothing that counts looks back at.

    Attributes:
        tokens: int64 ``[n, longest]``.
        labels: int64 of the same shape, the token where it is learnt, else -100.
    """

    tokens: torch.Tensor
    labels: torch.Tensor


def batch(lessons: Sequence[Lesson], filler: int) -> Batch:
    """Put lessons side by side; ``filler`` is the token behind their ends."""
    shape = (len(lessons), max(len(lesson.tokens) for lesson in lessons))
    tokens, labels = torch.full(shape, filler, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
    for row, lesson in enumerate(lessons):
        own = torch.tensor(lesson.tokens)
        tokens[row, : len(own)] = own
        labels[row, : len(own)] = torch.where(torch.tensor(lesson.taught), own, IGNORED)
    labels[:, 0] = IGNORED  # nothing stands before it
    return Batch(tokens, labels)


class Listed(Dataset[Lesson]):
    """Lessons, and behind them empty ones that fill up the last micro-batches of all processes.

    Left to itself, accelerate would fill up with lessons from the epoch's beginning, which would count twice.
    """

    def __init__(self, lessons: Sequence[Lesson], multiple: int) -> None:
        self.count = len(lessons)
        self._lessons = [*lessons, *[_EMPTY] * (-len(lessons) % multiple)]

    def __len__(self) -> int:
        return len(self._lessons)

    def __getitem__(self, index: int) -> Lesson:
        return self._lessons[index]


class Order(Sampler[int]):
    """Numbers of the lessons, in an order of each epoch's own; those of the empty ones come last."""

    def __init__(self, listed: Listed, seed: int) -> None:
        self._listed = listed
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._listed)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from torch.randperm(self._listed.count, generator=generator).tolist()
        yield from range(self._listed.count, len(self._listed))

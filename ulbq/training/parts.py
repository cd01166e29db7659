"""What trains in a block, and how several processes share the steps of its optimizer.

Every process runs the block on samples of its own, so each has gradients for all of it. Of their sums, of the
optimizer's moments and of snapshots it may have a part alone (ZeRO, https://arxiv.org/abs/1910.02054): those of the
values that it moves for all. Weights stay whole in every process, as the block had to be when it was read and solved.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ulbq import distributed
from ulbq.training.optimizer import Group, clip_gradients, restore, snapshot
from ulbq.training.sharding import clip_parts

_SMALL = 1 / 64
"""Of the largest parameter: below that a gradient may be whole until all went back."""


class Trained:
    """Parameters that train together, whole in every process.

    Args:
        groups: the optimizer's.

    Attributes:
        groups: of what the optimizer moves in this process.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self._moved = [p for group in groups for p in group.parameters]

    def went_back(self) -> None:
        """Told after each backward pass of a step; all processes take part, those without samples too."""

    def settle(self, largest: float) -> None:
        """Have the gradients of all processes added up, and their norm clipped to ``largest``; 0 for no limit."""
        distributed.sum_gradients(self._moved)
        if largest:
            clip_gradients(self._moved, largest)

    def forget(self) -> None:
        """Drop gradients that were not added up."""
        for parameter in self._moved:
            parameter.grad = None

    def moved(self) -> None:
        """Told when the values in :attr:`groups` were changed."""

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of the values that this process moves."""
        return snapshot(self._moved)

    def restore(self, values: Sequence[torch.Tensor]) -> None:
        """Put back what :meth:`snapshot` gave, and drop what gradients are left."""
        restore(self._moved, values)
        self.moved()

    def close(self) -> None:
        """The parameters train no more."""


class SplitTrained(Trained):
    """The same with a part of every parameter moved by each process.

    A gradient is added up as soon as the way back has left it, so that few are whole at a time. All processes talk
    about the parameters in one order; what is ready before its turn waits. So a process may lack gradients that others
    have: it had no samples, or its tokens went to other experts of a mixture.

    Args:
        groups: the optimizer's.
        module: that the parameters are of.
    """

    def __init__(self, groups: Sequence[Group], module: nn.Module) -> None:
        found = {p: _Part(p) for group in groups for p in group.parameters}
        super().__init__([Group([found[p].values for p in g.parameters], g.lr, g.weight_decay) for g in groups])
        # About as the way back comes by. What is small can wait: vectors are registered anywhere, and a step may leave
        # adapters out, so that whatever came behind them would wait as well.
        back, largest = list(module.parameters())[::-1], max(p.numel() for p in found)
        back.sort(key=lambda p: p.dim() < 2 or p.numel() < _SMALL * largest)
        self._parts = [found[p] for p in back if p in found]
        self._known = torch.zeros(len(found), device=self._parts[0].values.device)
        self._next = 0
        self._hooks = [p.register_post_accumulate_grad_hook(lambda _: self._add_ready()) for p in found]
        self.moved()  # sums in another order may have had each process start elsewhere

    def went_back(self) -> None:
        self._add_ready(every=True)
        self._next = 0

    def _add_ready(self, *, every: bool = False) -> None:
        while self._next < len(self._parts):
            part = self._parts[self._next]
            if part.whole.grad is None and not every:
                return
            self._known[self._next] += part.whole.grad is not None
            part.add_gradient()
            self._next += 1

    def settle(self, largest: float) -> None:
        distributed.sum_(self._known)
        # An optimizer treats no gradient otherwise than one of zeros.
        for part, known in zip(self._parts, self._known.tolist(), strict=True):
            if not known or not len(part.values):
                part.values.grad = None
        self._known.zero_()
        if largest:
            clip_parts(self._moved, largest)

    def forget(self) -> None:
        raise RuntimeError("the other processes have added these gradients to theirs")

    def moved(self) -> None:
        for part in self._parts:
            part.spread()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Part:
    """One process's stretch of a parameter: of as many equal ones as there are processes, the last ones cut short.

    Attributes:
        whole: the parameter.
        values: those of the stretch, ``[n]``, in the same memory.
    """

    def __init__(self, whole: nn.Parameter) -> None:
        self.whole = whole
        whole.data = whole.data.contiguous()
        self._length = -(-whole.numel() // distributed.size())
        self._beyond = self._length * distributed.size() - whole.numel()
        begin = distributed.rank() * self._length
        self.values = nn.Parameter(whole.detach().view(-1)[begin : begin + self._length])

    def add_gradient(self) -> None:
        """Add all processes' gradients of the parameter to the stretch's; none is left of the whole."""
        gradient = torch.zeros_like(self.whole) if self.whole.grad is None else self.whole.grad
        self.whole.grad = None
        own = distributed.sum_of_own(_longer(gradient.reshape(-1), self._beyond))[: len(self.values)]
        self.values.grad = own if self.values.grad is None else self.values.grad.add_(own)

    @torch.no_grad()
    def spread(self) -> None:
        """Have all processes take over each one's stretch."""
        flat = self.whole.view(-1)
        every = _longer(flat, self._beyond)
        distributed.join_own(_longer(self.values, self._length - len(self.values)), every)
        if every is not flat:
            flat.copy_(every[: len(flat)])


def _longer(values: torch.Tensor, by: int) -> torch.Tensor:
    """A vector with so many zeros behind it."""
    return nn.functional.pad(values, (0, by)) if by else values

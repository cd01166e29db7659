"""How a format takes part in :mod:`ulbq.kernels.ops.linear`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch


class Matrix(Protocol):
    """A matrix ``[out, in]`` in one of the forms."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, out]`` of inputs ``[n, in]``, in their dtype."""
        ...

    def input_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, in]`` of the gradient ``[n, out]``, in its dtype or a wider one."""
        ...


class Operands(NamedTuple):
    """What of a format's matrices goes through the operator.

    Attributes:
        names: of a form's tensors, in order; those that a matrix does not have are left out.
        numbers: what tells a scheme, given it and the inputs of the matrix.
        matrix: the matrix again, of these numbers, the form, its tensors, outputs and inputs.
    """

    names: Callable[[str], tuple[str, ...]]
    numbers: Callable[[Any, int], list[int]]
    matrix: Callable[[list[int], str, list[torch.Tensor], int, int], Matrix]

"""The loops of the closed-form solvers on the CPU, compiled (``portable/``): one pass over memory instead of many.

Each function has its reference in torch, which serves other devices and machines without a compiler, and says what is
computed. Results differ only where two ways to round are equally good to float32.
"""

import ctypes
from typing import NamedTuple

import torch

from ulbq.formats import UniformScheme
from ulbq.kernels.build import solvers, solvers_unavailable_reason

SLOWER = "some 40 times as long"
"""What a search takes where its solvers are not compiled."""


def slow_reason(device: torch.device) -> str | None:
    """Why solvers on a device go the slow way, for people; None where they do not."""
    return solvers_unavailable_reason() if device.type == "cpu" else None


class Ranges(NamedTuple):
    """The grids among which a group's is looked for.

    Attributes:
        scheme: bits and symmetry.
        floor: smallest scale.
        factors: ``[n]`` float32 shares of the range, in the order in which they are tried.
    """

    scheme: UniformScheme
    floor: float
    factors: torch.Tensor

    def arguments(self) -> tuple[float, float, float, int, int]:
        """As the library takes them."""
        centre = self.scheme.centre if self.scheme.symmetric else -1.0
        return self.floor, 2.0**self.scheme.bits - 1, centre, self.factors.data_ptr(), len(self.factors)


class Codes(NamedTuple):
    """``[out, in]`` uint8 codes, float32 ``[out, G]`` scales and zero points, and whether all errors are finite."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    finite: bool


def take(*tensors: torch.Tensor | None) -> bool:
    """Whether tensors are what the compiled loops read, and there are such loops."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given) and solvers_unavailable_reason() is None
    )


def round_to_nearest(
    weight: torch.Tensor, group_size: int, ranges: Ranges, importance: torch.Tensor | None = None
) -> Codes:
    """Grids and codes as :func:`ulbq.solvers.rtn.round_to_nearest` finds them.

    Args:
        weight: ``[out, in]`` float32 with any strides.
        group_size: divides ``in``.
        ranges: to be tried.
        importance: ``[in]`` float32, or None.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = (torch.empty(rows, columns // group_size, dtype=torch.float32) for _ in range(2))
    importance = None if importance is None else importance.contiguous()
    failed = ctypes.c_int(0)
    solvers().ulbq_round_to_nearest(
        *(weight.data_ptr(), rows, columns, *weight.stride()),
        *(None if importance is None else importance.data_ptr(), group_size, *ranges.arguments()),
        *(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), ctypes.addressof(failed), torch.get_num_threads()),
    )
    return Codes(codes, scales, zeros, not failed.value)


def search_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    group_size: int,
    *,
    floor: float,
    fractions: torch.Tensor,
    refits: int,
) -> torch.Tensor:
    """Dual-binary scales ``[2, out, G]`` as :func:`ulbq.quantizers.dual_binary.search_scales` finds them.

    Args:
        weight: ``[out, in]`` float32 with any strides.
        importance: ``[in]`` float32.
        group_size: divides ``in``.
        floor: least magnitude.
        fractions: ``[n]`` float32, steps to try as shares of the largest magnitude.
        refits: least squares fits after the search.
    """
    rows, columns = weight.shape
    scales = torch.empty(2, rows, columns // group_size, dtype=torch.float32)
    importance, fractions = importance.contiguous(), fractions.contiguous()
    solvers().ulbq_search_scales(
        *(weight.data_ptr(), rows, columns, *weight.stride()),
        *(importance.data_ptr(), group_size, floor, fractions.data_ptr(), len(fractions), refits),
        *(scales.data_ptr(), torch.get_num_threads()),
    )
    return scales


class Block(NamedTuple):
    """What became of a block of columns.

    Attributes:
        codes: ``[b, out]`` uint8.
        errors: ``[b, out]`` float32, over the factor's diagonal.
        loss: sum of their squares.
        finite: whether all grids that were looked for have a finite error.
    """

    codes: torch.Tensor
    errors: torch.Tensor
    loss: float
    finite: bool


_ROWS = 32  # that have a loss of their own


def compensate(
    block: torch.Tensor,
    upper: torch.Tensor,
    groups: torch.Tensor,
    grids: tuple[torch.Tensor, torch.Tensor],
    ranges: Ranges,
    importance: torch.Tensor,
    group_size: int,
) -> Block:
    """Quantize a block of columns one after the other, each error made good in the block's later columns (GPTQ).

    Args:
        block: ``[b, out]`` float32, contiguous; changed in place to what each column was when its turn came.
        upper: ``[b, b]`` float32 diagonal block of the factor, contiguous.
        groups: ``[b]`` int64 group of each column.
        grids: scales and zero points ``[G, out]`` float32, contiguous.
        ranges: to find a group's grid from when its first column's turn comes, written into ``grids``; the columns of
            a group then lie side by side, all of them in the block. Without factors the grids are taken as they are.
        importance: ``[b]`` float32, contiguous.
        group_size: columns in a group.
    """
    count, rows = block.shape
    codes, errors = torch.empty(count, rows, dtype=torch.uint8), torch.empty(count, rows, dtype=torch.float32)
    losses = torch.empty(-(-rows // _ROWS), dtype=torch.float64)
    failed = ctypes.c_int(0)
    scales, zeros = grids
    solvers().ulbq_compensate(
        *(block.data_ptr(), rows, count, upper.data_ptr(), upper.stride(0)),
        *(groups.data_ptr(), scales.data_ptr(), zeros.data_ptr()),
        *(importance.data_ptr(), group_size, *ranges.arguments()),
        *(codes.data_ptr(), errors.data_ptr(), losses.data_ptr(), ctypes.addressof(failed), torch.get_num_threads()),
    )
    return Block(codes, errors, losses.sum().item(), not failed.value)


def trellis_codes(
    sequences: torch.Tensor, bits: int, state_bits: int, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 and what they stand for, ``[n, length]`` both, as :func:`ulbq.solvers.trellis.search` finds them.

    Args:
        sequences: ``[n, length]`` float32, contiguous.
        bits, state_bits: of an element, and of a state.
        values: ``[2^state_bits]`` float32, of the states.
    """
    codes, found = torch.empty(sequences.shape, dtype=torch.uint8), torch.empty_like(sequences)
    solvers().ulbq_trellis(
        *(sequences.data_ptr(), *sequences.shape, bits, state_bits, values.data_ptr()),
        *(codes.data_ptr(), found.data_ptr(), torch.get_num_threads()),
    )
    return codes, found

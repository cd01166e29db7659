"""What affine codes and bit planes share: a matrix in one of the forms, and products with it.

A matrix comes in one of four forms: ``planes`` are the tensors as artifacts store them, on any device; ``tiles`` are
those of :mod:`ulbq.kernels.tiles`, for the CPU; ``words`` those of :mod:`ulbq.kernels.words`, for GPUs; ``bytes`` those
of :mod:`ulbq.kernels.byte_codes`. No product keeps a dense weight, or makes more of it at a time than a slab: some
outputs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ulbq.formats import AffineScheme, AnyScheme
from ulbq.kernels import byte_codes, tiles, triton_launch, words

Slabs = Iterator[tuple[slice, torch.Tensor]]

_PREFIXES = {"planes": "", "tiles": "tiled_", "words": "word_", "bytes": "byte_"}


def named(form: str, *names: str) -> tuple[str, ...]:
    """Names of codes, scales and zero points in a form."""
    return tuple(f"{_PREFIXES[form]}{name}" for name in names)


class Dense(NamedTuple):
    """A matrix ``[out, in]``.

    Attributes:
        slabs: gives slabs of the dense weight in a dtype.
        tiled: its tiles, where it lies in tiles.
        part: what the Triton kernels take, where it lies in words.
        codes: codes, scales and zero points, where it lies in bytes.
    """

    out_features: int
    in_features: int
    slabs: Callable[[torch.dtype], Slabs]
    tiled: tuple[dict[str, torch.Tensor], tiles.Shape] | None = None
    part: triton_launch.Part | None = None
    codes: tuple[torch.Tensor, torch.Tensor, torch.Tensor | float] | None = None

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, out]`` of inputs ``[n, in]``, in their dtype."""
        if self.tiled is not None and len(rows) <= tiles.most_rows(rows.dtype):
            return tiles.multiply(rows, *self.tiled)
        if self.part is not None and rows.dtype in triton_launch.FLOATS:
            return triton_launch.multiply(rows, [self.part], self.out_features)
        if self.codes is not None and byte_codes.takes(rows):
            return byte_codes.multiply(rows, *self.codes)
        result = rows.new_empty(len(rows), self.out_features)
        for part, weight in self.slabs(rows.dtype):
            result[:, part] = torch.nn.functional.linear(rows, weight)
        return result

    def input_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, in]`` of the gradient ``[n, out]``: summed over slabs in float32, or what is wider."""
        if self.part is not None and rows.dtype in triton_launch.FLOATS:
            return triton_launch.input_gradient(rows, [self.part], self.in_features)
        total = rows.new_zeros(len(rows), self.in_features, dtype=torch.promote_types(torch.float32, rows.dtype))
        for part, weight in self.slabs(rows.dtype):
            total += rows[:, part] @ weight
        return total

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The whole weight."""
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        for part, weight in self.slabs(dtype):
            whole[part] = weight
        return whole


def dense(
    scheme: AnyScheme,
    form: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    out_features: int,
    in_features: int,
    slab: Callable[[slice, torch.dtype], torch.Tensor],
) -> Dense:
    """The matrix of codes, scales and zero points in a form; ``slab`` makes the rows of outputs from ``planes``."""
    if form == "tiles":
        packed, shape = tiles.named(*tensors), tiles.shape_of(scheme, out_features, in_features)
        return Dense(out_features, in_features, lambda dtype: _tiled(packed, shape, dtype), tiled=(packed, shape))
    if form == "words":
        bits, centre = (scheme.bits, scheme.centre) if isinstance(scheme, AffineScheme) else (1, 0.0)
        part = triton_launch.part(*tensors, bits, centre, scheme.group_size, in_features)
        return Dense(
            out_features,
            in_features,
            lambda dtype: words.slabs(*tensors, out_features, in_features, part.centre, dtype),
            part=part,
        )
    whole = None
    if form == "bytes" and isinstance(scheme, AffineScheme):
        codes, scales, zeros = tensors
        whole = (codes, scales, scheme.centre if zeros is None else zeros)
    return Dense(
        out_features,
        in_features,
        lambda dtype: ((part, slab(part, dtype)) for part in _parts(out_features, in_features, dtype.itemsize)),
        codes=whole,
    )


def _parts(out_features: int, in_features: int, itemsize: int) -> Iterator[slice]:
    """Which outputs make up each slab."""
    step = max(1, tiles.SLAB // (in_features * itemsize))
    return (slice(begin, min(begin + step, out_features)) for begin in range(0, out_features, step))


def _tiled(packed: dict[str, torch.Tensor], shape: tiles.Shape, dtype: torch.dtype) -> Slabs:
    if dtype in tiles.FLOATS:
        return tiles.slabs(packed, shape, dtype)
    return ((part, weight.to(dtype)) for part, weight in tiles.slabs(packed, shape, torch.float32))

"""Banks of matrices in words, for GPUs: one launch of a Triton kernel for all matrices that have rows.

A kernel takes one of the matrices and, from a table, how many elements behind it each of the others begins: 64-bit
numbers, since a bank is larger than 32 bits count. A program finds its matrix and its rows in a list of jobs.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ulbq.formats import AffineScheme, TrellisScheme, trellis
from ulbq.kernels import trellis_launch, triton_launch, words
from ulbq.kernels.banks import Bank, Job, Routes
from ulbq.kernels.block_sizes import Kernel
from ulbq.kernels.triton_launch import SPLIT_ROWS, VECTOR_ROWS

Tensor = torch.Tensor

# Bytes. Kernels suppose that distances are whole multiples of 16 elements, for loads of several at once.
_ALIGNED = 64

# Rows that lie anywhere have an address each; those of more rows would not all stay in the registers of a program.
_MOST_ROWS = 64


class _InWords(Bank):
    """What both have in common."""

    lone = True

    def __init__(self, scheme: Any, matrices: Mapping[int, Mapping[str, Tensor]], outs: int, columns: int) -> None:
        super().__init__(scheme, matrices, outs, columns)
        number, self.first = next(iter(matrices.items()))
        given = map(self.first.get, self.names)
        sizes = torch.tensor([1 if one is None else one.element_size() for one in given])
        self.aligned = not (self.table % _ALIGNED).any()
        self.offsets = ((self.table - self.table[number]) // sizes).to(self.first[self.names[0]].device)

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        return dtype in triton_launch.FLOATS and self.aligned


class WordsBank(_InWords):
    """Of affine codes and of bit planes."""

    names = ("word_codes", "word_scales", "word_zeros")

    def fill(self, y: Tensor, x: Tensor, routes: Routes, jobs: list[Job], share: int) -> None:
        bits, centre = (self.scheme.bits, self.scheme.centre) if isinstance(self.scheme, AffineScheme) else (1, 0.0)
        codes, scales, zeros = self.first["word_codes"], self.first["word_scales"], self.first.get("word_zeros")
        part = triton_launch.part(codes, scales, zeros, bits, centre, self.scheme.group_size, self.columns)
        kernel, counts = _kernel(jobs)
        cut = triton_launch.cut_of(part, kernel, counts, self.outs, x)
        cut = cut._replace(block_m=min(cut.block_m, _MOST_ROWS))
        pieces = _pieces(jobs, cut.block_m)
        splits, wide = -(-cut.spans // cut.each), words.padded(self.outs)
        whole = splits == 1 and kernel != "vector"
        result = y if whole else x.new_empty(splits, routes.places, wide, dtype=torch.float32)
        across, down = -(-wide // cut.block_n), len(pieces)
        operands = x, codes, scales, zeros, self.offsets, pieces.to(x.device), routes.order, result
        sizes = part.group, cut.spans, cut.each, *triton_launch.strides(part)
        loads = triton_launch.loads(x, part, cut)
        with triton_launch.on(x):
            if kernel == "vector":
                _kernels().vectors_each_kernel[(across, splits, down)](
                    *operands, routes.places, share, self.columns, wide, *sizes, triton_launch.EXPONENT,
                    **triton_launch.constants(part), **loads, SPAN=cut.span, ROWS=cut.block_m, BLOCK_N=cut.block_n,
                    **cut.start,
                )  # fmt: skip
            else:
                width = self.outs if whole else wide
                _kernels().matrix_each_kernel[(down, across, splits)](
                    *operands, routes.places, share, self.columns, wide, width, *sizes,
                    **triton_launch.constants(part), SPAN=cut.span, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
                    **cut.start,
                )  # fmt: skip
            if not whole:
                triton_launch.reduce(result, y, x)


class TrellisWordsBank(_InWords):
    """Of trellis codes, each with its transforms."""

    names = ("word_codes", "su", "sv")
    scheme: TrellisScheme

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        # What mixes blocks is torch's, and knows one vector for all rows.
        mixed = trellis.is_mixed(self.columns) or trellis.is_mixed(self.outs)
        return super().takes(dtype, rows) and not mixed

    def fill(self, y: Tensor, x: Tensor, routes: Routes, jobs: list[Job], share: int) -> None:
        codes, su, sv = self.first["word_codes"], self.first.get("su"), self.first.get("sv")
        kernel, counts = _kernel(jobs)
        numbers = torch.tensor([number for number, begin, end in jobs for _ in range(begin, end)], device=x.device)
        own = self.offsets[numbers if routes.order is None else numbers[routes.order.argsort()]]
        x = x.repeat_interleave(share, 0)
        dtype = torch.float32 if kernel == "vector" else x.dtype
        inner = trellis_launch.blocks_transform(x, dtype, su, None, own[:, 1].contiguous())
        cut = trellis_launch.cut_of(kernel, self.scheme, codes, counts, dtype)
        cut = cut._replace(block_m=min(cut.block_m, _MOST_ROWS))
        pieces = _pieces(jobs, cut.block_m)
        partial = x.new_empty(cut.splits, routes.places, self.outs, dtype=torch.float32)
        operands = inner, codes, self.offsets, pieces.to(x.device), routes.order, partial
        sizes = routes.places, self.columns, self.outs, cut.each
        constants = trellis_launch.constants(self.scheme) | {"TILES": cut.tiles} | cut.start
        across, down = -(-codes.shape[1] // cut.tiles), len(pieces)
        with triton_launch.on(x):
            if kernel == "vector":
                _trellis_kernels().vectors_each_kernel[(across, cut.splits, down)](
                    *operands, *sizes, **constants, ROWS=cut.block_m
                )
            else:
                _trellis_kernels().matrix_each_kernel[(down, across, cut.splits)](
                    *operands, *sizes, **constants, DEEP=cut.deep, BLOCK_M=cut.block_m
                )
        y.copy_(trellis_launch.blocks_transform(partial, y.dtype, None, sv, own[:, 2].contiguous()))


def _kernel(jobs: list[Job]) -> tuple[Kernel, list[int]]:
    """Which one, and how many rows each matrix has."""
    counts = [end - begin for _, begin, end in jobs]
    if max(counts) <= VECTOR_ROWS:
        return "vector", counts
    return "small" if sum(counts) <= SPLIT_ROWS * len(counts) else "large", counts


def _pieces(jobs: list[Job], rows: int) -> Tensor:
    """Jobs of so many rows at most, int64 ``[n, 3]``."""
    cut = [(number, at, min(at + rows, end)) for number, begin, end in jobs for at in range(begin, end, rows)]
    return torch.tensor(cut, dtype=torch.int64)


def _kernels() -> Any:
    from ulbq.kernels import triton_kernels

    return triton_kernels


def _trellis_kernels() -> Any:
    from ulbq.kernels import triton_trellis

    return triton_trellis

"""Calls of the Triton kernels: which one for how many rows, how the columns are divided, and what is added up.

Up to :data:`VECTOR_ROWS` rows are taken by the kernel for vectors; more by that for matrices, whose programs share the
columns (split-K) up to :data:`SPLIT_ROWS`. Shares are float32 sums, which a second small kernel adds up. From some
number of rows on the dense weight is made, and torch multiplies. That number, and how programs are cut, come from
:mod:`ulbq.kernels.block_sizes`. Triton is imported by the first product.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ulbq.kernels import words
from ulbq.kernels.block_sizes import BlockSizes, Kernel, blocks, dense_rows

VECTOR_ROWS = 4
SPLIT_ROWS = 64
EXPONENT = 150 << 23
"""That of float32 numbers whose last place is one. It is no constant of the kernel: constants cost an operation."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SLAB = 1 << 26
"""Weights that are dense at a time."""
HEADROOM = 2.0**-6
"""What float16 is multiplied by where weights are of size one in a dense product, and made small behind it."""
# Outputs of a program that makes them, and its warps.
_DENSE_OUTS, _DENSE_WARPS = 128, 4

Tensor = torch.Tensor


class Part(NamedTuple):
    """A matrix, or those columns of one that have the same width, as kernels take it.

    Attributes:
        codes: words.
        scales, zeros: ``[G, padded out]``, as :func:`ulbq.kernels.words.pack` leaves them.
        levels, order: of column codebooks.
        bits: of a code.
        planes: 2 of dual binary.
        centre: the zero point, where none are stored.
        group: columns that share a scale.
        places: columns of this part, those that only pad it included where it has an order.
    """

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    levels: Tensor | None
    order: Tensor | None
    bits: int
    planes: int
    centre: float
    group: int
    places: int


class GatedMixture(NamedTuple):
    """What goes on behind a product with signs.

    Attributes:
        gates, sums: of :func:`gate`.
        out_scales: ``[experts, out]``.
        zeros: of the outputs ``[out]``, or None.
    """

    gates: Tensor
    sums: Tensor
    out_scales: Tensor
    zeros: Tensor | None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot be had here; None where they can."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or later"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU in this process, for tests; said before Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def part(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, centre: float, group_size: int, columns: int
) -> Part:
    """A matrix of affine codes, of signs (1 bit, no zero points), or of two planes, in words."""
    group = words.padded(columns) if group_size == -1 else group_size
    planes = 2 if codes.ndim == 4 else 1
    return Part(codes, scales, zeros, None, None, bits, planes, centre, group, columns)


def sections(packed: list[Tensor], counts: Mapping[int, int], outs: int) -> list[Part]:
    """The parts of a matrix of column codebooks, ``counts`` of its columns by their width, widest first.

    ``packed`` begins with words, levels and order.
    """
    codes, levels, order, *_ = packed
    found, code, level, place = [], 0, 0, 0
    for bits, columns in counts.items():
        count, wide = words.padded(columns), words.padded(outs)
        size = count // words.CHUNK * bits * wide
        some = codes[code : code + size].view(-1, bits, wide)
        books, places = levels[level : level + (count << bits)], order[place : place + count]
        found.append(Part(some, None, None, books, places, bits, 1, 0.0, count, count))
        code, level, place = code + size, level + (count << bits), place + count
    return found


def multiply(
    x: Tensor,
    matrix: list[Part],
    outs: int,
    *,
    outliers: list[Tensor] | None = None,
    mixture: GatedMixture | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Products ``[rows, out]`` of ``x`` ``[rows, in]``.

    Args:
        x: float16, bfloat16 or float32; of a mixture what :func:`gate` scaled.
        matrix: whose parts are added up.
        outs: outputs.
        outliers: ``outlier_starts``, ``outlier_columns`` and ``outlier_deltas`` of column codebooks.
        mixture: to go on with signs, as the BinaryMoS format does.
        dtype: of the result; that of ``x`` where it is not said.
    """
    x = x.contiguous()
    dtype = dtype or x.dtype
    result = x.new_empty(len(x), outs, dtype=dtype)
    if not result.numel():
        return result
    if is_many(x, matrix[0].bits):
        return _by_weight(x, matrix, result, outliers, mixture)
    with on(x):
        kernel: Kernel = "vector" if len(x) <= VECTOR_ROWS else "small" if len(x) <= SPLIT_ROWS else "large"
        cuts = [cut_of(part, kernel, [len(x)], outs, x) for part in matrix]
        splits = sum(-(-cut.spans // cut.each) for cut in cuts)
        if splits == 1 and kernel != "vector" and not outliers and mixture is None and dtype == x.dtype:
            _matrix(x, matrix[0], cuts[0], result, words.padded(outs), outs)
            return result
        wide = words.padded(outs)
        partial = x.new_empty(splits, len(x), wide, dtype=torch.float32)
        begin = 0
        for part, cut in zip(matrix, cuts, strict=True):
            share = partial[begin : begin + -(-cut.spans // cut.each)]
            (_vector if kernel == "vector" else _matrix)(x, part, cut, share, wide, wide)
            begin += len(share)
        reduce(partial, result, x, outliers, mixture)
    return result


def input_gradient(grad: Tensor, matrix: list[Part], columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """``[rows, in]`` of the gradient ``[rows, out]`` of what :func:`multiply` gives, outliers and mixtures apart."""
    grad = grad.contiguous()
    result = grad.new_zeros(len(grad), columns, dtype=dtype or grad.dtype)
    if not result.numel():
        return result
    outs = grad.shape[1]
    if is_many(grad, matrix[0].bits):
        wide = torch.zeros_like(result, dtype=torch.float32)
        for some, weight in slabs(matrix, outs, columns, grad):
            wide += grad[:, some] @ weight.T
        return result.copy_(wide)
    with on(grad):
        for part in matrix:
            cut = cut_of(part, "gradient", [len(grad)], outs, grad)
            _kernels().gradient_kernel[(-(-len(grad) // cut.block_m), cut.spans)](
                grad, *_operands(part), result, len(grad), columns, words.padded(outs), outs, part.group,
                *strides(part), **constants(part), LOOKUP=part.levels is not None,
                SPAN=cut.span, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, **cut.start,
            )  # fmt: skip
    return result


def is_many(x: Tensor, bits: int) -> bool:
    """Whether so many rows ``[n, in]`` are faster with a dense weight that is made for them."""
    return len(x) >= dense_rows(device_facts(x.device)[0], bits).made


def prefers_dense(x: Tensor) -> bool:
    """Whether torch's product with a dense weight that is there is faster for activations ``[..., in]``."""
    return x.numel() >= dense_rows(device_facts(x.device)[0], 0).kept * x.shape[-1]


def _by_weight(
    x: Tensor, matrix: list[Part], result: Tensor, outliers: list[Tensor] | None, mixture: GatedMixture | None
) -> Tensor:
    """What :func:`multiply` gives, by torch's product with dense weights in the dtype of ``x``."""
    rows, outs = result.shape
    plain = not outliers and mixture is None and result.dtype == x.dtype
    product = result if plain else x.new_empty(rows, words.padded(outs))
    less = 1.0
    if mixture is not None and x.dtype == torch.float16:  # whose outer scales come behind
        less = HEADROOM
        matrix = [part._replace(scales=part.scales * less) for part in matrix if part.scales is not None]
    for some, weight in slabs(matrix, outs, x.shape[1], x):
        torch.mm(x, weight, out=product[:, some])
    if not plain:
        with on(x):
            wide = product.float() if less == 1 else product.float() / less
            reduce(wide[None], result, x, outliers, mixture)
    return result


def slabs(matrix: list[Part], outs: int, columns: int, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Dense weights ``[columns, n]`` of some outputs at a time, outliers apart, in the dtype of ``x``."""
    step = max(words.PAD, SLAB // columns // words.PAD * words.PAD)
    for begin in range(0, outs, step):
        count = min(step, outs - begin)
        weight = x.new_empty(columns, count)
        with on(x):
            for part in matrix:
                span = _span(part)
                _kernels().weight_kernel[(-(-part.places // span), -(-count // _DENSE_OUTS))](
                    *_operands(part), weight, columns, words.padded(outs), begin, count, part.group,
                    *strides(part), **constants(part), LOOKUP=part.levels is not None, SPAN=span,
                    BLOCK_N=_DENSE_OUTS, num_warps=_DENSE_WARPS,
                )  # fmt: skip
        yield slice(begin, begin + count), weight


def gate(x: Tensor, in_scales: Tensor, router: Tensor | None, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Before a product with signs: activations ``[rows, in]`` times their inner scales.

    Args:
        x: ``[rows, in]``.
        in_scales, router: ``[experts, in]``; no router for one expert.
        zeros: of the inputs ``[in]``, or None.

    Returns:
        The scaled activations, float32 for the vector kernel and of the dtype of ``x`` for the tensor cores; gates
        float32 ``[rows, experts]``; float32 ``[rows, 2]`` the sum of scaled activations, and of them times the zeros.
    """
    x, experts = x.contiguous(), len(in_scales)
    scaled = torch.empty_like(x, dtype=torch.float32 if len(x) <= VECTOR_ROWS else x.dtype)
    gates = x.new_empty(len(x), experts, dtype=torch.float32)
    sums = x.new_empty(len(x), 2, dtype=torch.float32)
    padded = 1 << (experts - 1).bit_length()
    if len(x):
        with on(x):
            _kernels().gate_kernel[(len(x),)](
                x, router, in_scales, zeros, scaled, gates, sums, x.shape[1], EXPERTS=experts, PADDED=padded,
                ZERO_INPUTS=zeros is not None, BLOCK_K=max(16, 2048 // padded), num_warps=8,
            )  # fmt: skip
    return scaled, gates, sums


class Cut(NamedTuple):
    """How a part is divided: columns of a span, spans, how many of them each program takes, blocks, options."""

    span: int
    spans: int
    each: int
    block_m: int
    block_n: int
    start: dict[str, int]


def cut_of(part: Part, kernel: Kernel, rows: Sequence[int], outs: int, x: Tensor) -> Cut:
    """How matrices like a part are divided of which each is multiplied with so many rows like those of ``x``."""
    name, processors = device_facts(x.device)
    wide = x.dtype == torch.float32
    size: BlockSizes = blocks(name, kernel, part.bits, wide)
    # What tensor cores do not multiply lies in registers, and 64 columns of it do not fit.
    span = 32 if wide and kernel in ("small", "large") else _span(part)
    spans = -(-part.places // span)
    block_n = min(size.block_n, 1 << (words.padded(outs) - 1).bit_length())
    usual = max(rows) if kernel == "vector" else -(-sum(rows) // len(rows))
    block_m = min(size.block_m, 1 << (usual - 1).bit_length())
    block_m = block_m if kernel == "vector" else max(16, block_m)
    programs = -(-words.padded(outs) // block_n) * sum(-(-count // block_m) for count in rows)
    # Large batches have programs enough, and shares of theirs would cost more to add up than they save.
    shares = 1 if kernel in ("large", "gradient") else max(1, -(-processors * size.programs // programs))
    start = {"num_warps": size.warps, "num_stages": size.stages}
    return Cut(span, spans, -(-spans // min(shares, spans)), block_m, block_n, start)


def _span(part: Part) -> int:
    """Columns that share a scale, and are taken at once."""
    return 32 if part.group % 64 else 64


def _vector(x: Tensor, part: Part, cut: Cut, share: Tensor, outs: int, _: int) -> None:
    grid = (-(-outs // cut.block_n), len(share), -(-len(x) // cut.block_m))
    _kernels().vector_kernel[grid](
        x, *_operands(part), share, len(x), x.shape[1], outs, part.group, cut.spans, cut.each,
        *strides(part), EXPONENT, **constants(part), LOOKUP=part.levels is not None, **loads(x, part, cut),
        SPAN=cut.span, ROWS=cut.block_m, BLOCK_N=cut.block_n, **cut.start,
    )  # fmt: skip


def _matrix(x: Tensor, part: Part, cut: Cut, result: Tensor, outs: int, width: int) -> None:
    grid = (-(-len(x) // cut.block_m), -(-outs // cut.block_n), -(-cut.spans // cut.each))
    _kernels().matrix_kernel[grid](
        x, *_operands(part), result, len(x), x.shape[1], outs, width, part.group, cut.spans, cut.each,
        *strides(part), **constants(part), LOOKUP=part.levels is not None,
        SPAN=cut.span, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, **cut.start,
    )  # fmt: skip


def reduce(
    partial: Tensor,
    result: Tensor,
    x: Tensor,
    outliers: list[Tensor] | None = None,
    mixture: GatedMixture | None = None,
) -> None:
    """Add shares float32 ``[splits, rows, padded out]`` up, and what is to be added besides, into ``[rows, out]``."""
    splits, rows, outs = partial.shape
    gates, sums, out_scales, zeros = mixture or (None, None, None, None)
    _kernels().reduce_kernel[(rows, -(-result.shape[1] // 256))](
        partial, result, x, *(outliers or (None, None, None)), gates, out_scales, sums, zeros,
        rows, x.shape[1], outs, result.shape[1], splits, OUTLIERS=bool(outliers),
        EXPERTS=0 if gates is None else gates.shape[1], ZERO_OUTPUTS=zeros is not None, BLOCK_N=256, num_warps=4,
    )  # fmt: skip


def _operands(part: Part) -> tuple[Tensor | None, ...]:
    return part.codes, part.scales, part.zeros, part.order, part.levels


def strides(part: Part) -> tuple[int, int]:
    """From the first plane of dual binary to the second: of words, and of scales."""
    if part.planes == 1 or part.scales is None:
        return 0, 0
    return part.codes[0].numel(), part.scales[0].numel()


def loads(x: Tensor, part: Part, cut: Cut) -> dict[str, bool]:
    """How the kernel for vectors reads activations: without looking for their end, and two at once."""
    even = part.order is None and part.places % cut.span == 0
    # Of more rows than two, what pairs want beside them does not fit into the registers.
    pairs = even and cut.block_m <= 2 and x.dtype.itemsize == 2 and x.data_ptr() % 4 == 0
    return {"EVEN": even, "PAIRS": pairs}


def constants(part: Part) -> dict[str, Any]:
    """What is compiled into the kernels of a part."""
    return {
        "CENTRE": part.centre,
        "BITS": part.bits,
        "PARTS": part.planes,
        "HAS_ZEROS": part.zeros is not None,
    }


def _kernels() -> Any:
    from ulbq.kernels import triton_kernels

    return triton_kernels


@functools.cache
def device_facts(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors; in the interpreter one, so that small matrices are divided as well."""
    if device.type != "cuda":
        return "", 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the GPU of a tensor the current one; nothing for one on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

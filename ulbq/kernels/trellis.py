"""Products with trellis codes on the CPU, compiled (``cpu/trellis.cpp``): codes are decoded while they are multiplied.

The stored tensors are read as they are. Between the two transforms everything is float32.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ulbq.formats import TrellisScheme, trellis
from ulbq.kernels import trellis_launch, triton_launch
from ulbq.kernels.build import library, unavailable_reason
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS, SLAB

MANY_ROWS = 128
"""From so many rows on a product with the dense weight is faster, where it need not be made."""

# Below that many multiplications, or numbers to transform, a second thread costs more than it brings.
_WORTH_A_THREAD = 1 << 20
_WORTH_A_THREAD_TURNING = 1 << 15
# Slabs begin where the decoder of one bit can: it takes two tiles at a time.
_STEP = 2 * trellis.TILE


def scaled_transform(
    x: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(x ⊙ before) · H ⊙ after``, ``[rows, n]`` in ``dtype``.

    Args:
        x: ``[rows, n]`` float32, bfloat16 or float16.
        dtype: of these, too.
        before, after: ``[n]`` float16; ones where not given.
    """
    x = x.contiguous()
    result = torch.empty_like(x, dtype=dtype)
    threads = torch.get_num_threads() if x.numel() > _WORTH_A_THREAD_TURNING else 1
    width = x.shape[1]
    vectors = (None if one is None else one.data_ptr() for one in (mixing(width), before, after))
    library().ulbq_turn(
        x.data_ptr(), FLOATS[x.dtype], len(x), width, trellis.block_width(width), *vectors, result.data_ptr(),
        FLOATS[dtype], threads,
    )  # fmt: skip
    return result


@functools.cache
def mixing(width: int) -> torch.Tensor | None:
    """What mixes the Hadamard blocks of a dimension, float32 ``[n, n]``; None where they stay apart."""
    return trellis.hartley(width // trellis.block_width(width)).float() if trellis.is_mixed(width) else None


def multiply(
    x: torch.Tensor, scheme: TrellisScheme, codes: torch.Tensor, su: torch.Tensor, sv: torch.Tensor
) -> torch.Tensor:
    """Products ``[rows, out]`` of ``x`` ``[rows, in]``, in its dtype, with the matrix of these tensors as stored."""
    inner = inner_product(scaled_transform(x, before=su), scheme, codes, exact=x.dtype == torch.float32)
    return scaled_transform(inner, x.dtype, after=sv)


def product(
    scheme: TrellisScheme, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, *, exact: bool
) -> Product:
    """What tokens are multiplied with, of tensors as stored; inputs are rounded to 16 bits, ``exact`` to 24."""
    codes, su, sv = (tensors[name] for name in ("codes", "su", "sv"))
    _, *matrix = _matrix(scheme, codes)
    ends = (part for width in (len(su), len(sv)) for part in (trellis.block_width(width), mixing(width)))
    return Product("ulbq_trellis_linear", codes, *matrix, su, sv, *ends, bias, exact)


def input_gradient(
    grad: torch.Tensor, scheme: TrellisScheme, codes: torch.Tensor, su: torch.Tensor, sv: torch.Tensor
) -> torch.Tensor:
    """``[rows, in]`` of the gradient ``[rows, out]``, in its dtype."""
    inner = scaled_transform(grad, grad.dtype, before=sv)
    total = inner.new_zeros(len(grad), len(su), dtype=torch.float32)
    for part, some in slabs(scheme, codes, grad.dtype):
        total += inner[:, part] @ some
    return scaled_transform(total, grad.dtype, after=su)


def weight(
    scheme: TrellisScheme, codes: torch.Tensor, su: torch.Tensor, sv: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The dense weight ``[out, in]``.

    Bit for bit that of :func:`ulbq.formats.dequantize`, save where transforms mix blocks: sums have another order.
    """
    halfway = scaled_transform(inner_matrix(scheme, codes, torch.float32)).T
    transformed: torch.Tensor = scaled_transform(halfway).T
    return transformed.mul_(su).mul_(sv.unsqueeze(1)).to(dtype)


def transform(x: torch.Tensor) -> torch.Tensor:
    """``x · H``, ``[..., n]``, differentiable: by kernels, or by :func:`ulbq.formats.trellis.transform`."""
    if x.dtype == torch.float32 and (_compiled(x) or (x.is_cuda and triton_launch.unavailable_reason() is None)):
        transformed: torch.Tensor = _Transform.apply(x)  # type: ignore[no-untyped-call]
        return transformed
    return trellis.transform(x)


def decode(scheme: TrellisScheme, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inner matrix ``T`` ``[out, in]`` in ``dtype``, wherever the codes are."""
    if _compiled(codes) and dtype in FLOATS:
        return inner_matrix(scheme, codes, dtype)
    stored = {"codes": codes, "su": codes.new_empty(0), "sv": codes.new_empty(0)}
    return trellis.inner_matrix(scheme, trellis.unpack(scheme, stored).codes).to(dtype)


class _Transform(torch.autograd.Function):
    """The transform is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return (trellis_launch.scaled_transform(rows, x.dtype) if x.is_cuda else scaled_transform(rows)).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return transform(gradients[0])


def _compiled(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and unavailable_reason() is None


def inner_product(x: torch.Tensor, scheme: TrellisScheme, codes: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """``x · Tᵀ``, ``[rows, out]`` float32.

    Args:
        x: ``[rows, in]`` float32. It is rounded to fixed point, 64 columns at a time: to 16 bits of their largest, or
            to 24 where ``exact``. All sums over these are exact. A row with a value that is not finite becomes NaN.
        scheme: of the matrix.
        codes: as stored.
        exact: the result will not be rounded to 16 bits.
    """
    x, outs = x.contiguous(), codes.shape[1] * trellis.TILE
    y = torch.empty(len(x), outs, dtype=torch.float32)
    threads = torch.get_num_threads() if x.numel() * outs > _WORTH_A_THREAD else 1
    library().ulbq_multiply_trellis(
        *_matrix(scheme, codes), x.data_ptr(), len(x), 2 if exact else 1, y.data_ptr(), threads
    )
    return y


def slabs(scheme: TrellisScheme, codes: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The inner matrix, some outputs at a time: which ones, and their rows ``[n, in]`` in ``dtype``, not contiguous.

    They are bit for bit those of :func:`ulbq.formats.trellis.inner_matrix`, rounded to ``dtype``.
    """
    columns, outs = (count * trellis.TILE for count in codes.shape[:2])
    step = max(1, SLAB // (columns * dtype.itemsize * _STEP)) * _STEP
    for begin in range(0, outs, step):
        count = min(step, outs - begin)
        dense = torch.empty(columns, count, dtype=dtype)
        library().ulbq_widen_trellis(
            *_matrix(scheme, codes), begin, count, dense.data_ptr(), FLOATS[dtype], torch.get_num_threads()
        )
        yield slice(begin, begin + count), dense.T


def inner_matrix(scheme: TrellisScheme, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All of them."""
    columns, outs = (count * trellis.TILE for count in codes.shape[:2])
    whole = torch.empty(outs, columns, dtype=dtype)
    for part, some in slabs(scheme, codes, dtype):
        whole[part] = some
    return whole


def _matrix(scheme: TrellisScheme, codes: torch.Tensor) -> tuple[Any, ...]:
    """The arguments with which every function of the library begins that reads a matrix."""
    columns, outs = (count * trellis.TILE for count in codes.shape[:2])
    return codes.data_ptr(), *facts(scheme), outs, columns


def facts(scheme: TrellisScheme) -> tuple[Any, ...]:
    """Bits of codes and states, and what makes values of states, as the library takes them."""
    multiplier = trellis.MULTIPLIERS[scheme.state_bits]
    return scheme.bits, scheme.state_bits, multiplier, trellis.VALUE_SCALE, trellis.VALUE_SHIFT

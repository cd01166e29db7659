"""A packed matrix made ready for products, and the product."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ulbq import formats
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme
from ulbq.kernels import columns as columns_
from ulbq.kernels import dispatch, humming, int4, tiles, triton_launch, words
from ulbq.kernels import ops as _ops  # noqa: F401 - puts the operators under torch.ops.ulbq

# Stored and derived tensors of the codebook format, in the operator's order.
CODEBOOK = ("codes", "tail_codes", "codebooks", "columns", "outlier_values", "outlier_low", "outlier_high")
IN_WORDS = ("word_codes", "word_levels", "word_order", "outlier_starts", "outlier_columns", "outlier_deltas")
DERIVED = ("column_order", "outlier_starts", "outlier_columns", "outlier_deltas")
# What a mixture has beside its signs, and keeps as it is.
_BESIDE = ("in_scales", "out_scales", "router", "zeros")


# Layouts with words in them.
_WORDS = ("words", "humming")


class Ready(NamedTuple):
    """Tensors in the layout that products take.

    Attributes:
        layout: ``planes``: as stored. ``tiles`` and ``words``: others in place of codes, scales and
            zeros. ``int4`` and ``columns``: more beside the stored ones; ``humming``: beside words.
        tensors: by name.
    """

    layout: str
    tensors: dict[str, torch.Tensor]


def prepare(scheme: AnyScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int) -> Ready:
    """Bring stored tensors into the layout of the best backend for this matrix and machine. It takes milliseconds."""
    best = dispatch.layout(scheme, outs, columns, stored["codes"].device.type)
    if best == "tiles":
        beside = {name: stored[name] for name in _BESIDE if name in stored and isinstance(scheme, BinaryMosScheme)}
        return Ready("tiles", beside | tiles.pack(scheme, stored, outs, columns))
    if best == "triton":
        return Ready("words", _in_words(scheme, stored, outs, columns))
    if best == "humming" and isinstance(scheme, AffineScheme):
        return Ready("humming", _in_words(scheme, stored, outs, columns) | humming.pack(scheme, stored, columns))
    if best == "int4" and isinstance(scheme, AffineScheme):
        return Ready("int4", dict(stored) | int4.pack(scheme, stored, columns))
    if best == "columns" and isinstance(scheme, CodebookScheme):
        return Ready("columns", dict(stored) | columns_.derive(scheme, stored, outs, columns))
    return Ready("planes", dict(stored))


def stored(scheme: AnyScheme, ready: Ready, outs: int, columns: int) -> dict[str, torch.Tensor]:
    """The tensors that :func:`prepare` was given, bit for bit."""
    specs = scheme.tensors(outs, columns)
    if ready.layout not in ("tiles", *_WORDS):
        return {name: ready.tensors[name] for name in specs}
    layout = tiles if ready.layout == "tiles" else words
    codes = layout.unpack(scheme, ready.tensors, outs, columns)
    return {name: codes[name] if name in codes else ready.tensors[name] for name in specs}


def matrix(scheme: AnyScheme, ready: Ready, outs: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """What :func:`ulbq.formats.matrix` gives of the stored tensors."""
    if ready.layout == "tiles" and isinstance(scheme, AffineScheme | DualBinaryScheme) and dtype in tiles.FLOATS:
        dense = torch.empty(outs, columns, dtype=dtype)
        for part, weight in tiles.slabs(ready.tensors, tiles.shape_of(scheme, outs, columns), dtype):
            dense[part] = weight
        return dense
    if ready.layout in _WORDS and isinstance(scheme, AffineScheme | DualBinaryScheme):
        dense = torch.empty(outs, columns, dtype=dtype, device=ready.tensors["word_codes"].device)
        codes, scales, zeros = (ready.tensors.get(name) for name in ("word_codes", "word_scales", "word_zeros"))
        assert codes is not None
        assert scales is not None
        centre = scheme.centre if isinstance(scheme, AffineScheme) else 0.0
        for part, weight in words.slabs(codes, scales, zeros, outs, columns, centre, dtype):
            dense[part] = weight
        return dense
    return formats.matrix(scheme, stored(scheme, ready, outs, columns), columns, dtype)


def is_dense(scheme: AnyScheme, layout: str, x: torch.Tensor) -> bool:
    """Whether one who kept the dense weight does better with it than :func:`multiply` does."""
    if layout == "tiles":
        return not (x.dtype in tiles.FLOATS and x.numel() < tiles.MANY_ROWS * x.shape[-1])
    if layout == "columns":
        return not (x.dtype in tiles.FLOATS and x.numel() <= columns_.FEW_ROWS * x.shape[-1])
    if layout in _WORDS:
        return x.dtype not in triton_launch.FLOATS
    return layout == "planes" or not _takes_int4(x)


def multiply(scheme: AnyScheme, ready: Ready, x: torch.Tensor, outs: int) -> torch.Tensor:
    """The layer's product ``[..., out]`` of inputs ``[..., in]``, in their dtype, without a bias."""
    layout, tensors = ready
    product: torch.Tensor
    if isinstance(scheme, BinaryMosScheme):
        return _mixture(scheme, ready, x, outs)
    if isinstance(scheme, CodebookScheme):
        if layout == "words":
            counts = scheme.columns(x.shape[-1])
            packed = [tensors[name] for name in IN_WORDS if name in tensors]
            product = torch.ops.ulbq.codebook_words_linear(x, packed, outs, list(counts), list(counts.values()))
            return product
        widths = scheme.widths or {scheme.bits: x.shape[-1]}
        packed = [tensors[name] for name in CODEBOOK if name in tensors]
        derived = [tensors[name] for name in DERIVED if name in tensors]
        product = torch.ops.ulbq.codebook_linear(
            x, packed, derived, outs, list(widths), list(widths.values()), scheme.outliers
        )
        return product
    if layout == "int4" and _takes_int4(x):
        product = torch.ops.ulbq.int4_linear(x, tensors["int4_codes"], tensors["int4_scales"], scheme.group_size)
        return product
    if layout == "humming":
        if humming.takes(x):
            names = ("humming_codes", "humming_scales", "humming_zeros", "humming_locks")
            given = (tensors.get(name) for name in names)
            product = torch.ops.ulbq.humming_linear(x, *given, outs, scheme.bits, scheme.group_size)
            return product
        layout = "words"
    prefix = {"tiles": "tiled_", "words": "word_"}.get(layout, "")
    codes, scales, zeros = (tensors.get(prefix + name) for name in ("codes", "scales", "zeros"))
    layout = layout if prefix else "planes"
    if isinstance(scheme, DualBinaryScheme):
        product = torch.ops.ulbq.dual_binary_linear(x, codes, scales, outs, scheme.group_size, layout)
    else:
        product = torch.ops.ulbq.affine_linear(x, codes, scales, zeros, outs, scheme.bits, scheme.group_size, layout)
    return product


def _in_words(
    scheme: AnyScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int
) -> dict[str, torch.Tensor]:
    """Words, and beside them what they do not replace."""
    beside = {name: t for name, t in stored.items() if name not in ("codes", "tail_codes")}
    if isinstance(scheme, AffineScheme | DualBinaryScheme):
        beside = {}
    return beside | words.pack(scheme, stored, outs, columns)


def _takes_int4(x: torch.Tensor) -> bool:
    differentiable = torch.is_grad_enabled() and x.requires_grad
    return x.dtype == torch.bfloat16 and not differentiable and x.numel() <= int4.FEW_ROWS * x.shape[-1]


def _mixture(scheme: BinaryMosScheme, ready: Ready, x: torch.Tensor, outs: int) -> torch.Tensor:
    """Signs, with gates and both scales around them."""
    layout, tensors = ready
    if layout == "words" and x.dtype in triton_launch.FLOATS and not (torch.is_grad_enabled() and x.requires_grad):
        fused: torch.Tensor = torch.ops.ulbq.binary_mos_linear(
            x, tensors["word_codes"], tensors["word_scales"], tensors["in_scales"], tensors["out_scales"],
            tensors.get("router"), tensors.get("zeros"), scheme.zeros,
        )  # fmt: skip
        return fused
    scales = tensors["in_scales"].to(x.dtype), tensors["out_scales"].to(x.dtype)
    if scheme.experts > 1:
        gates = torch.nn.functional.linear(x, tensors["router"].to(x.dtype)).float().softmax(-1).to(x.dtype)
        inner, outer = (gates @ each for each in scales)
    else:
        inner, outer = (each[0] for each in scales)
    scaled = x * inner
    if layout == "tiles":
        codes, unit = tensors["tiled_codes"], tensors["tiled_scales"]
    elif layout == "words":
        codes, unit = tensors["word_codes"], tensors["word_scales"]
    else:  # a sign is 2 · (code − 1/2)
        codes, unit = tensors["codes"], torch.full((outs, 1), 2.0, dtype=torch.float16, device=x.device)
    product: torch.Tensor = torch.ops.ulbq.affine_linear(scaled, codes, unit, None, outs, 1, -1, layout)
    if scheme.zeros == "output":
        product = product + scaled.sum(-1, keepdim=True) * tensors["zeros"].to(x.dtype)
    elif scheme.zeros == "input":
        product = product + (scaled @ tensors["zeros"].to(x.dtype)).unsqueeze(-1)
    return product * outer

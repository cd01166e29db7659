"""The products as operators of torch: schemas, shapes for tracing, gradients, and the code that runs them.

A matrix comes in one of three layouts: ``planes`` are the tensors as artifacts store them, on any device; ``tiles`` are
those of :mod:`ulbq.kernels.tiles`, for the CPU; ``words`` those of :mod:`ulbq.kernels.words`, for GPUs. Gradients
reach the inputs in all, and in ``planes`` scales and floating zero points too. No operator keeps a dense weight, or
makes more of it at a time than a slab.
"""

from collections.abc import Iterator

import torch

from ulbq.formats import AffineScheme, CodebookScheme, DualBinaryScheme, codebook
from ulbq.formats.bits import unpack_planes
from ulbq.kernels import columns, reference, tiles, triton_launch, words

Slabs = Iterator[tuple[slice, torch.Tensor]]


# --- affine -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ulbq::affine_linear", mutates_args=())
def affine_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> torch.Tensor:
    """``x · Ŵᵀ`` with ``Ŵ = s · (q − z)``.

    Args:
        x: ``[..., in]``, floating.
        codes: in ``planes`` uint8 ``[bits, out, ceil(in/8)]``; in ``tiles`` and ``words`` as the ``pack`` of their
            modules says, like ``scales`` and ``zeros``.
        scales: in ``planes`` ``[out, G]``, any floating dtype.
        zeros: in ``planes`` uint8 planes ``[bits, ceil(out·G/8)]`` or floating ``[out, G]``; None for the centre.
        out_features: rows of ``Ŵ``.
        bits: of a code.
        group_size: columns that share a scale; -1 for all.
        layout: ``planes``, ``tiles`` or ``words``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if layout == "tiles":
        shape = _affine_shape(zeros, out_features, x.shape[-1], bits, group_size)
        packed = tiles.named(codes, scales, zeros)
        if len(rows) <= tiles.most_rows(x.dtype):
            return tiles.multiply(rows, packed, shape).view(*x.shape[:-1], out_features)
    if layout == "words" and x.dtype in triton_launch.FLOATS:
        part = triton_launch.part(codes, scales, zeros, bits, group_size, x.shape[-1])
        return triton_launch.multiply(rows, [part], out_features).view(*x.shape[:-1], out_features)
    slabs = _affine_slabs(codes, scales, zeros, out_features, x.shape[-1], bits, group_size, layout, x.dtype)
    return _product(rows, slabs, out_features).view(*x.shape[:-1], out_features)


@torch.library.custom_op("ulbq::affine_linear_grad_input", mutates_args=())
def affine_linear_grad_input(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``, of the gradient ``[..., out]`` of the output of :func:`affine_linear`."""
    if layout == "words" and grad.dtype in triton_launch.FLOATS:
        part = triton_launch.part(codes, scales, zeros, bits, group_size, in_features)
        return _words_gradient(grad, part, in_features)
    slabs = _affine_slabs(codes, scales, zeros, grad.shape[-1], in_features, bits, group_size, layout, grad.dtype)
    return _input_gradient(grad, slabs, in_features)


@torch.library.custom_op("ulbq::affine_linear_grad_scales", mutates_args=())
def affine_linear_grad_scales(
    grad: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of scales and of zero points, each ``[out, G]`` float32, in the layout ``planes``."""
    ones = torch.ones_like(scales, dtype=torch.float32)
    centred = torch.empty_like(ones)
    total = torch.empty_like(ones)
    rows = x.reshape(-1, x.shape[-1])
    gradient = grad.reshape(-1, grad.shape[-1])
    floats = _real_zeros(zeros, scales)
    for part in _parts(len(scales), x.shape[-1], 4):
        weight = (gradient[:, part].T.float() @ rows.float()).unflatten(1, (scales.shape[1], -1))
        some = None if floats is None else floats[part]
        codes_of = reference.affine_weight(codes[:, part], ones[part], some, x.shape[-1], torch.float32)
        centred[part] = (weight * codes_of.view_as(weight)).sum(-1)
        total[part] = weight.sum(-1)
    return centred, -scales.float() * total


@affine_linear.register_fake
def _(x, codes, scales, zeros, out_features, bits, group_size, layout):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@affine_linear_grad_input.register_fake
def _(grad, codes, scales, zeros, in_features, bits, group_size, layout):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


@affine_linear_grad_scales.register_fake
def _(grad, x, codes, scales, zeros):  # type: ignore[no-untyped-def]
    return torch.empty_like(scales, dtype=torch.float32), torch.empty_like(scales, dtype=torch.float32)


def _affine_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, _, *ctx.rest = inputs
    trained = scales.requires_grad or (zeros is not None and zeros.requires_grad)
    if trained and ctx.rest[-1] != "planes":
        raise ValueError("scales and zero points train in the stored layout only")
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(codes, scales, zeros, x if trained else None)


def _affine_backward(ctx, grad):  # type: ignore[no-untyped-def]
    codes, scales, zeros, x = ctx.saved_tensors
    of_x = of_scales = of_zeros = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.ulbq.affine_linear_grad_input(grad, codes, scales, zeros, ctx.columns, *ctx.rest)
    if x is not None:
        of_scales, of_zeros = torch.ops.ulbq.affine_linear_grad_scales(grad, x, codes, scales, zeros)
        of_scales = of_scales.to(scales.dtype) if ctx.needs_input_grad[2] else None
        of_zeros = of_zeros.to(zeros.dtype) if ctx.needs_input_grad[3] else None
    return of_x, None, of_scales, of_zeros, None, None, None, None


affine_linear.register_autograd(_affine_backward, setup_context=_affine_save)


# --- dual binary ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ulbq::dual_binary_linear", mutates_args=())
def dual_binary_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out_features: int, group_size: int, layout: str
) -> torch.Tensor:
    """``x · Ŵᵀ`` with ``Ŵ = α₁b₁ + α₂b₂``; in ``planes`` codes are ``[2, out, ceil(in/8)]``, scales ``[2, out, G]``.

    The rest is as in :func:`affine_linear`.
    """
    rows = x.reshape(-1, x.shape[-1])
    if layout == "tiles" and len(rows) <= tiles.most_rows(x.dtype):
        shape = tiles.shape_of(DualBinaryScheme(group_size=group_size), out_features, x.shape[-1])
        return tiles.multiply(rows, tiles.named(codes, scales), shape).view(*x.shape[:-1], out_features)
    if layout == "words" and x.dtype in triton_launch.FLOATS:
        part = triton_launch.part(codes, scales, None, 1, group_size, x.shape[-1])
        return triton_launch.multiply(rows, [part], out_features).view(*x.shape[:-1], out_features)
    slabs = _dual_slabs(codes, scales, out_features, x.shape[-1], group_size, layout, x.dtype)
    return _product(rows, slabs, out_features).view(*x.shape[:-1], out_features)


@torch.library.custom_op("ulbq::dual_binary_linear_grad_input", mutates_args=())
def dual_binary_linear_grad_input(
    grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, in_features: int, group_size: int, layout: str
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``."""
    if layout == "words" and grad.dtype in triton_launch.FLOATS:
        part = triton_launch.part(codes, scales, None, 1, group_size, in_features)
        return _words_gradient(grad, part, in_features)
    slabs = _dual_slabs(codes, scales, grad.shape[-1], in_features, group_size, layout, grad.dtype)
    return _input_gradient(grad, slabs, in_features)


@torch.library.custom_op("ulbq::dual_binary_linear_grad_scales", mutates_args=())
def dual_binary_linear_grad_scales(
    grad: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Gradient of both scales, ``[2, out, G]`` float32, in the layout ``planes``."""
    result = torch.empty_like(scales, dtype=torch.float32)
    ones = torch.ones_like(result[0])
    for plane in range(2):  # each plane is a matrix of zeros and ones
        of_plane, _ = affine_linear_grad_scales(grad, x, codes[plane : plane + 1], ones, torch.zeros_like(ones))
        result[plane] = of_plane
    return result


@dual_binary_linear.register_fake
def _(x, codes, scales, out_features, group_size, layout):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@dual_binary_linear_grad_input.register_fake
def _(grad, codes, scales, in_features, group_size, layout):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


@dual_binary_linear_grad_scales.register_fake
def _(grad, x, codes, scales):  # type: ignore[no-untyped-def]
    return torch.empty_like(scales, dtype=torch.float32)


def _dual_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, codes, scales, _, *ctx.rest = inputs
    if scales.requires_grad and ctx.rest[-1] != "planes":
        raise ValueError("scales train in the stored layout only")
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(codes, scales, x if scales.requires_grad else None)


def _dual_backward(ctx, grad):  # type: ignore[no-untyped-def]
    codes, scales, x = ctx.saved_tensors
    of_x = of_scales = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.ulbq.dual_binary_linear_grad_input(grad, codes, scales, ctx.columns, *ctx.rest)
    if x is not None:
        of_scales = torch.ops.ulbq.dual_binary_linear_grad_scales(grad, x, codes, scales).to(scales.dtype)
    return of_x, None, of_scales, None, None, None


dual_binary_linear.register_autograd(_dual_backward, setup_context=_dual_save)


# --- codebook ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ulbq::codebook_linear", mutates_args=())
def codebook_linear(
    x: torch.Tensor,
    stored: list[torch.Tensor],
    derived: list[torch.Tensor],
    out_features: int,
    widths: list[int],
    counts: list[int],
    outliers: int,
) -> torch.Tensor:
    """``x · Ŵᵀ`` with levels of its own for every column.

    Args:
        x: ``[..., in]``, floating.
        stored: the tensors of the format, in the order of its scheme's ``tensors``.
        derived: those of :func:`ulbq.kernels.columns.derive`; none where lookups are not to be used.
        out_features: rows of ``Ŵ``.
        widths, counts: how many columns have which width.
        outliers: the scheme's.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    scheme, tensors = _codebook(stored, out_features, x.shape[-1], widths, counts, outliers)
    rows = x.reshape(-1, x.shape[-1])
    if derived and columns.takes(x.dtype, len(rows)):
        product = columns.multiply(rows, scheme, tensors["codes"], tensors["codebooks"], derived)
    else:
        product = torch.nn.functional.linear(rows, codebook.dequantize(scheme, tensors, x.shape[-1], x.dtype))
    return product.view(*x.shape[:-1], out_features)


@torch.library.custom_op("ulbq::codebook_linear_grad_input", mutates_args=())
def codebook_linear_grad_input(
    grad: torch.Tensor,
    stored: list[torch.Tensor],
    in_features: int,
    widths: list[int],
    counts: list[int],
    outliers: int,
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``."""
    scheme, tensors = _codebook(stored, grad.shape[-1], in_features, widths, counts, outliers)
    return grad @ codebook.dequantize(scheme, tensors, in_features, grad.dtype)


@codebook_linear.register_fake
def _(x, stored, derived, out_features, widths, counts, outliers):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@codebook_linear_grad_input.register_fake
def _(grad, stored, in_features, widths, counts, outliers):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _codebook_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, stored, derived, _, *ctx.rest = inputs
    ctx.derived = len(derived)
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*stored)


def _codebook_backward(ctx, grad):  # type: ignore[no-untyped-def]
    stored = list(ctx.saved_tensors)
    of_x = torch.ops.ulbq.codebook_linear_grad_input(grad, stored, ctx.columns, *ctx.rest)
    return of_x, [None] * len(stored), [None] * ctx.derived, None, None, None, None


codebook_linear.register_autograd(_codebook_backward, setup_context=_codebook_save)


def _codebook(
    stored: list[torch.Tensor], outs: int, in_features: int, widths: list[int], counts: list[int], outliers: int
) -> tuple[CodebookScheme, dict[str, torch.Tensor]]:
    scheme = CodebookScheme(widths=dict(zip(widths, counts, strict=True)), outliers=outliers)
    return scheme, dict(zip(scheme.tensors(outs, in_features), stored, strict=True))


# --- BinaryMoS, and column codebooks, in words ------------------------------------------------------------------------


@torch.library.custom_op("ulbq::binary_mos_linear", mutates_args=())
def binary_mos_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    unit: torch.Tensor,
    in_scales: torch.Tensor,
    out_scales: torch.Tensor,
    router: torch.Tensor | None,
    zeros: torch.Tensor | None,
    zeros_of: str,
) -> torch.Tensor:
    """``((x ⊙ s_in(x)) · (B + z)ᵀ) ⊙ s_out(x)`` with the signs in words, gates and scales fused into the kernels.

    It has no gradient: where one is asked for, the layer is composed of :func:`affine_linear` and torch's operators.

    Args:
        x: ``[..., in]`` float16, bfloat16 or float32.
        codes, unit: ``word_codes`` and ``word_scales`` of :func:`ulbq.kernels.words.pack`.
        in_scales, out_scales, router, zeros: as stored.
        zeros_of: ``none``, ``output`` or ``input``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    outs = out_scales.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    scaled, gates, sums = triton_launch.gate(rows, in_scales, router, zeros if zeros_of == "input" else None)
    part = triton_launch.part(codes, unit, None, 1, -1, x.shape[-1])
    mixture = triton_launch.Mixture(gates, sums, out_scales, zeros if zeros_of == "output" else None)
    product = triton_launch.multiply(scaled, [part], outs, mixture=mixture, dtype=x.dtype)
    return product.view(*x.shape[:-1], outs)


@binary_mos_linear.register_fake
def _(x, codes, unit, in_scales, out_scales, router, zeros, zeros_of):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_scales.shape[1]))


# What the two operators below take of a matrix: ``word_codes``, ``word_levels`` and ``word_order``, then the outliers.
_COLUMN_WORDS = ("word_codes", "word_levels", "word_order", "outlier_starts", "outlier_columns", "outlier_deltas")


@torch.library.custom_op("ulbq::codebook_words_linear", mutates_args=())
def codebook_words_linear(
    x: torch.Tensor, packed: list[torch.Tensor], out_features: int, widths: list[int], counts: list[int]
) -> torch.Tensor:
    """``x · Ŵᵀ`` with levels of its own for every column, in words.

    Args:
        x: ``[..., in]``, floating.
        packed: ``word_codes``, ``word_levels`` and ``word_order`` of :func:`ulbq.kernels.words.pack`, and where there
            are outliers ``outlier_starts``, ``outlier_columns`` and ``outlier_deltas``.
        out_features: rows of ``Ŵ``.
        widths, counts: how many columns have which width, widest first.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    rows, by_width = x.reshape(-1, x.shape[-1]), dict(zip(widths, counts, strict=True))
    if x.dtype in triton_launch.FLOATS:
        sections = triton_launch.sections(packed[0], packed[1], packed[2], by_width, out_features)
        product = triton_launch.multiply(rows, sections, out_features, outliers=packed[3:])
    else:
        named = dict(zip(_COLUMN_WORDS, packed, strict=False))
        product = rows @ words.column_weight(named, by_width, out_features, x.shape[-1], x.dtype).T
    return product.view(*x.shape[:-1], out_features)


@torch.library.custom_op("ulbq::codebook_words_linear_grad_input", mutates_args=())
def codebook_words_linear_grad_input(
    grad: torch.Tensor, packed: list[torch.Tensor], in_features: int, widths: list[int], counts: list[int]
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``."""
    rows, by_width = grad.reshape(-1, grad.shape[-1]), dict(zip(widths, counts, strict=True))
    named = dict(zip(_COLUMN_WORDS, packed, strict=False))
    if grad.dtype in triton_launch.FLOATS:
        sections = triton_launch.sections(packed[0], packed[1], packed[2], by_width, grad.shape[-1])
        found = triton_launch.input_gradient(rows, sections, in_features, torch.float32)
        _add_outlier_gradient(found, rows, named)
    else:
        found = rows @ words.column_weight(named, by_width, grad.shape[-1], in_features, grad.dtype)
    return found.to(grad.dtype).view(*grad.shape[:-1], in_features)


@codebook_words_linear.register_fake
def _(x, packed, out_features, widths, counts):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@codebook_words_linear_grad_input.register_fake
def _(grad, packed, in_features, widths, counts):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _codebook_words_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, packed, _, *ctx.rest = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(*packed)


def _codebook_words_backward(ctx, grad):  # type: ignore[no-untyped-def]
    packed = list(ctx.saved_tensors)
    of_x = torch.ops.ulbq.codebook_words_linear_grad_input(grad, packed, ctx.columns, *ctx.rest)
    return of_x, [None] * len(packed), None, None, None


codebook_words_linear.register_autograd(_codebook_words_backward, setup_context=_codebook_words_save)


def _add_outlier_gradient(total: torch.Tensor, grad: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
    """Add to float32 ``[rows, in]`` what outliers make of a gradient ``[rows, out]``, a slab of them at a time."""
    if "outlier_starts" not in packed:
        return
    outputs, places, deltas = words.outlier_outputs(packed), packed["outlier_columns"], packed["outlier_deltas"]
    step = max(1, tiles.SLAB // (4 * max(1, len(grad))))
    for begin in range(0, len(deltas), step):
        some = slice(begin, begin + step)
        total.index_add_(1, places[some], grad[:, outputs[some]].float() * deltas[some])


# --- slabs of dense weights -------------------------------------------------------------------------------------------


def _affine_shape(zeros: torch.Tensor | None, outs: int, columns: int, bits: int, group_size: int) -> tiles.Shape:
    scheme = AffineScheme.model_construct(bits=bits, group_size=group_size, symmetric=zeros is None)
    return tiles.shape_of(scheme, outs, columns)


def _affine_slabs(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outs: int,
    columns: int,
    bits: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Slabs:
    if layout == "tiles":
        packed = tiles.named(codes, scales, zeros)
        return _tiled_slabs(packed, _affine_shape(zeros, outs, columns, bits, group_size), dtype)
    if layout == "words":
        return words.slabs(codes, scales, zeros, outs, columns, AffineScheme.model_construct(bits=bits).centre, dtype)
    floats = _real_zeros(zeros, scales)
    return (
        (
            part,
            reference.affine_weight(
                codes[:, part], scales[part], floats if floats is None else floats[part], columns, dtype
            ),
        )
        for part in _parts(outs, columns, dtype.itemsize)
    )


def _dual_slabs(
    codes: torch.Tensor,
    scales: torch.Tensor,
    outs: int,
    columns: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Slabs:
    if layout == "tiles":
        shape = tiles.shape_of(DualBinaryScheme(group_size=group_size), outs, columns)
        return _tiled_slabs(tiles.named(codes, scales), shape, dtype)
    if layout == "words":
        return words.slabs(codes, scales, None, outs, columns, 0.0, dtype)
    return (
        (part, reference.dual_binary_weight(codes[:, part], scales[:, part], columns, dtype))
        for part in _parts(outs, columns, dtype.itemsize)
    )


def _tiled_slabs(packed: dict[str, torch.Tensor], shape: tiles.Shape, dtype: torch.dtype) -> Slabs:
    if dtype in tiles.FLOATS:
        return tiles.slabs(packed, shape, dtype)
    return ((part, weight.to(dtype)) for part, weight in tiles.slabs(packed, shape, torch.float32))


def _words_gradient(grad: torch.Tensor, part: triton_launch.Part, columns: int) -> torch.Tensor:
    rows = grad.reshape(-1, grad.shape[-1])
    return triton_launch.input_gradient(rows, [part], columns).view(*grad.shape[:-1], columns)


def _real_zeros(zeros: torch.Tensor | None, scales: torch.Tensor) -> torch.Tensor | None:
    """Zero points ``[out, G]`` as floats, so that they can be cut like the scales."""
    if zeros is None or zeros.is_floating_point():
        return zeros
    return unpack_planes(zeros, scales.numel()).view_as(scales).float()


def _parts(outs: int, columns: int, itemsize: int) -> Iterator[slice]:
    step = max(1, tiles.SLAB // (columns * itemsize))
    return (slice(begin, min(begin + step, outs)) for begin in range(0, outs, step))


def _product(rows: torch.Tensor, slabs: Slabs, outs: int) -> torch.Tensor:
    """``[rows, outs]``."""
    result = rows.new_empty(len(rows), outs)
    for part, weight in slabs:
        result[:, part] = torch.nn.functional.linear(rows, weight)
    return result


def _input_gradient(grad: torch.Tensor, slabs: Slabs, columns: int) -> torch.Tensor:
    """``[..., columns]``: summed over slabs in float32, or what is wider."""
    rows = grad.reshape(-1, grad.shape[-1])
    total = rows.new_zeros(len(rows), columns, dtype=torch.promote_types(torch.float32, grad.dtype))
    for part, weight in slabs:
        total += rows[:, part] @ weight
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)

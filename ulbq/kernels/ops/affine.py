"""Products with affine codes as operators of torch: schemas, shapes for tracing, gradients, and what runs them.

Gradients reach the inputs in all forms of a matrix, and in ``planes`` scales and floating zero points too.
"""

from collections.abc import Mapping

import torch

from ulbq.formats import AffineScheme, affine
from ulbq.kernels.ops.dense import PREFIXES, Matrix, matrix, parts


@torch.library.custom_op("ulbq::affine_linear", mutates_args=())
def affine_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    form: str,
    mid_rise: bool = False,
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
        form: ``planes``, ``tiles`` or ``words``.
        mid_rise: of a matrix without zero points, as :class:`~ulbq.formats.affine.AffineScheme` has it.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    scheme = _scheme(bits, group_size, zeros, mid_rise)
    return _matrix(scheme, form, (codes, scales, zeros), out_features, x.shape[-1]).multiply(x)


@torch.library.custom_op("ulbq::affine_linear_grad_input", mutates_args=())
def affine_linear_grad_input(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    form: str,
    mid_rise: bool = False,
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``, of the gradient ``[..., out]`` of the output of :func:`affine_linear`."""
    scheme = _scheme(bits, group_size, zeros, mid_rise)
    return _matrix(scheme, form, (codes, scales, zeros), grad.shape[-1], in_features).input_gradient(grad)


@torch.library.custom_op("ulbq::affine_linear_grad_scales", mutates_args=())
def affine_linear_grad_scales(
    grad: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    mid_rise: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of scales and of zero points, each ``[out, G]`` float32, in the form ``planes``."""
    ones = torch.ones_like(scales, dtype=torch.float32)
    centred = torch.empty_like(ones)
    total = torch.empty_like(ones)
    rows = x.reshape(-1, x.shape[-1])
    gradient = grad.reshape(-1, grad.shape[-1])
    offsets = _offsets(_scheme(len(codes), -1, zeros, mid_rise), scales, zeros)
    for part in parts(len(scales), x.shape[-1], 4):
        weight = (gradient[:, part].T.float() @ rows.float()).unflatten(1, (scales.shape[1], -1))
        some = offsets if isinstance(offsets, float) else offsets[part]
        codes_of = affine.weight(codes[:, part], ones[part], some, x.shape[-1], torch.float32)
        centred[part] = (weight * codes_of.view_as(weight)).sum(-1)
        total[part] = weight.sum(-1)
    return centred, -scales.float() * total


@affine_linear.register_fake
def _(x, codes, scales, zeros, out_features, bits, group_size, form, mid_rise=False):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@affine_linear_grad_input.register_fake
def _(grad, codes, scales, zeros, in_features, bits, group_size, form, mid_rise=False):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


@affine_linear_grad_scales.register_fake
def _(grad, x, codes, scales, zeros, mid_rise=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(scales, dtype=torch.float32), torch.empty_like(scales, dtype=torch.float32)


def _affine_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, _, *ctx.rest = inputs
    trained = scales.requires_grad or (zeros is not None and zeros.requires_grad)
    if trained and ctx.rest[-2] != "planes":
        raise ValueError("scales and zero points train in the stored layout only")
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, scales, zeros, x if trained else None)


def _affine_backward(ctx, grad):  # type: ignore[no-untyped-def]
    codes, scales, zeros, x = ctx.saved_tensors
    of_x = of_scales = of_zeros = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.ulbq.affine_linear_grad_input(grad, codes, scales, zeros, ctx.in_features, *ctx.rest)
    if x is not None:
        mid_rise = ctx.rest[-1]
        of_scales, of_zeros = torch.ops.ulbq.affine_linear_grad_scales(grad, x, codes, scales, zeros, mid_rise)
        of_scales = of_scales.to(scales.dtype) if ctx.needs_input_grad[2] else None
        of_zeros = of_zeros.to(zeros.dtype) if ctx.needs_input_grad[3] else None
    return of_x, None, of_scales, of_zeros, None, None, None, None, None


affine_linear.register_autograd(_affine_backward, setup_context=_affine_save)


def multiply(
    scheme: AffineScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """``[..., out]`` of inputs ``[..., in]`` and a matrix in ``planes``, ``tiles`` or ``words``."""
    product: torch.Tensor = torch.ops.ulbq.affine_linear(
        x, *_named(form, tensors), out_features, scheme.bits, scheme.group_size, form, scheme.mid_rise
    )
    return product


def matrix_of(
    scheme: AffineScheme, form: str, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int
) -> Matrix:
    """The matrix by the tensors of a form."""
    return _matrix(scheme, form, _named(form, tensors), out_features, in_features)


def _named(form: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    prefix = PREFIXES[form]
    return tensors[f"{prefix}codes"], tensors[f"{prefix}scales"], tensors.get(f"{prefix}zeros")


def _scheme(bits: int, group_size: int, zeros: torch.Tensor | None, mid_rise: bool) -> AffineScheme:
    return AffineScheme.model_construct(bits=bits, group_size=group_size, symmetric=zeros is None, mid_rise=mid_rise)


def _offsets(scheme: AffineScheme, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor | float:
    """Zero points of a matrix in ``planes``, ``[out, G]`` or one for all."""
    return scheme.centre if zeros is None else affine.real_zeros(zeros, scales)


def _matrix(
    scheme: AffineScheme,
    form: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    out_features: int,
    in_features: int,
) -> Matrix:
    codes, scales, zeros = tensors
    offsets = _offsets(scheme, scales, zeros) if form == "planes" else 0.0

    def slab(part: slice, dtype: torch.dtype) -> torch.Tensor:
        some = offsets if isinstance(offsets, float) else offsets[part]
        return affine.weight(codes[:, part], scales[part], some, in_features, dtype)

    return matrix(scheme, form, tensors, out_features, in_features, slab)

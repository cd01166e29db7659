"""Products with two bit planes as operators of torch; forms and gradients are as in :mod:`~ulbq.kernels.ops.affine`."""

from collections.abc import Mapping

import torch

from ulbq.formats import DualBinaryScheme, dual_binary
from ulbq.kernels.ops.affine import affine_linear_grad_scales
from ulbq.kernels.ops.dense import PREFIXES, Matrix, matrix


@torch.library.custom_op("ulbq::dual_binary_linear", mutates_args=())
def dual_binary_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out_features: int, group_size: int, form: str
) -> torch.Tensor:
    """``x · Ŵᵀ`` with ``Ŵ = α₁b₁ + α₂b₂``; in ``planes`` codes are ``[2, out, ceil(in/8)]``, scales ``[2, out, G]``.

    The rest is as in :func:`affine_linear`.
    """
    return _matrix(codes, scales, out_features, x.shape[-1], group_size, form).multiply(x)


@torch.library.custom_op("ulbq::dual_binary_linear_grad_input", mutates_args=())
def dual_binary_linear_grad_input(
    grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, in_features: int, group_size: int, form: str
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``."""
    return _matrix(codes, scales, grad.shape[-1], in_features, group_size, form).input_gradient(grad)


@torch.library.custom_op("ulbq::dual_binary_linear_grad_scales", mutates_args=())
def dual_binary_linear_grad_scales(
    grad: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Gradient of both scales, ``[2, out, G]`` float32, in the form ``planes``."""
    result = torch.empty_like(scales, dtype=torch.float32)
    ones = torch.ones_like(result[0])
    for plane in range(2):  # each plane is a matrix of zeros and ones
        of_plane, _ = affine_linear_grad_scales(grad, x, codes[plane : plane + 1], ones, torch.zeros_like(ones))
        result[plane] = of_plane
    return result


@dual_binary_linear.register_fake
def _(x, codes, scales, out_features, group_size, form):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@dual_binary_linear_grad_input.register_fake
def _(grad, codes, scales, in_features, group_size, form):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


@dual_binary_linear_grad_scales.register_fake
def _(grad, x, codes, scales):  # type: ignore[no-untyped-def]
    return torch.empty_like(scales, dtype=torch.float32)


def _dual_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, codes, scales, _, *ctx.rest = inputs
    if scales.requires_grad and ctx.rest[-1] != "planes":
        raise ValueError("scales train in the stored layout only")
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, scales, x if scales.requires_grad else None)


def _dual_backward(ctx, grad):  # type: ignore[no-untyped-def]
    codes, scales, x = ctx.saved_tensors
    of_x = of_scales = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.ulbq.dual_binary_linear_grad_input(grad, codes, scales, ctx.in_features, *ctx.rest)
    if x is not None:
        of_scales = torch.ops.ulbq.dual_binary_linear_grad_scales(grad, x, codes, scales).to(scales.dtype)
    return of_x, None, of_scales, None, None, None


dual_binary_linear.register_autograd(_dual_backward, setup_context=_dual_save)


def multiply(
    scheme: DualBinaryScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """``[..., out]`` of inputs ``[..., in]`` and a matrix in ``planes``, ``tiles`` or ``words``."""
    codes, scales = (tensors[PREFIXES[form] + name] for name in ("codes", "scales"))
    product: torch.Tensor = torch.ops.ulbq.dual_binary_linear(x, codes, scales, out_features, scheme.group_size, form)
    return product


def matrix_of(
    scheme: DualBinaryScheme, form: str, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int
) -> Matrix:
    """The matrix by the tensors of a form."""
    codes, scales = (tensors[PREFIXES[form] + name] for name in ("codes", "scales"))
    return _matrix(codes, scales, out_features, in_features, scheme.group_size, form)


def _matrix(
    codes: torch.Tensor, scales: torch.Tensor, out_features: int, in_features: int, group_size: int, form: str
) -> Matrix:
    def slab(part: slice, dtype: torch.dtype) -> torch.Tensor:
        return dual_binary.weight(codes[:, part], scales[:, part], in_features, dtype)

    scheme = DualBinaryScheme.model_construct(group_size=group_size)
    return matrix(scheme, form, (codes, scales, None), out_features, in_features, slab)

"""Products with packed matrices as one operator of torch: schema, shapes for tracing, and the gradient of the inputs.

What a matrix is made of goes through the operator as tensors, and as whole numbers that tell its scheme.
"""

from collections.abc import Mapping

import torch

from ulbq.formats import AnyScheme
from ulbq.kernels.ops import affine, codebook, dual_binary, k_quant, trellis
from ulbq.kernels.ops.operands import Matrix, Operands

OPERANDS: dict[str, Operands] = {
    "affine": affine.OPERANDS,
    "codebook": codebook.OPERANDS,
    "dual_binary": dual_binary.OPERANDS,
    "k_quant": k_quant.OPERANDS,
    "trellis": trellis.OPERANDS,
}
"""By format."""


@torch.library.custom_op("ulbq::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor, tensors: list[torch.Tensor], numbers: list[int], format: str, form: str, out_features: int
) -> torch.Tensor:
    """``x · Ŵᵀ``.

    Args:
        x: ``[..., in]``, floating.
        tensors: the matrix, in the order of its :class:`Operands`.
        numbers: its scheme, as they tell it.
        format: of the matrix.
        form: of the tensors: ``planes`` as stored, ``compiled`` the same for kernels that read them, ``tiles``,
            ``words`` or ``bytes`` as the ``pack`` of these modules says.
        out_features: rows of ``Ŵ``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    return _product(x, tensors, numbers, format, form, out_features)


@torch.library.custom_op("ulbq::packed_linear_grad_input", mutates_args=())
def packed_linear_grad_input(
    grad: torch.Tensor, tensors: list[torch.Tensor], numbers: list[int], format: str, form: str, in_features: int
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``, of the gradient ``[..., out]`` of the output of :func:`packed_linear`."""
    matrix = OPERANDS[format].matrix(numbers, form, tensors, grad.shape[-1], in_features)
    found = matrix.input_gradient(grad.reshape(-1, grad.shape[-1]))
    return found.to(grad.dtype).view(*grad.shape[:-1], in_features)


@packed_linear.register_fake
@packed_linear_grad_input.register_fake
def _(x, tensors, numbers, format, form, features):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], features))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, tensors, *ctx.rest, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    tensors = list(ctx.saved_tensors)
    of_x = torch.ops.ulbq.packed_linear_grad_input(grad, tensors, *ctx.rest, ctx.in_features)
    return of_x, [None] * len(tensors), *[None] * 4


packed_linear.register_autograd(_backward, setup_context=_save)


def _product(
    x: torch.Tensor, tensors: list[torch.Tensor], numbers: list[int], format: str, form: str, out_features: int
) -> torch.Tensor:
    matrix = OPERANDS[format].matrix(numbers, form, tensors, out_features, x.shape[-1])
    return matrix.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], out_features)


def arguments(
    scheme: AnyScheme, form: str, tensors: Mapping[str, torch.Tensor], in_features: int
) -> tuple[list[torch.Tensor], list[int], str, str]:
    """What :func:`packed_linear` takes of a matrix between the inputs and the number of outputs."""
    operands = OPERANDS[scheme.format]
    given = [tensors[name] for name in operands.names(form) if name in tensors]
    return given, operands.numbers(scheme, in_features), scheme.format, form


def multiply(
    scheme: AnyScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """``[..., out]`` of inputs ``[..., in]`` and a matrix by the tensors of a form."""
    given = arguments(scheme, form, tensors, x.shape[-1])
    if is_plain(x):
        return _product(x, *given, out_features)
    product: torch.Tensor = torch.ops.ulbq.packed_linear(x, *given, out_features)
    return product


def is_plain(x: torch.Tensor) -> bool:
    """Whether nobody traces or differentiates: torch's way to an operator is then half of what a vector takes."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return type(x) is torch.Tensor and not x.is_meta


def matrix(
    scheme: AnyScheme, form: str, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int
) -> Matrix:
    """The matrix by the tensors of a form."""
    given, numbers, name, _ = arguments(scheme, form, tensors, in_features)
    return OPERANDS[name].matrix(numbers, form, given, out_features, in_features)

"""The products of packed matrices, one module a format."""

from collections.abc import Callable, Mapping

import torch

from ulbq import formats
from ulbq.formats import AnyScheme
from ulbq.kernels.ops import binary_mos, linear

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(linear.OPERANDS, linear.multiply),
    "binary_mos": binary_mos.multiply,
}
"""By format; one that is not here is multiplied by its dense weight."""


def multiply(
    scheme: AnyScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """The product ``[..., out]`` of inputs ``[..., in]``, in their dtype.

    Args:
        scheme: of the matrix.
        form: ``planes`` for tensors as stored, ``compiled`` for the same where compiled code reads
            them, ``tiles`` or ``words`` for those of these layouts.
        tensors: the matrix.
        x: the inputs.
        out_features: rows of the matrix.
    """
    if scheme.format in PRODUCTS:
        return PRODUCTS[scheme.format](scheme, form, tensors, x, out_features)
    return formats.multiply(scheme, tensors, x, formats.matrix(scheme, tensors, x.shape[-1], x.dtype))

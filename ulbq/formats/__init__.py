"""How a weight matrix is stored. A format knows nothing of training, models or files."""

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field

from ulbq.formats import affine, binary_mos, codebook, dual_binary
from ulbq.formats.affine import AffineScheme
from ulbq.formats.binary_mos import BinaryMosScheme
from ulbq.formats.codebook import CodebookScheme
from ulbq.formats.dual_binary import DualBinaryScheme

AnyScheme = AffineScheme | DualBinaryScheme | BinaryMosScheme | CodebookScheme
"""Any scheme, as a type."""

Scheme = Annotated[AnyScheme, Field(discriminator="format")]
"""Any scheme, as a field; pydantic picks the class by its ``format``."""

__all__ = [
    "AffineScheme",
    "AnyScheme",
    "BinaryMosScheme",
    "CodebookScheme",
    "DualBinaryScheme",
    "Scheme",
    "bits_per_weight",
    "dequantize",
    "is_one_matrix",
    "matrix",
    "multiply",
    "nominal",
    "sparsity",
]

_DEQUANTIZE: dict[str, Callable[..., torch.Tensor]] = {
    "affine": affine.dequantize,
    "dual_binary": dual_binary.dequantize,
    "binary_mos": binary_mos.dequantize,
    "codebook": codebook.dequantize,
}
# What a layer multiplies by, where that is not the weight itself, and how.
_MATRIX: dict[str, Callable[..., torch.Tensor]] = {"binary_mos": binary_mos.matrix}
_MULTIPLY: dict[str, Callable[..., torch.Tensor]] = {"binary_mos": binary_mos.multiply}
_SPARSITY: dict[str, Callable[..., tuple[float, float]]] = {"dual_binary": dual_binary.sparsity}


def dequantize(
    scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights of a packed matrix, in ``dtype``.

    Where :func:`is_one_matrix` says no, this is the weight at uniform gates: right for figures about the weight, not
    for running the layer.
    """
    return _DEQUANTIZE[scheme.format](scheme, tensors, in_features, dtype)


def nominal(scheme: AnyScheme) -> AnyScheme:
    """The scheme that all layers of a model share, where each counts the columns of its own matrix."""
    return scheme.nominal if isinstance(scheme, CodebookScheme) else scheme


def is_one_matrix(scheme: AnyScheme) -> bool:
    """Whether a dense weight can stand for the layer; a mixture of experts has another weight for every token."""
    return not (isinstance(scheme, BinaryMosScheme) and scheme.experts > 1)


def matrix(
    scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` what :func:`multiply` takes, and what is worth keeping between calls: mostly the weight itself."""
    return _MATRIX.get(scheme.format, _DEQUANTIZE[scheme.format])(scheme, tensors, in_features, dtype)


def multiply(
    scheme: AnyScheme,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    factor: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's product ``[..., out]`` of inputs ``[..., in]`` and what :func:`matrix` gave, plus the bias."""
    special = _MULTIPLY.get(scheme.format)
    if special is None:
        return torch.nn.functional.linear(x, factor, bias)
    product = special(scheme, tensors, x, factor)
    return product if bias is None else product + bias


def sparsity(scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> tuple[float, float] | None:
    """Share of zeros in each of two planes; None where the format has no planes that skip zeros."""
    count = _SPARSITY.get(scheme.format)
    return None if count is None else count(scheme, tensors, in_features)


def bits_per_weight(scheme: AnyScheme, out_features: int, in_features: int) -> float:
    """Exact stored bits per weight of one matrix, whatever decodes it included."""
    specs = scheme.tensors(out_features, in_features)
    return sum(spec.bits for spec in specs.values()) / (out_features * in_features)

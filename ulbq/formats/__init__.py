"""How a weight matrix is stored. A format knows nothing of training, models or files."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

from ulbq.formats import affine, dual_binary
from ulbq.formats.affine import AffineScheme
from ulbq.formats.dual_binary import DualBinaryScheme

Scheme = Annotated[AffineScheme | DualBinaryScheme, Field(discriminator="format")]
"""Any scheme; pydantic picks the class by its ``format``."""

__all__ = ["AffineScheme", "DualBinaryScheme", "Scheme", "bits_per_weight", "dequantize"]


def dequantize(
    scheme: AffineScheme | DualBinaryScheme,
    tensors: Mapping[str, torch.Tensor],
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``[out, in]`` weights of a packed matrix, in ``dtype``."""
    if isinstance(scheme, AffineScheme):
        return affine.dequantize(scheme, tensors, in_features, dtype)
    return dual_binary.dequantize(tensors, in_features, dtype)


def bits_per_weight(scheme: AffineScheme | DualBinaryScheme, out_features: int, in_features: int) -> float:
    """Exact stored bits per weight of one matrix, scales and zeros included."""
    specs = scheme.tensors(out_features, in_features)
    return sum(spec.bits for spec in specs.values()) / (out_features * in_features)

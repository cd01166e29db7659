"""How a weight matrix is stored. A format knows nothing of training, models or files."""

from collections.abc import Mapping
from typing import Any

import torch

from ulbq.formats import affine, binary_mos, codebook, dual_binary, k_quant, trellis
from ulbq.formats.affine import AffineScheme
from ulbq.formats.binary_mos import BinaryMosScheme
from ulbq.formats.bits import Format, stored_bits
from ulbq.formats.codebook import CodebookScheme
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.formats.k_quant import KQuantScheme
from ulbq.formats.trellis import TrellisScheme

AnyScheme = AffineScheme | DualBinaryScheme | BinaryMosScheme | CodebookScheme | TrellisScheme | KQuantScheme
"""Any scheme, as a type."""
UniformScheme = AffineScheme | KQuantScheme
"""Those whose levels lie at equal distances in every group."""

__all__ = [
    "FORMATS",
    "AffineScheme",
    "AnyScheme",
    "BinaryMosScheme",
    "CodebookScheme",
    "DualBinaryScheme",
    "Format",
    "KQuantScheme",
    "TrellisScheme",
    "UniformScheme",
    "bits_per_weight",
    "dequantize",
    "matrix",
    "multiply",
    "read_scheme",
    "sparsity",
    "total_bits",
]

FORMATS: dict[str, Format] = {
    "affine": affine.FORMAT,
    "dual_binary": dual_binary.FORMAT,
    "binary_mos": binary_mos.FORMAT,
    "codebook": codebook.FORMAT,
    "trellis": trellis.FORMAT,
    "k_quant": k_quant.FORMAT,
}
"""Every format by the name that its schemes have."""


def read_scheme(value: Any) -> AnyScheme:
    """A scheme as JSON has it. Raises ValueError where this version does not know its format, or it is none."""
    name = value.get("format") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"no format is called {name!r}")
    found: AnyScheme = FORMATS[name].scheme.model_validate(value)  # type: ignore[assignment]
    return found


def dequantize(
    scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights of a packed matrix, in ``dtype``.

    Where the scheme's ``is_one_matrix`` says no, this is the weight at uniform gates: right for figures about the
    weight, not for running the layer.
    """
    return FORMATS[scheme.format].dequantize(scheme, tensors, in_features, dtype)


def matrix(
    scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` what :func:`multiply` takes, and what is worth keeping between calls: mostly the weight itself."""
    form = FORMATS[scheme.format]
    return (form.matrix or form.dequantize)(scheme, tensors, in_features, dtype)


def multiply(
    scheme: AnyScheme,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    factor: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's product ``[..., out]`` of inputs ``[..., in]`` and what :func:`matrix` gave, plus the bias."""
    special = FORMATS[scheme.format].multiply
    if special is None:
        return torch.nn.functional.linear(x, factor, bias)
    product = special(scheme, tensors, x, factor)
    return product if bias is None else product + bias


def sparsity(scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> tuple[float, float] | None:
    """Share of zeros in each of two planes; None where the format has no planes that skip zeros."""
    count = FORMATS[scheme.format].sparsity
    return None if count is None else count(scheme, tensors, in_features)


def total_bits(scheme: AnyScheme, shape: tuple[int, int]) -> int:
    """Stored bits of one matrix ``(out, in)``, whatever decodes it included."""
    return sum(stored_bits(scheme.tensors(*shape)).values())


def bits_per_weight(scheme: AnyScheme, out_features: int, in_features: int) -> float:
    """The same for each of its weights."""
    return total_bits(scheme, (out_features, in_features)) / (out_features * in_features)

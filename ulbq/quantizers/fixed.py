"""Codes that are decided: scales train alone, and what lies in memory are the packed codes (EfficientQAT's E2E-QP).

The quantizers that let weights move choose codes anew at every call. After their training many weights lie at the very
border of their codes' cells, as near to the full-precision ones as the codes allow; a change of the scale by a
thousandth would undo what the codes have learnt.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from ulbq.formats import AffineScheme, AnyScheme, DualBinaryScheme, affine, dual_binary
from ulbq.quantizers.base import SCALE_FLOOR, Quantizer


class _Fixed(Quantizer):
    """A packed matrix whose scales train.

    Args:
        tensors: as packed.
        scheme: of the format.
        in_features: columns.

    Attributes:
        scales: as stored, ``[..., out, G]`` float32, relative to where they started.
        start: where they started, with :data:`~ulbq.quantizers.base.SCALE_FLOOR` for those that were 0.
    """

    start: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, in_features: int) -> None:
        super().__init__()
        self.scheme = scheme
        self._in_features = in_features
        self._names = [name for name in tensors if name != "scales"]
        for name in self._names:
            self.register_buffer(f"packed_{name}", tensors[name])
        scales = tensors["scales"].float()
        self.register_buffer("start", torch.where(scales == 0, SCALE_FLOOR, scales))
        self.scales = nn.Parameter(torch.ones_like(scales))

    @abstractmethod
    def levels(self) -> torch.Tensor:
        """What the scales multiply, ``[..., out, G, g]``, in their dtype."""

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in the scales."""
        weight = self.levels() * (self.scales * self.start).unsqueeze(-1)
        while weight.dim() > 3:
            weight = weight.sum(0)
        return weight.flatten(1).to(dtype)

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``scales``."""
        return {"weights": [], "scales": [self.scales]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales are rounded to float16 only here."""
        return self._packed() | {"scales": (self.scales * self.start).to(torch.float16)}

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says; ``train_weights`` must be False."""
        if train_weights:
            raise ValueError("the codes are fixed")
        return cls(tensors, scheme, weight.shape[1])

    def _packed(self) -> dict[str, torch.Tensor]:
        return {name: self.get_buffer(f"packed_{name}") for name in self._names}


class FixedAffine(_Fixed):
    """Affine codes and zero points that stay."""

    scheme: AffineScheme

    def levels(self) -> torch.Tensor:
        """``q − z``, ``[out, G, g]``."""
        codes, _, zeros = affine.unpack(self.scheme, self._packed() | {"scales": self.start}, self._in_features)
        return codes.view(*zeros.shape, -1) - zeros.unsqueeze(-1)


class FixedDualBinary(_Fixed):
    """Two bit planes that stay."""

    scheme: DualBinaryScheme

    def levels(self) -> torch.Tensor:
        """The planes, ``[2, out, G, g]``."""
        planes, scales = dual_binary.unpack(self.scheme, self._packed() | {"scales": self.start}, self._in_features)
        return planes.view(*scales.shape, -1).float()

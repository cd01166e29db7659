"""Weights that train on grids with scales in two levels (:mod:`ulbq.formats.k_quant`), which stay as they were found.

Scales and minima of groups do not train: they are whole numbers of four or six bits, whose rounding has no gradient.
The factors of super-blocks train once the codes are decided.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from ulbq.formats import AnyScheme, KQuantScheme, k_quant
from ulbq.formats.k_quant import KQuant
from ulbq.quantizers.affine import AffineForm, AffineQuantizer
from ulbq.quantizers.fixed import Dequantize, FixedCodes

_GRIDS = KQuant._fields[1:]


class KQuantizer(AffineQuantizer):
    """One weight matrix under training.

    Args:
        weight: ``[out, in]``, the full-precision weight.
        start: the grids, as :func:`ulbq.solvers.k_quant.find_grids` gives them; its codes are not looked at.
        scheme: the format's parameters.
        train_weights: let the weights move; without it nothing does.
    """

    scheme: KQuantScheme

    def __init__(
        self, weight: torch.Tensor, start: KQuant, scheme: KQuantScheme, *, train_weights: bool = True
    ) -> None:
        fixed = AffineForm(grid="fixed")
        super().__init__(weight, start.scales, start.zeros, scheme, train_weights=train_weights, form=fixed)
        for name in _GRIDS:
            self.register_buffer(f"grid_{name}", getattr(start, name))

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format."""
        grids = (self.get_buffer(f"grid_{name}") for name in _GRIDS)
        return k_quant.pack(self.scheme, KQuant(self._codes(*self._grid()), *grids))

    @classmethod
    def from_packed(  # type: ignore[override]
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says."""
        if not isinstance(scheme, KQuantScheme):
            raise TypeError(f"{scheme.format} is not k_quant")
        start = k_quant.unpack(scheme, tensors, weight.shape[1])
        made = cls(weight, start, scheme, train_weights=train_weights)
        made._go_on(start.codes, start.scales, start.zeros)
        return made

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales in units and zero points in codes, both ``[out, G]``; these are no whole numbers."""
        return self.scales, self.zeros


class FixedKQuant(FixedCodes):
    """Codes that stay, and whole numbers of groups; the two factors of super-blocks train.

    Args:
        tensors: as packed.
        scheme: of the format.
        in_features: columns.

    Attributes:
        factors, minima: ``[out, in/256]`` float32, relative to where they started.
    """

    Scheme = KQuantScheme
    scheme: KQuantScheme

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: KQuantScheme, in_features: int) -> None:
        super().__init__(tensors, scheme, in_features)
        self.scheme = scheme
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(f"packed_{name}", tensor)
        self._in_features = in_features
        ones = torch.ones_like(tensors["scales"], dtype=torch.float32)
        self.factors = nn.Parameter(ones)
        self.minima = None if scheme.symmetric else nn.Parameter(ones.clone())

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in what trains."""
        matrix = self._matrix()
        planes = self.get_buffer("packed_codes")
        weight: torch.Tensor = Dequantize.apply(matrix.scales, matrix.zeros, planes, self._in_features, dtype)  # type: ignore[no-untyped-call]
        return weight

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``scales``."""
        return {"weights": [], "scales": [self.factors, *([] if self.minima is None else [self.minima])]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; factors are rounded to float16 only here."""
        matrix, packed = self._matrix(), {name: self.get_buffer(f"packed_{name}") for name in self._names}
        trained = {"scales": k_quant.stored_factors(matrix.factors), "minima": matrix.minima}
        return packed | {name: values.to(torch.float16) for name, values in trained.items() if name in packed}

    def _matrix(self) -> KQuant:
        stored = {name: self.get_buffer(f"packed_{name}") for name in self._names}
        matrix = k_quant.unpack_grids(self.scheme, stored, self._in_features)
        minima = matrix.minima if self.minima is None else matrix.minima * self.minima
        return matrix._replace(factors=matrix.factors * self.factors, minima=minima)

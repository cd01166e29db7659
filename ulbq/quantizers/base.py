"""What every quantizer gives: the trainable stand-in of one weight matrix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from ulbq.formats import AnyScheme

SCALE_FLOOR = 1e-8
"""Smallest grid step; a group of zeros keeps it and its codes stay 0. Rounds to 0 in float16, harmlessly."""

CELL_MARGIN = 1e-3
"""Grid steps that a latent keeps from the border of its code's cell, so that rounding gives that code back."""

_CAST = "_ulbq_cast"


def remember_cast(x: torch.Tensor, cast: torch.Tensor) -> None:
    """Have :func:`cast_once` give ``cast`` for ``x`` while its values stay."""
    setattr(x, _CAST, (x._version, cast))


def cast_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in another dtype, the same tensor for all layers that read it: their gradients meet there, in one cast."""
    if x.dtype == dtype:
        return x
    version, known = getattr(x, _CAST, (None, x))
    differentiable = x.requires_grad and torch.is_grad_enabled()
    if version != x._version or known.dtype != dtype or known.requires_grad != differentiable:
        known = x.to(dtype)
        remember_cast(x, known)
    return known


class Quantizer(nn.Module, ABC):
    """One ``[out, in]`` weight under training.

    Whatever trains is kept in *grid steps*, relative to where it started, so that one learning rate means the same in
    every group of every layer of every model.

    Attributes:
        scheme: of the format that :meth:`finalize` packs into.
    """

    scheme: AnyScheme

    def get_buffer(self, target: str) -> torch.Tensor:
        """What lies beside what trains; where the layer is sharded (``training/sharding.py``), it is a parameter."""
        return super().get_buffer(target) if target in self._buffers else self.get_parameter(target)

    @abstractmethod
    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix ``[out, in]`` that the layer multiplies by, in ``dtype``; differentiable in what trains."""

    def multiply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The layer's product ``[..., out]`` of inputs ``[..., in]`` and the matrix that :meth:`forward` gave."""
        return nn.functional.linear(cast_once(x, matrix.dtype), matrix)

    def dense(self, matrix: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, in]`` that the matrix stands for."""
        return matrix

    @abstractmethod
    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights``, ``scales``, ``router``; each role has its own rate."""

    @abstractmethod
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales are rounded to float16 only here."""

    def check_product(self, linear: str, packed: Mapping[str, torch.Tensor], *, size: float = 1.0) -> None:
        """Compare products of the packed layer with those of this one, where the weight does not tell them.

        Args:
            linear: name of the layer, for the error.
            packed: as :meth:`finalize` gave it.
            size: root mean square of the layer's inputs.

        Raises:
            NumericsError: they differ by more than rounding, or are not finite.
        """

    @classmethod
    @abstractmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors: :meth:`finalize` right afterwards gives the same tensors back.

        Args:
            weight: ``[out, in]``, the full-precision weight; its latent starts at the point of its stored code's cell
                that is nearest to it.
            tensors: as :meth:`finalize` gave them.
            scheme: of the format.
            train_weights: let the weights move.
        """

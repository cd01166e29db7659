"""A linear layer that holds its weight packed."""

from collections.abc import Mapping

import torch
from torch import nn

from ulbq import formats
from ulbq.formats import AffineScheme, DualBinaryScheme


def linear_layer(block: nn.Module, name: str) -> nn.Linear:
    """A dense linear layer inside a block. Raises TypeError where ``name`` is something else."""
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"'{name}' is a {type(layer).__name__}, not a linear layer")
    return layer


class QuantLinear(nn.Module):
    """``y = x · Ŵᵀ + b`` with ``Ŵ`` stored in one of the formats.

    Args:
        scheme: the weight's format.
        in_features, out_features: the dense weight's dimensions.
        bias: whether the layer adds a bias.
        cache: keep the dequantized weight after the first call (twice the bytes of bf16 weights, no work per call).

    The buffers carry the names, dtypes and shapes of ``scheme.tensors(out_features, in_features)``; ``bias`` is a
    parameter. Without ``cache`` the weight is dequantized at every call.
    """

    def __init__(
        self,
        scheme: AffineScheme | DualBinaryScheme,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        cache: bool = False,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        self.cache = cache
        self._dense: torch.Tensor | None = None
        for name, spec in scheme.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The packed tensors, by their stored names."""
        return dict(self.named_buffers(recurse=False))

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over packed tensors, without a copy. Raises ``ValueError`` where a name, dtype or shape differs."""
        for name, spec in self.scheme.tensors(self.out_features, self.in_features).items():
            given = tensors.get(name)
            if given is None or tuple(given.shape) != spec.shape or given.dtype != getattr(torch, spec.dtype):
                raise ValueError(f"'{name}' must be {spec.dtype} {list(spec.shape)}")
            setattr(self, name, given)
        self._dense = None

    def weight_dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight ``[out, in]``, where the packed tensors are."""
        tensors = self.tensors()
        kept = self._dense
        if kept is not None and kept.dtype == dtype and kept.device == tensors["codes"].device:
            return kept
        dense = formats.dequantize(self.scheme, tensors, self.in_features, dtype)
        if self.cache:
            self._dense = dense
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight_dense(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.format} {self.scheme.label}"

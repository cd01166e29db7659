"""Packed linear layers whose scales train while something else, an adapter, stands beside them."""

import torch
from torch import nn

from ulbq.quantizers.base import Quantizer


class ScaledLinear(nn.Linear):
    """A linear layer with fixed codes and trainable scales: ``y = x · Ŵᵀ + b``.

    It is an ``nn.Linear`` to others, so that peft puts adapters beside it; ``weight`` is no parameter but the
    dequantized weight, to be read only.

    Args:
        quantizer: of the weight, its codes fixed.
        in_features, out_features: the weight's dimensions.
        bias: of the layer it stands for.
    """

    def __init__(self, quantizer: Quantizer, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        # Not nn.Linear's own, which would make the weight a parameter.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.quantizer = quantizer
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """``[out, in]`` float32, the weight as it is now, without a gradient."""
        with torch.no_grad():
            return self.quantizer.dense(self.quantizer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``, or of autocast where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = self.quantizer.multiply(x, self.quantizer(x.dtype))
        return product if self.bias is None else product + self.bias.to(product.dtype)

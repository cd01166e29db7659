"""A linear layer under training."""

import torch
from torch import nn

from ulbq.nn.adapter import Adapter
from ulbq.quantizers.base import Quantizer


class TrainedLinear(nn.Linear):
    """A linear layer whose weight a quantizer makes anew at every call, with an adapter beside it where wanted.

    It is an ``nn.Linear`` to others, so that peft puts adapters beside it as well; ``weight`` is no parameter but the
    dequantized weight, to be read only.

    Args:
        quantizer: of the weight.
        bias: of the layer it stands for.
        adapter: LoRA or DoRA on top; None without.

    Attributes:
        adapted: whether the adapter takes part; switched off, the layer is what it would be without.
        matrix: what the quantizer gave at the last call, for penalties on the weight; None until called.
    """

    def __init__(self, quantizer: Quantizer, bias: nn.Parameter | None, adapter: Adapter | None = None) -> None:
        # Not nn.Linear's own, which would make the weight a parameter.
        nn.Module.__init__(self)
        self.quantizer = quantizer
        self.register_parameter("bias", bias)
        self.adapter = adapter
        self.adapted = True
        self.matrix: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """``[out, in]`` float32, the quantized weight as it is now, without a gradient."""
        with torch.no_grad():
            return self.quantizer.dense(self.quantizer())

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of the weight."""
        return self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        matrix = self.quantizer(dtype)
        self.matrix = matrix if torch.is_grad_enabled() else None
        output = self.quantizer.multiply(x, matrix)
        if self.adapter is not None and self.adapted:
            output = self.adapter(x, output, lambda: self.quantizer.dense(matrix))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def weight_now(self, *, with_adapter: bool) -> torch.Tensor:
        """The weight ``[out, in]`` that the layer stands for now, differentiable.

        Taken from the last call where there was one in this step, so that it costs no second quantization.
        """
        matrix = self.quantizer() if self.matrix is None else self.matrix
        dense = self.quantizer.dense(matrix).float()
        if with_adapter and self.adapter is not None:
            return self.adapter.merged(dense)
        return dense

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role, the adapter's among them."""
        roles = dict(self.quantizer.trainable())
        if self.adapter is not None:
            roles["adapter"] = list(self.adapter.parameters())
        return roles

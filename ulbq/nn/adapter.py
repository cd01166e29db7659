"""Low-rank adapters beside a linear layer: LoRA (https://arxiv.org/abs/2106.09685) and DoRA (2402.09353).

``y = x·Ŵᵀ + (alpha/rank)·x·Aᵀ·Bᵀ`` for LoRA; DoRA scales the whole by ``magnitude / ‖Ŵ + (alpha/rank)·B·A‖`` of each
output row. The numbers are those of the peft library, which loads what is written here (``models/adapter_files.py``).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ulbq.config.adapter import AdapterConfig

# On a row of zeros DoRA would divide by its norm. A trace of the adapter keeps the row finite; its magnitude of zero
# keeps the row silent.
TRACE = 1e-3


class Adapter(nn.Module):
    """The trainable part beside one weight ``[out, in]``. It starts as no change at all: B is zero.

    Args:
        config: its form.
        in_features, out_features: dimensions of the weight that it stands beside.
        generator: of A's starting values; None for torch's global one.

    Attributes:
        lora_a: ``[rank, in]`` float32.
        lora_b: ``[out, rank]`` float32.
        magnitude: ``[out]`` float32, DoRA's row norms, ones until :meth:`init_magnitude`; None for LoRA.
    """

    def __init__(
        self, config: AdapterConfig, in_features: int, out_features: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.in_features = in_features
        self.out_features = out_features
        self.lora_a = nn.Parameter(torch.empty(config.rank, in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, config.rank))
        self.magnitude = nn.Parameter(torch.ones(out_features)) if config.dora else None
        # As nn.Linear starts its weight, and peft its A.
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), generator=generator)

    @torch.no_grad()
    def init_magnitude(self, weight: torch.Tensor) -> None:
        """Start DoRA's magnitudes at the row norms of the base weight ``[out, in]``; nothing to do for LoRA."""
        if self.magnitude is None:
            return
        norms = self._norms(weight)
        self.lora_b[norms == 0, 0] = TRACE
        self.magnitude.copy_(norms)

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor | Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Adapt a product.

        Args:
            x: ``[..., in]``, what the layer was called with.
            output: ``[..., out]``, the base weight's product with ``x``, without bias.
            weight: ``[out, in]``, the base weight or what makes it; asked for by DoRA only. Gradients reach it through
                ``output`` alone (and through dropped-out inputs): its norm counts as a constant, as in DoRA's paper.

        Returns:
            ``[..., out]``, in the dtype of ``output``.
        """
        kept = x
        if self.training and self.config.dropout:
            kept = nn.functional.dropout(x, self.config.dropout)
        down = nn.functional.linear(kept, self.lora_a.to(x.dtype))
        change = nn.functional.linear(down, self.lora_b.to(down.dtype)) * self.config.scaling
        if self.magnitude is None:
            return (output + change).to(output.dtype)
        base = weight if isinstance(weight, torch.Tensor) else weight()
        factor = self.magnitude / self._norms(base.detach())
        if kept is x:
            return (factor * (output + change)).to(output.dtype)
        # peft drops out the input of the base's part of the change as well.
        dropped = nn.functional.linear(kept, base.to(kept.dtype))
        return (output + (factor - 1) * dropped + factor * change).to(output.dtype)

    def delta(self) -> torch.Tensor:
        """``(alpha/rank)·B·A [out, in]`` float32, whatever autocast says."""
        with torch.autocast(self.lora_a.device.type, enabled=False):
            return self.config.scaling * (self.lora_b @ self.lora_a)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense weight ``[out, in]`` float32 that does the work of base weight and adapter together."""
        adapted = weight.float() + self.delta()
        if self.magnitude is None:
            return adapted
        return adapted * (self.magnitude / self._norms(weight)).unsqueeze(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, float16, under peft's names inside a layer."""
        stored = {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}
        if self.magnitude is not None:
            stored["lora_magnitude_vector"] = self.magnitude
        return {name: tensor.detach().to(torch.float16) for name, tensor in stored.items()}

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored values, a copy in float32. Raises ``ValueError`` where a name or shape differs."""
        own = {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}
        if self.magnitude is not None:
            own["lora_magnitude_vector"] = self.magnitude
        if unknown := sorted(tensors.keys() - own.keys()):
            raise ValueError(f"'{unknown[0]}' is unknown")
        for name, parameter in own.items():
            given = tensors.get(name)
            if given is None or given.shape != parameter.shape:
                raise ValueError(f"'{name}' must be {list(parameter.shape)}")
            parameter.copy_(given)

    @torch.no_grad()
    def _norms(self, weight: torch.Tensor) -> torch.Tensor:
        """``[out]`` float32 row norms of the adapted weight, as a constant."""
        norms: torch.Tensor = torch.linalg.vector_norm(weight.float() + self.delta(), dim=1)
        return norms


class AdaptedLinear(nn.Module):
    """A stored layer and its stored adapter, frozen: what the quantized stream runs through.

    Args:
        base: a linear layer, dense or packed, with ``weight`` ``[out, in]`` and ``bias``.
        adapter: what stands beside it.
    """

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        output: torch.Tensor = self.base(x)
        bias = self.base.bias.to(output.dtype) if isinstance(self.base.bias, torch.Tensor) else None
        adapted: torch.Tensor = self.adapter(x, output if bias is None else output - bias, self._weight)
        return adapted if bias is None else adapted + bias

    def _weight(self) -> torch.Tensor:
        weight = self.base.weight
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"a {type(self.base).__name__} has no weight")
        return weight

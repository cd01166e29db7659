"""A linear layer that holds its weight packed."""

from collections.abc import Callable, Mapping
from typing import Self, TypeGuard

import torch
from torch import nn

from ulbq import formats
from ulbq.formats import AnyScheme, BinaryMosScheme


def is_dense_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with its weight in full, and not a packed one."""
    return isinstance(module, nn.Linear) and not isinstance(module, QuantLinear)


def linear_layer(block: nn.Module, name: str) -> nn.Linear:
    """A dense linear layer inside a block. Raises TypeError where ``name`` is something else."""
    layer = block.get_submodule(name)
    if not is_dense_linear(layer):
        raise TypeError(f"'{name}' is a {type(layer).__name__}, not a linear layer")
    return layer


class PackedWeight(torch.Tensor):
    """A dequantized weight for others to read. It is a copy: writing to its ``data``, as peft merges, is refused."""

    # Whatever is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        """A plain copy."""
        return self.detach().clone()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise TypeError(
            "A packed weight cannot be changed, so nothing can be merged into it: "
            "'ulbq convert --merge-adapter' makes a dense model with its adapter in the weights."
        )


class QuantLinear(nn.Linear):
    """A linear layer with its weight ``Ŵ`` stored in one of the formats: ``y = x · Ŵᵀ + b``.

    It is an ``nn.Linear`` to others, so that peft puts adapters beside it as beside a dense layer; ``weight`` is no
    parameter but the dequantized weight, to be read only.

    Args:
        scheme: the weight's format.
        in_features, out_features: the dense weight's dimensions.
        bias: whether the layer adds a bias.
        dtype: of ``weight``, as a dense layer's parameter would have it; casting the module changes it.
        cache: keep the unpacked matrix after the first call (twice the bytes of bf16 weights, no work per call).

    The buffers carry the names, dtypes and shapes of ``scheme.tensors(out_features, in_features)``, and keep these
    dtypes when the module is cast; ``bias`` is a parameter. Without ``cache`` the matrix is unpacked at every call.
    """

    def __init__(
        self,
        scheme: AnyScheme,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        cache: bool = False,
    ) -> None:
        # Not nn.Linear's own, which would make the weight a parameter.
        nn.Module.__init__(self)
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.cache = cache
        self._kept: torch.Tensor | None = None
        for name, spec in scheme.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)))
        parameter = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", parameter)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """``[out, in]`` the dequantized weight in ``dtype``, without a gradient."""
        return self.weight_dense(self.dtype).as_subclass(PackedWeight)

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
        self._kept = None

    def weight_dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight ``[out, in]``, where the packed tensors are; of a mixture, at uniform gates."""
        if isinstance(self.scheme, BinaryMosScheme):
            return formats.dequantize(self.scheme, self.tensors(), self.in_features, dtype)
        return self._matrix(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return formats.multiply(self.scheme, self.tensors(), x, self._matrix(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.format} {self.scheme.label}"

    def _matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """What the inputs are multiplied by; the one thing that is worth keeping, in every format."""
        tensors = self.tensors()
        kept = self._kept
        if kept is not None and kept.dtype == dtype and kept.device == tensors["codes"].device:
            return kept
        matrix = formats.matrix(self.scheme, tensors, self.in_features, dtype)
        if self.cache:
            self._kept = matrix
        return matrix

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move or cast: packed tensors follow to another device only, since a rounded scale decodes another weight."""
        before = self.tensors()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self._kept = None
        return self

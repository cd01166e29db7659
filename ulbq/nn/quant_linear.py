"""A linear layer that holds its weight packed."""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeGuard

import torch
from torch import nn

from ulbq import formats, kernels
from ulbq.formats import AnyScheme

_LINEAR = frozenset({"FalconLinear"})
"""Classes of transformers that compute what ``nn.Linear`` does, in words of their own."""


def is_dense_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with its weight in full, and not a packed one.

    What inherits from ``nn.Linear`` and computes something else, as the routers of some mixtures do, is none.
    """
    own = isinstance(module, nn.Linear) and not isinstance(module, QuantLinear)
    as_usual = type(module).forward is nn.Linear.forward or type(module).__name__ in _LINEAR
    return own and as_usual and "forward" not in vars(module)


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
        cache: keep the dense matrix where products are made with one (many rows, mostly), in the dtype of the calls;
            without it, slabs of it are made at every such call.

    The buffers carry the names, dtypes and shapes of ``scheme.tensors(out_features, in_features)``, and keep these
    dtypes when the module is cast; ``bias`` is a parameter. :meth:`prepare`, at the latest the first call, replaces
    them by tensors in the order that products take; :meth:`tensors` and ``state_dict`` still give the stored ones, by
    then copies, and to load others or move the module brings the buffers back.
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
        # Layout and names of the buffers that products take; None while they are the stored ones, not yet looked at.
        self._layout: tuple[kernels.Layout, tuple[str, ...]] | None = None
        specs = scheme.tensors(out_features, in_features)
        self._stored = tuple(specs)
        for name, spec in specs.items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)))
        parameter = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", parameter)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """``[out, in]`` the dequantized weight in ``dtype``, without a gradient."""
        return self.weight_dense(self.dtype).as_subclass(PackedWeight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The packed tensors, by their stored names."""
        layout, tensors = self._ready()
        return dict(layout.unpack(self.scheme, tensors, self.out_features, self.in_features))

    def assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over packed tensors, without a copy. Raises ``ValueError`` where a name, dtype or shape differs."""
        specs = self.scheme.tensors(self.out_features, self.in_features)
        for name, spec in specs.items():
            given = tensors.get(name)
            if given is None or tuple(given.shape) != spec.shape or given.dtype != getattr(torch, spec.dtype):
                raise ValueError(f"'{name}' must be {spec.dtype} {list(spec.shape)}")
        self._hold({name: tensors[name] for name in specs})
        self._layout = None

    def prepare(self) -> None:
        """Bring the weight into the layout of the best kernel for it here. Nothing to do a second time."""
        if self._layout is None:
            ready = kernels.prepare(self.scheme, self.tensors(), self.out_features, self.in_features)
            self._hold(ready.tensors)
            self._layout = (ready.layout, tuple(ready.tensors))

    def product(self, *, exact: bool) -> kernels.Product | None:
        """What compiled decoding multiplies its tokens with, of the tensors as they are now; None where there is none.

        Args:
            exact: inputs are rounded to 24 bits of their largest, not to 16.
        """
        self.prepare()
        layout, tensors = self._ready()
        bias = None if self.bias is None else self.bias.detach().float()
        return layout.product(self.scheme, tensors, (self.out_features, self.in_features), bias, exact=exact)

    @property
    def cached_bytes(self) -> int:
        """Memory of the dense matrix that ``cache`` keeps; 0 before the first product that is made with it."""
        return 0 if self._kept is None else self._kept.nbytes

    def weight_dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight ``[out, in]``, where the packed tensors are; of a mixture, at uniform gates."""
        if formats.FORMATS[self.scheme.format].matrix is not None:
            return formats.dequantize(self.scheme, self.tensors(), self.in_features, dtype)
        return self._matrix(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``, or of autocast where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self._layout is None and not torch.compiler.is_compiling():
            self.prepare()
        layout, tensors = self._ready()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.cache and layout.prefers_dense(x):
            return formats.multiply(self.scheme, tensors, x, self._matrix(x.dtype), bias)
        product = layout.multiply(self.scheme, tensors, x, self.out_features)
        return product if bias is None else product + bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.format} {self.scheme.label}"

    def _matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """What the inputs are multiplied by; the one thing that is worth keeping, in every format."""
        kept = self._kept
        if kept is not None and kept.dtype == dtype and kept.device == next(self.buffers()).device:
            return kept
        layout, tensors = self._ready()
        matrix = layout.matrix(self.scheme, tensors, self.out_features, self.in_features, dtype)
        if self.cache:
            self._kept = matrix
        return matrix

    def _ready(self) -> kernels.Ready:
        if self._layout is None:
            return kernels.Ready(kernels.STORED, {name: getattr(self, name) for name in self._stored})
        layout, held = self._layout
        return kernels.Ready(layout, {name: getattr(self, name) for name in held})

    def _hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make these the buffers, in place of what was there; those of the stored names persist."""
        for name in [name for name, _ in self.named_buffers(recurse=False) if name not in tensors]:
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=name in self._stored)
        self._kept = None

    def _restore(self) -> None:
        """Undo :meth:`prepare`."""
        self._hold(self.tensors())
        self._layout = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.tensors().items():
            destination.setdefault(prefix + name, tensor)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move or cast: packed tensors follow to another device only, since a rounded scale decodes another weight."""
        self._restore()
        before = self.tensors()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

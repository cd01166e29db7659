"""The same linear layer of every expert of a mixture, multiplied in one call for all experts that are chosen."""

from collections.abc import Sequence

import torch
from torch import nn

from ulbq import kernels
from ulbq.kernels import banks
from ulbq.nn.quant_linear import QuantLinear


class Together:
    """Layers as they were when this was made; packed ones are brought into the layout of their kernels.

    Args:
        layers: by the experts' numbers.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        # Of a sharded block codes are parameters, whose memory comes and goes.
        packed = [
            layer
            for layer in layers
            if type(layer) is QuantLinear and "forward" not in vars(layer) and layer._parameters.keys() <= {"bias"}
        ]
        shapes = {(layer.out_features, layer.in_features) for layer in packed}
        self._banks = _banks(packed, *shapes.pop()) if len(packed) == len(layers) and len(shapes) == 1 else []
        # A layer that was loaded, moved or assigned anew has another layout, or none.
        self._layouts = [_layout(layer) for layer in layers]
        found = {layer._layout[0].name: layer._layout[0] for layer in packed if layer.cache and layer._layout}
        self._keepers = list(found.values())

    def is_current(self, number: int, layer: nn.Module) -> bool:
        """Whether an expert's layer is still what it was."""
        return layer is self._layers[number] and _layout(layer) is self._layouts[number]

    def takes(self, x: torch.Tensor, routes: banks.Routes) -> bool:
        """Whether one call serves inputs ``[rows, in]`` best, and does all that calls of the layers would do."""
        if not self._banks or any(_is_special(self._layers[number]) for number, *_ in routes.jobs):
            return False
        busiest = x[:1].expand(routes.most, -1)
        kept = any(layout.prefers_dense(busiest) for layout in self._keepers)
        return not kept and all(bank.takes(x.dtype, routes.most) for bank in self._banks)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, routes: banks.Routes) -> torch.Tensor:
        """Products of choices and their experts.

        Args:
            x: ``[tokens, in]``, each for as many choices as there are for a token, or ``[choices, in]``.
            chosen: int64 ``[choices]`` the experts.
            routes: the same, by expert.

        Returns:
            ``[choices, out]`` in the dtype of ``x``.
        """
        product = banks.multiply(self._banks, x, routes, routes.places // len(x))
        if self._layers[0].bias is None:
            return product
        return product + torch.stack([layer.get_parameter("bias") for layer in self._layers])[chosen].to(x.dtype)


def _banks(layers: Sequence[QuantLinear], outs: int, columns: int) -> list[banks.Bank]:
    for layer in layers:
        layer.prepare()
    return kernels.gathered([(layer.scheme, layer._ready()) for layer in layers], outs, columns)


def _layout(layer: nn.Module) -> object:
    return layer._layout if type(layer) is QuantLinear else None


def _is_special(layer: nn.Module) -> bool:
    """Whether a packed layer's product is not all that its call does, or its bias is trained."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return bool(watched) or any(one is not None and one.requires_grad for one in layer._parameters.values())

"""Lets the scales of a packed model train, and packs what they became."""

from collections.abc import Mapping

import torch
from torch import nn

from ulbq.methods.training import pack_layer
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.student import fixed_quantizer
from ulbq.training.scaled import ScaledLinear


def train_scales(model: nn.Module, source: ModelSource) -> None:
    """Exchange the packed layers of a model for ones whose codes are fixed and whose scales train."""
    for name, scheme in source.packed.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLinear):
            raise TypeError(f"'{name}' is not packed")
        with torch.no_grad():
            packed = {short: tensor.clone() for short, tensor in layer.tensors().items()}
            quantizer = fixed_quantizer(layer.weight_dense(torch.float32), packed, scheme)
        quantizer.requires_grad_(False)
        model.set_submodule(name, ScaledLinear(quantizer, layer.in_features, layer.out_features, layer.bias))


def pack_scales(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Packed tensors of the layers whose scales trained, by the layers' full names.

    Raises:
        NumericsError: what was packed is not what was trained.
    """
    with torch.no_grad():
        return {name: dict(pack_layer(name, layer.quantizer, 1.0)) for name, layer in _scaled(model).items()}


def restore_packed(model: nn.Module, packed: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Put packed layers in the place of those whose scales trained; what is stored is what runs from here on."""
    for module_name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, ScaledLinear)]:
        scheme = layer.quantizer.scheme
        tensors = packed[_own_name(module_name)]
        device = tensors["codes"].device
        whole = QuantLinear(scheme, layer.in_features, layer.out_features, bias=layer.bias is not None).to(device)
        whole.assign(dict(tensors))
        if layer.bias is not None:
            whole.bias = layer.bias
        model.set_submodule(module_name, whole.eval())


def _scaled(model: nn.Module) -> dict[str, ScaledLinear]:
    named = model.named_modules()
    return {_own_name(name): module for name, module in named if isinstance(module, ScaledLinear)}


def _own_name(name: str) -> str:
    """A layer's name in the model without peft, which puts it below a layer of its own."""
    return name.removesuffix(".base_layer")

"""A packed model under training: its adapter, which is peft's, and its scales, which are packed again."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed
from ulbq.finetuning.student import Student
from ulbq.methods.training import pack_layer
from ulbq.models.adapter_training import adapter_parameters
from ulbq.models.blocks import block_list
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.student import fixed_quantizer
from ulbq.training.linear import TrainedLinear
from ulbq.training.precision import Precision
from ulbq.training.sharding import gathered, is_sharded, join, like, shard


def adapter_student(model: PeftModel, precision: Precision, *, checkpointing: bool) -> Student:
    """A packed model with peft's adapter, ready to train on.

    Args:
        model: on its device.
        precision: of the run.
        checkpointing: see :class:`~ulbq.finetuning.student.Student`.
    """
    base = model.get_base_model().eval()
    if not isinstance(base, PreTrainedModel):
        raise TypeError("no model of transformers")
    blocks, adapters = block_list(base)[1], [one for one in base.modules() if isinstance(one, LoraLayer)]
    student = Student(base, blocks, precision, checkpointing=checkpointing, adapters=adapters)
    trained = adapter_parameters(model).values()
    student.roles["adapter"] = [parameter for parameter in trained if parameter.dim() > 1]
    student.roles["magnitudes"] = [parameter for parameter in trained if parameter.dim() == 1]
    return student


def shard_packed(model: PreTrainedModel, device: torch.device) -> None:
    """Move a packed model, with peft's adapter or without, to a device, its blocks sharded over the processes."""
    blocks = block_list(model)[1]
    held = [*blocks]
    del blocks[:]  # meanwhile the rest is the model
    nn.Module.to(model, device)
    for block in held:
        block.to(device)
        for layer in block.modules():
            if isinstance(layer, QuantLinear):
                layer.prepare()
        shard(block, device)
    blocks.extend(held)
    join(blocks, device)


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
        model.set_submodule(name, TrainedLinear(quantizer, layer.bias))


@torch.no_grad()
def pack_scales(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Packed tensors of the layers whose scales trained, by the layers' full names; what is stored runs from here on.

    Of sharded blocks the first process gets them, in the host's memory.

    Raises:
        NumericsError: what was packed is not what was trained.
    """
    blocks, layers = block_list(model)[1], _scaled(model)
    if not is_sharded(blocks[0]):
        found = {name: dict(pack_layer(name, layer.quantizer, 1.0)) for name, layer in layers.items()}
        _restore_packed(model, found)
        return found
    found = {}
    for block in blocks:
        inside = set(block.modules())
        own = {name: layer.quantizer for name, layer in layers.items() if layer in inside}
        parts = {name: _tensors(quantizer) for name, quantizer in own.items()}
        with gathered(block):
            for name, quantizer in own.items():
                packed = pack_layer(name, quantizer, 1.0)
                if distributed.is_main():
                    found[name] = {short: tensor.to("cpu", copy=True) for short, tensor in packed.items()}
                shape = quantizer.dense(quantizer()).shape
                stored = fixed_quantizer(packed["codes"].new_zeros(()).expand(shape), packed, quantizer.scheme)
                for short, value in _tensors(stored).items():
                    parts[name][short].copy_(like(parts[name][short], value))
    return found


def _tensors(quantizer: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())}


def _restore_packed(model: nn.Module, packed: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Put packed layers in the place of those whose scales trained; what is stored is what runs from here on."""
    for module_name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, TrainedLinear)]:
        scheme = layer.quantizer.scheme
        tensors = packed[_own_name(module_name)]
        device = tensors["codes"].device
        whole = QuantLinear(scheme, layer.in_features, layer.out_features, bias=layer.bias is not None).to(device)
        whole.assign(dict(tensors))
        if layer.bias is not None:
            whole.bias = layer.bias
        model.set_submodule(module_name, whole.eval())


def _scaled(model: nn.Module) -> dict[str, TrainedLinear]:
    named = model.named_modules()
    return {_own_name(name): module for name, module in named if isinstance(module, TrainedLinear)}


def _own_name(name: str) -> str:
    """A layer's name in the model without peft, which puts it below a layer of its own."""
    return name.removesuffix(".base_layer")

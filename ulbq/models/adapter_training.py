"""Adapters that train, by peft itself, beside the packed layers of a model; and back from peft to tensors."""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ulbq.config.adapter import AdapterConfig
from ulbq.models.adapter_files import beyond_peft, calm_peft, check_fits, lora_config, read_adapter
from ulbq.nn.adapter import TRACE

_NAME = "default"  # peft's, of the one adapter


def fresh_adapter(model: PreTrainedModel, config: AdapterConfig, linears: Iterable[str], where: str) -> PeftModel:
    """Put a new adapter beside some layers; it starts as no change, A drawn from torch's generator.

    Args:
        model: packed or dense; its layers are exchanged in place.
        config: of the adapter; ``targets`` is not looked at.
        linears: full names of the layers.
        where: the model's name, for errors.

    Raises:
        InputError: peft rewrites the layers' names for this kind of model.
    """
    wanted = set(linears)
    described = lora_config(config, wanted)
    with calm_peft(model):
        wrapped = get_peft_model(model, described)
    if set(_layers(wrapped)) != wanted:
        raise beyond_peft(model, f"a new adapter for '{where}'")
    if config.dora:
        _keep_finite(wrapped)
    return _checked(wrapped)


def trained_adapter(model: PreTrainedModel, folder: Path, *, dropout: float | None) -> PeftModel:
    """Put a stored adapter beside its layers to train on.

    Args:
        model: that the adapter is for; its layers are exchanged in place.
        folder: the adapter's own.
        dropout: None for the stored one.

    Raises:
        InputError: the adapter is damaged, or belongs to another model.
    """
    found = read_adapter(folder)[1]
    check_fits(model, folder, found)
    described = LoraConfig.from_pretrained(str(folder))
    if not isinstance(described, LoraConfig):
        raise TypeError("no LoRA")
    described.inference_mode = False
    if dropout is not None:
        described.lora_dropout = dropout
    with calm_peft(model):
        try:
            # Without the device peft would read the tensors onto any accelerator that it finds.
            wrapped = PeftModel.from_pretrained(
                model, str(folder), config=described, is_trainable=True, torch_device=str(model.device)
            )
        except ValueError as error:
            raise beyond_peft(model, f"the adapter in '{folder}'") from error
    if set(_layers(wrapped)) != found.keys():
        raise beyond_peft(model, f"the adapter in '{folder}'")
    return _checked(wrapped)


def adapter_form(model: PeftModel) -> AdapterConfig:
    """Form of the adapter that a model trains, without its ``targets``."""
    described = model.peft_config[_NAME]
    if not isinstance(described, LoraConfig):
        raise TypeError("no LoRA")
    return AdapterConfig(
        rank=described.r, alpha=described.lora_alpha, dropout=described.lora_dropout, dora=described.use_dora
    )


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What trains of the adapter, by full name of the layer, a dot and peft's short name; float32."""
    found = {}
    for name, layer in _layers(model).items():
        parts = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if _NAME in layer.lora_magnitude_vector:
            parts["lora_magnitude_vector"] = layer.lora_magnitude_vector
        for short, part in parts.items():
            weight = part[_NAME].weight
            if not isinstance(weight, torch.nn.Parameter):
                raise TypeError(f"'{name}.{short}' does not train")
            found[f"{name}.{short}"] = weight
    return found


@torch.no_grad()
def round_as_stored(model: PeftModel) -> None:
    """Round the adapter to the float16 that it is stored in: what is measured from here on is what is read back."""
    for parameter in adapter_parameters(model).values():
        parameter.copy_(parameter.to(torch.float16))


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Peft's layers by the full name of what they stand beside."""
    base = model.get_base_model()
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _keep_finite(model: PeftModel) -> None:
    """On a row of zeros DoRA would divide by its norm; see :mod:`ulbq.nn.adapter`."""
    found = adapter_parameters(model)
    for name in _layers(model):
        found[f"{name}.lora_B.weight"][found[f"{name}.lora_magnitude_vector"] == 0, 0] = TRACE


def _checked(model: PeftModel) -> PeftModel:
    odd = [name for name, parameter in adapter_parameters(model).items() if parameter.dtype != torch.float32]
    if odd:
        raise TypeError(f"'{odd[0]}' does not train in float32")
    return model

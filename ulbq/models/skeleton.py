"""A model without its weights: every parameter on the meta device, every buffer real."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ulbq.errors import InputError
from ulbq.printable import one_line

# A bad value shows wherever a model's own code stumbles over it.
BUILD_ERRORS = (*(ArithmeticError, AssertionError, AttributeError, LookupError), *(RuntimeError, TypeError, ValueError))


def auto_class(config: PreTrainedConfig) -> Any:
    """Which of transformers' classes makes the model of a configuration: the one that knows its ``architectures``.

    Where both do, as for a model of images whose text model stands by itself too, and none is named, it is the text's.
    """
    images: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if images is None:
        return AutoModelForCausalLM
    known = {kind.__name__ for kind in (images if isinstance(images, tuple) else (images,))}
    text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and known.isdisjoint(config.architectures or ())
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def empty_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model that ``config`` describes, of images too, in eval mode, its parameters on the meta device.

    Buffers (rotary frequencies, embedding scales) hold their values: they are computed, not stored in checkpoints.
    The attention implementation is the one that transformers picks for the architecture, which is SDPA wherever the
    architecture has it. Tied parameters are one object. ``config`` itself is left as it is.

    Args:
        config: of the model.
        dtype: in which it would be loaded. Parameters and buffers that transformers keeps in another one have that.

    Raises:
        InputError: no such model can be built, for one of no heads or with an activation that does not exist; or
            its matrices have no rows or columns.
    """
    # A parameter exists for a moment before it goes to meta; as nothing initializes it, its pages are never touched.
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    except BUILD_ERRORS as error:
        cause = one_line(f"{type(error).__name__}: {error}")
        raise InputError(
            f"The configuration of '{config.name_or_path or config.model_type}' makes no model ({cause}).",
            hint="Its config.json is damaged, or was written for another version of transformers.",
        ) from error
    if empty := next((name for name, parameter in model.named_parameters() if not parameter.numel()), None):
        raise InputError(
            f"The configuration of '{config.name_or_path or config.model_type}' leaves '{empty}' without any value.",
            hint="A width in its config.json is 0: the file is damaged.",
        )
    _widen(model, dtype)
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give parameters and buffers that transformers keeps in float32, whatever the rest is loaded in, that dtype."""
    patterns = model._get_dtype_plan(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = next((kind for pattern, kind in patterns.items() if pattern in name), None)
        if wide is None or not tensor.is_floating_point():
            continue
        path, _, leaf = name.rpartition(".")
        made = tensor.detach().to(wide)
        setattr(
            model.get_submodule(path),
            leaf,
            torch.nn.Parameter(made) if isinstance(tensor, torch.nn.Parameter) else made,
        )

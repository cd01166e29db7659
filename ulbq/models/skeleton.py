"""A model without its weights: every parameter on the meta device, every buffer real."""

import copy

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model that ``config`` describes, in eval mode, its parameters on the meta device.

    Buffers (rotary frequencies, embedding scales) hold their values: they are computed, not stored in checkpoints.
    The attention implementation is the one that transformers picks for the architecture, which is SDPA wherever the
    architecture has it. Tied parameters are one object. ``config`` itself is left as it is.
    """
    # A parameter exists for a moment before it goes to meta; as nothing initializes it, its pages are never touched.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model

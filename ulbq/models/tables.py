"""Embedding and head in the precision in which they are stored, where the rest of a model is float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_HALVES = (torch.bfloat16, torch.float16)


def tables_as_stored(
    model: PreTrainedModel, read: Callable[[str], torch.Tensor | None], device: torch.device, *, head: bool
) -> None:
    """Fill in the embedding, and the head, in half precision where they are stored so; what they compute stays.

    Rows are looked up and made float32; a head's product is autocast. Tables that compute anything of their own are
    left alone. Done before everything else is filled in, no float32 copy of them is ever made.

    Args:
        model: a skeleton; it is changed in place.
        read: gives a parameter by its name as it is stored; None for one that is not.
        device: of the tables.
        head: the head too, which then has to be multiplied under autocast.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if not has_plain_tables(model):
        return
    tables = [embedding, output] if head else [embedding]
    for name, parameter in list(model.named_parameters()):
        held = [table for table in tables if table.weight is parameter]
        stored = read(name) if held else None
        if stored is not None and stored.shape == parameter.shape:
            kept = stored.to(device, stored.dtype if stored.dtype in _HALVES else torch.float32)
            filled = nn.Parameter(kept, requires_grad=False)
            for table in held:
                table.weight = filled
    if embedding.weight.dtype in _HALVES:
        embedding.register_forward_hook(_as_float)


def has_plain_tables(model: PreTrainedModel) -> bool:
    """Whether embedding and head look up and multiply, and do nothing else."""
    return type(model.get_input_embeddings()) is nn.Embedding and type(model.get_output_embeddings()) is nn.Linear


def _as_float(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()

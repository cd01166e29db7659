"""What a model's state consists of, each tensor once."""

import torch
from transformers import PreTrainedModel

from ulbq.models.source import ModelSource


def state_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Parameters and persistent buffers of a model by full name, each with the other names it is tied to.

    A tied head stands under the embedding's name, its own being an alias. The order is the model's.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {first: tuple(aliases) for first, *aliases in names.values()}


def check_complete(source: ModelSource, model: PreTrainedModel) -> None:
    """Refuse a checkpoint that lacks a parameter or persistent buffer of the model. Raises InputError."""
    for name, aliases in state_names(model).items():
        if source.names.isdisjoint((name, *aliases)):
            source.read(name)  # says what is missing


def read_state(source: ModelSource, name: str, aliases: tuple[str, ...] = ()) -> torch.Tensor:
    """A dense tensor under whichever of its tied names the checkpoint stores it. Raises InputError where under none."""
    return source.read(next((known for known in (name, *aliases) if known in source.names), name))

"""Embedding and head in the precision in which they are stored, or left on disk."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Rows = Callable[[Sequence[int]], torch.Tensor]
"""Reads some rows ``[n, width]`` of a matrix, as they are stored."""
RowsOf = Callable[[str, torch.Size], Rows | None]
"""What reads rows of a parameter by its name and shape; None for one that cannot be read so."""

_HALVES = (torch.bfloat16, torch.float16)
_ROWS_AT_ONCE = 1 << 14
"""Rows of a head on disk that are in memory at a time."""


def tables_as_stored(
    model: PreTrainedModel,
    read: Callable[[str], torch.Tensor | None],
    device: torch.device,
    *,
    head: bool,
    rows: RowsOf | None = None,
) -> None:
    """Fill in the embedding, and the head, in half precision where they are stored so; what they compute stays.

    Rows are looked up and made float32; a head's product is autocast. Tables that compute anything of their own are
    left alone. Done before everything else is filled in, no float32 copy of them is ever made.

    Args:
        model: a skeleton; it is changed in place.
        read: gives a parameter by its name as it is stored; None for one that is not.
        device: of the tables.
        head: the head too, which then has to be multiplied under autocast.
        rows: leave the embedding on disk, see :func:`embed_from_disk`; None: memory holds it.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if not has_plain_tables(model):
        return
    tables = [embedding, output] if head else [embedding]
    if rows is not None:
        embed_from_disk(model, rows, None, device)
    for name, parameter in list(model.named_parameters()):
        held = [table for table in tables if table.weight is parameter and parameter.is_meta]
        stored = read(name) if held else None
        if stored is not None and stored.shape == parameter.shape:
            kept = stored.to(device, stored.dtype if stored.dtype in _HALVES else torch.float32)
            filled = nn.Parameter(kept, requires_grad=False)
            for table in held:
                table.weight = filled
    if embedding.weight.dtype in _HALVES:
        embedding.register_forward_hook(_as_float)


def embed_from_disk(
    model: PreTrainedModel,
    rows: RowsOf,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    head: bool = True,
) -> bool:
    """Leave the embedding on disk: rows of it are read as their tokens come.

    Args:
        model: a skeleton; it is changed in place.
        rows: gives what reads rows of it.
        dtype: of what is looked up; None for the stored one.
        device: of the tokens.
        head: the head runs as well; an embedding that it shares stays as it is.

    Returns:
        Whether it stays there.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    found = _stored(model, embedding, rows) if has_plain_tables(model) else None
    if found is None or (head and output.weight is embedding.weight):
        return False
    read, kept = found, dtype or found([0]).dtype

    def look_up(tokens: torch.Tensor) -> torch.Tensor:
        distinct, places = tokens.unique(return_inverse=True)
        return read(distinct.tolist()).to(device, kept)[places]

    embedding.forward = look_up
    _leave(embedding, kept, device)
    return True


def head_from_disk(model: PreTrainedModel, rows: RowsOf, dtype: torch.dtype, device: torch.device) -> bool:
    """Leave the head on disk: a part of its rows is read at a time, for every product. It takes no gradient.

    Arguments and result are those of :func:`embed_from_disk`. An embedding that is the head too is left unread.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not has_plain_tables(model):
        return False
    tied = [embedding] if head.weight is embedding.weight else []
    read = next((found for one in (head, *tied) if (found := _stored(model, one, rows))), None)
    if read is None:
        return False
    count = len(head.weight)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        logits = x.new_empty(*x.shape[:-1], count)
        for start in range(0, count, _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, count))
            weight = read(range(part.start, part.stop)).to(device, dtype)
            logits[..., part] = nn.functional.linear(x, weight, None if head.bias is None else head.bias[part])
        return logits

    head.forward = multiply
    _leave(head, dtype, device)
    return True


def _leave(table: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Empty a table. Who asks the model for its device looks at its first parameter."""
    width = table.get_parameter("weight").shape[1]
    table.weight = nn.Parameter(torch.empty(0, width, dtype=dtype, device=device), False)


def _stored(model: PreTrainedModel, table: nn.Module, rows: RowsOf) -> Rows | None:
    name = next(name for name, module in model.named_modules() if module is table)
    return rows(f"{name}.weight", table.get_parameter("weight").shape)


def has_plain_tables(model: PreTrainedModel) -> bool:
    """Whether embedding and head look up and multiply, and do nothing else."""
    return type(model.get_input_embeddings()) is nn.Embedding and type(model.get_output_embeddings()) is nn.Linear


def _as_float(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()

"""What readers of other tools' layouts share: how a packed weight is described, checked and dequantized."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that scales have."""


class Packed(NamedTuple):
    """A weight that several stored tensors stand for.

    Attributes:
        parts: their stored names by short name.
        shape: of the weight, ``(out, in)``, of experts in one tensor with their number before that.
        decode: the weight of those tensors, by short name. Raises ValueError where they make none.
        label: how it is stored in a word, ``w4g128``.
        dtype: of what ``decode`` gives.
        floats: whether the codes are floats, as makers publish whole models.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    label: str
    dtype: torch.dtype = torch.float32
    floats: bool = False


def table(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a description has under a key, empty where it has nothing. Raises InputError for a list or a text."""
    found = said.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"'{key}' in config.json is no JSON object.", hint="Fetch it again.")
    return found


def present(stored: LazyTensors, prefix: str, *shorts: str) -> dict[str, str]:
    """Which of a layer's tensors are stored: their names by short name."""
    return {short: f"{prefix}{short}" for short in shorts if f"{prefix}{short}" in stored.names}


def label_of(bits: int, group_size: int, in_features: int) -> str:
    """Bits and group size in a word; without a group where that is a whole row."""
    return f"w{bits}" if group_size in (-1, in_features) else f"w{bits}g{group_size}"


def scaled(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | float = 0.0) -> torch.Tensor:
    """``(codes − zeros) · scales`` in float32 ``[out, in]``.

    Args:
        codes: ``[out, in]``, of any dtype.
        scales: ``[out, G]``, each for ``in/G`` neighbours.
        zeros: the same, or one for all.
    """
    # Turned round as bytes, which costs less than as floats.
    made = codes.contiguous().to(torch.float32, copy=True).view(*scales.shape, -1)
    made -= zeros.float().unsqueeze(-1) if isinstance(zeros, torch.Tensor) else zeros
    made *= scales.float().unsqueeze(-1)
    return made.flatten(1)


def scaled_by_index(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | float, groups: torch.Tensor
) -> torch.Tensor:
    """The same where each input says which group it belongs to.

    Args:
        codes: ``[in, out]``.
        scales: ``[G, out]``.
        zeros: ``[G, out]``, or one for all.
        groups: ``[in]``, integers.

    Raises:
        ValueError: a group that is none.
    """
    if not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
        raise ValueError("an input belongs to a group that is not stored")
    at = groups.long()
    made = codes.contiguous().to(torch.float32, copy=True)
    made -= zeros.float()[at] if isinstance(zeros, torch.Tensor) else zeros
    made *= scales.float()[at]
    return made.T.contiguous()


def folder_of(stored: LazyTensors) -> Path:
    """Where the tensors lie."""
    return stored.files[0].parent


def unread(stored: LazyTensors, kind: str, layout: str) -> InputError:
    """The sentence for weights that are packed in a way that nothing here reads."""
    return InputError(
        f"'{folder_of(stored)}' is quantized already, by {kind} in the layout '{layout}', which ulbq does not read.",
        hint="Give the full-precision model it was made from.",
    )


def damaged(name: str, kind: str) -> InputError:
    """The sentence for stored tensors that do not fit each other."""
    return InputError(
        f"'{name}' is stored otherwise than {kind} stores weights.",
        hint="The checkpoint is damaged, or of another layout: fetch it again, or give the full-precision model.",
    )

"""AutoRound's own configuration: GPTQ's, AWQ's or MLX's tensors, by its ``packing_format`` (auto-round 0.16).

``auto_round:auto_gptq`` is GPTQ's v1, ``auto_round`` and ``auto_round:gptqmodel`` are v2. Where nothing is said,
transformers takes v1.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ulbq.artifacts.shards import LazyTensors
from ulbq.models.foreign import awq, gptq, mlx
from ulbq.models.foreign.base import Packed, table, unread

_V1 = ("auto_round:auto_gptq", "auto_round:gptq", "auto")
_V2 = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_MLX = ("mlx", "auto_round:mlx")


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    layout = str(said.get("packing_format") or "auto_round:gptq")
    own = [one for one in table(said, "extra_config").values() if isinstance(one, dict)]
    if "packing_format" not in said and "backend" in said:
        layout = str(said["backend"])  # as versions before 0.5 called it
    kinds = {str(one.get("data_type", "int")) for one in (said, *own)} - {"int"}
    if kinds or said.get("rotation_config"):
        raise unread(stored, "AutoRound", min(kinds, default="with rotations"))
    if layout in _AWQ:
        yield from awq.read(stored, {"bits": said.get("bits", 4)})
    elif layout in _MLX:
        yield from mlx.read(stored, {**table(said, "extra_config"), **said})
    elif layout in (*_V1, *_V2):
        symmetric = said.get("sym") is True and not any("sym" in one for one in own)
        yield from gptq.layers(stored, said, v1=layout in _V1, symmetric=symmetric)
    else:
        raise unread(stored, "AutoRound", layout)

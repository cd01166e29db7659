"""Dense tensors of any model, and what lies beside weights in a folder that transformers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ulbq import formats
from ulbq.artifacts.disk import write_atomically, writing
from ulbq.artifacts.manifest import PARTIAL_SUFFIX
from ulbq.errors import InputError, NumericsError
from ulbq.formats import AnyScheme
from ulbq.formats.rounding import vanishes
from ulbq.models.adapter_files import ADAPTER_FILES, ADAPTER_FOLDER, adapter_folder, copy_adapter, load_adapters
from ulbq.models.blocks import block_list
from ulbq.models.names import read_state, state_names
from ulbq.models.source import ModelSource, open_written
from ulbq.nn.adapter import Adapter
from ulbq.nn.quant_linear import linear_layer


def shard_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Which tensors each shard file will hold: one shard a block, one for the rest.

    A tied head is not among them: it is the embedding.
    """
    prefix = f"{block_list(model)[0]}."
    parts: dict[str, list[str]] = {}
    for name in state_names(model):
        inside = name.startswith(prefix)
        parts.setdefault(name.removeprefix(prefix).split(".")[0] if inside else "", []).append(name)
    count = len(parts)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": tuple(names) for i, names in enumerate(parts.values(), 1)}


def unsupported_reason(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why no dense weight can stand for a layer; None where one can."""
    return None if scheme.is_one_matrix else "its scales are mixed anew for every token, and a weight is one"


def open_again(folder: Path) -> ModelSource:
    """A folder of our own that was written just now, its tokenizer looked at where there is any. Raises InputError."""
    source = open_written(folder)
    if any(folder.glob("tokenizer*")):
        source.tokenizer()
    return source


def write_beside(source: ModelSource, folder: Path, changes: Mapping[str, Any], *, adapter: bool) -> list[str]:
    """What lies beside the weights: configuration, tokenizer and other side files, and the adapter; gives the names.

    Args:
        changes: what is different in the configuration.
        adapter: copy the artifact's adapter, where it has one.
    """
    beside = adapter_folder(source)
    with writing(folder):
        type(source.config).from_dict(source.config.to_dict() | dict(changes)).save_pretrained(folder)
        _spell_rope_twice(folder / "config.json")
        names = ["config.json", *source.save_tokenizer_files(folder)]
        if beside is not None and adapter:
            copy_adapter(beside, folder / ADAPTER_FOLDER, str(folder).removesuffix(PARTIAL_SUFFIX))
            names += ADAPTER_FILES
    return names


def _spell_rope_twice(path: Path) -> None:
    """Write the rotary embedding's base under its older name too.

    AutoGPTQ, exllamav2 and older engines know ``rope_theta`` and ``rope_scaling`` only, and without them would compute
    with another base and say nothing.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    # Models with several kinds of layers have one for each kind: no older name could say that.
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        return
    config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    write_atomically(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def adapters_to_merge(source: ModelSource, model: PreTrainedModel) -> Mapping[str, Adapter]:
    """An artifact's adapter by full name of the linear layer. Raises InputError where there is none."""
    folder = adapter_folder(source)
    if folder is None:
        raise InputError(f"'{source.given}' has no adapter to merge.", hint="Leave out `merge_adapter`.")
    return load_adapters(model, folder)


def dense_tensor(
    source: ModelSource,
    model: PreTrainedModel,
    name: str,
    aliases: tuple[str, ...],
    dtype: torch.dtype,
    adapter: Adapter | None = None,
    *,
    keeps: bool = False,
) -> torch.Tensor:
    """One tensor of a model's state, dense.

    Args:
        name: as the model has it; ``aliases`` are the other names that it is tied to.
        dtype: that it is rounded to, once; integers stay.
        adapter: made a part of the weight.
        keeps: leave what is not packed as it is stored, save a matrix in more than half precision. A trained norm in
            float16 loses more in bfloat16 than the model that it is in loses in float32.

    Raises:
        InputError: there is no such tensor.
        NumericsError: it does not fit the dtype's range.
    """
    linear = name.removesuffix(".weight")
    scheme = source.packed.get(linear) if linear != name else None
    if scheme is not None:
        columns = linear_layer(model, linear).in_features
        # Rounded once, after the adapter where there is one.
        exact = torch.float32 if adapter is not None else dtype
        tensor = formats.dequantize(scheme, source.read_packed(linear), columns, exact)
    else:
        tensor = read_state(source, name, aliases)
        if keeps and adapter is None and (tensor.dim() < 2 or tensor.dtype.itemsize <= 2):
            dtype = tensor.dtype
    if adapter is not None and linear != name:
        with torch.no_grad():
            tensor = adapter.merged(tensor)
    rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not torch.isfinite(rounded).all() and not _is_buffer(model, name):
        raise NumericsError(f"'{name}' does not fit {dtype}.", hint="Use `dtype=bf16` or fp32.")
    if dtype == torch.float16 and rounded.is_floating_point() and vanishes(tensor, rounded):
        raise NumericsError(f"'{name}' is too small for {dtype}.", hint="Use `dtype=bf16` or fp32.")
    return rounded


def _is_buffer(model: PreTrainedModel, name: str) -> bool:
    """Whether a name is a buffer's, which may hold bounds that are infinite."""
    owner, _, leaf = name.rpartition(".")
    return leaf in dict(model.get_submodule(owner).named_buffers(recurse=False))

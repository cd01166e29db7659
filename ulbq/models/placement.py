"""Whether everything that a checkpoint stores has a place in the model, and is stored as weights are.

A tensor that nobody reads is a part of the model that silently went missing: a bias, a layer, an adapter. What belongs
to no part of the text decoder (a vision tower, a head that predicts further tokens) is carried along as it is.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ulbq.artifacts.shards import LazyTensors, is_carried
from ulbq.errors import InputError
from ulbq.models.checkpoint import Checkpoint
from ulbq.models.skeleton import empty_model

# Computed from the configuration, masks, and what a cache of keys and values in eight bits is scaled by.
_OF_NO_ACCOUNT = re.compile(
    r"(^|\.)(rotary\w*\.(original_)?inv_freq|inv_freq|position_ids|masked_bias|[kv]_scale|[kv]_proj\.output_scale)$"
)
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attention)\.bias$")
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|hada_\w+|lokr_\w+|oft_\w+|ia3_l|base_layer)(\.|$)")
_NAMED = 3


def check_types(where: str, stored: LazyTensors, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse floating parameters that are stored as integers or in eight bits, which mean nothing without their scales.

    Raises:
        InputError: naming the first one.
    """
    wanted = model.state_dict()
    for name in sorted(checkpoint.names & wanted.keys()):
        if not wanted[name].is_floating_point():
            continue
        for key in checkpoint.sources(name):
            dtype = stored.dtype(key)
            if dtype.is_floating_point and dtype.itemsize > 1:
                continue
            kind = "eight-bit floats" if dtype.is_floating_point else "integers"
            raise InputError(
                f"'{where}' holds '{key}' as {kind} ({str(dtype).removeprefix('torch.')}).",
                hint="It is quantized already, or damaged: give the full-precision model.",
            )


def check_orientation(where: str, packed: Collection[str], checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse packed weights, by stored name, of layers that keep theirs as ``[in, out]``. Raises InputError."""
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name in sorted(turned & checkpoint.names):
        if not {*checkpoint.sources(name)}.isdisjoint(packed):
            raise InputError(
                f"'{where}' holds '{name}' packed, and a {type(model).__name__} keeps its weights the other way round.",
                hint="Give the full-precision model it was made from.",
            )


def unplaced(
    where: str, stored: LazyTensors, checkpoint: Checkpoint, model: PreTrainedModel, packed: Collection[str] = ()
) -> tuple[str, ...]:
    """Stored names that have no place in a model, and may be carried along beside it.

    Args:
        where: what the error calls the checkpoint.
        stored: all tensors.
        checkpoint: those with a place.
        model: on the meta device or not.
        packed: layers that are stored otherwise than as one weight.

    Raises:
        InputError: tensors of no place that belong to a part the model has.
    """
    found: list[str] = []
    lost: list[str] = []
    for key, name in sorted(checkpoint.unplaced.items()):
        if is_carried(stored.file(key)):
            found.append(key)
        elif not _of_no_account(stored, key) and not {_owner(name), _owner(key)} & {*packed}:
            (found if key in checkpoint.idle or _stands_apart(model, name) else lost).append(key)
    if lost:
        raise without_a_place(where, lost, type(model).__name__)
    return tuple(found)


def without_a_place(where: str, names: Collection[str], model: str) -> InputError:
    """The sentence for stored tensors that the configured model does not read."""
    named = ", ".join(f"'{name}'" for name in sorted(names)[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    if any(_ADAPTER.search(name) for name in names):
        hint = "An adapter was never merged into it: merge it first, as peft does with merge_and_unload()."
    else:
        hint = "Its config.json lost a key (biases, number of layers) or belongs to another model: restore it."
    return InputError(f"'{where}' holds tensors that a {model} has no place for: {named}{more}.", hint=hint)


def describe(names: Collection[str], model: PreTrainedModel) -> str:
    """Carried tensors in words, by the part that they belong to: ``mtp (2 tensors)``."""
    parts = Counter(_missing_part(model, name) for name in names)
    return ", ".join(f"{part} ({count} tensor{'s' * (count > 1)})" for part, count in parts.items())


def own_head(
    where: str, config: PreTrainedConfig, model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[PreTrainedConfig, PreTrainedModel, bool]:
    """Untie a head that the configuration ties, where the checkpoint stores another one, as transformers does.

    Args:
        where: what the error calls the checkpoint.
        config: of the model; it stays as it is.
        model: on the meta device.
        checkpoint: its tensors.

    Returns:
        Configuration and model, new ones where the head was untied, and whether it was.

    Raises:
        InputError: other parameters than embedding and head are to be tied, and are stored with different values.
    """
    different = _different_ties(model, checkpoint)
    if not different:
        return config, model, False
    untied = type(config).from_dict(config.to_dict())
    untied.name_or_path = config.name_or_path
    for one in (untied, untied.get_text_config()):
        one.tie_word_embeddings = False
    rebuilt = empty_model(untied)
    if still := _different_ties(rebuilt, checkpoint):
        raise InputError(
            f"'{where}' stores '{still[0][0]}' and '{still[0][1]}' with different values, and its model has one for "
            "both.",
            hint="Its config.json belongs to another model.",
        )
    return untied, rebuilt, True


def _different_ties(model: PreTrainedModel, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Pairs of tied parameters that the checkpoint stores both, and not alike."""
    pairs = [pair for pair in dict(model.all_tied_weights_keys).items() if checkpoint.names.issuperset(pair)]
    return [(first, second) for first, second in pairs if not torch.equal(*map(checkpoint.read, (first, second)))]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _of_no_account(stored: LazyTensors, name: str) -> bool:
    if _OF_NO_ACCOUNT.search(name):
        return True
    # Older GPT-2 and GPT-NeoX checkpoints store each layer's causal mask.
    return bool(_CAUSAL_MASK.search(name)) and len(stored.shape(name)) == 4


def _stands_apart(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to a part of its own, of which the model has nothing."""
    if _ADAPTER.search(name):
        return False
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return True
    layer = re.search(r"(^|\.)layers\.(\d+)\.", name)
    if layer is not None and int(layer[2]) in _predicting_layers(model.config.get_text_config()):
        return True
    return any(_apart(model, spelled) for spelled in _spellings(model, name))


def _predicting_layers(config: PreTrainedConfig) -> range:
    """Numbers of the layers behind the last that predict further tokens, as DeepSeek-V3 and its kin store them."""
    last = getattr(config, "num_hidden_layers", 0)
    return range(last, last + (getattr(config, "num_nextn_predict_layers", None) or 0))


def _spellings(model: PreTrainedModel, name: str) -> Iterator[str]:
    """The name as a model with a head would have it."""
    base = model.base_model_prefix
    inside = name.split(".")[0] in dict(model.base_model.named_children())
    yield f"{base}.{name}" if inside and not name.startswith(f"{base}.") else name


def _apart(model: PreTrainedModel, name: str) -> bool:
    owner: torch.nn.Module = model
    *modules, _ = name.split(".")
    for part in modules:
        children = dict(owner.named_children())
        if part not in children:
            # Not a list of layers that is longer than the configuration says, nor something inside a layer.
            return bool(children) and not part.isdigit() and not _inside_layers(model, owner)
        owner = children[part]
    return False


def _inside_layers(model: PreTrainedModel, owner: torch.nn.Module) -> bool:
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return any(owner is inner for one in lists for inner in one.modules())


def _missing_part(model: PreTrainedModel, name: str) -> str:
    """The first part of a name that is no module of the model, with what stands before it."""
    owner: torch.nn.Module = model
    at: list[str] = []
    for part in name.split("."):
        at.append(part)
        children = dict(owner.named_children())
        if part not in children:
            break
        owner = children[part]
    return ".".join(at)

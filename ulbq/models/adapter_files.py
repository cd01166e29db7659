"""An artifact's adapter as the peft library stores it: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel

from ulbq import limits
from ulbq.artifacts.disk import write_atomically, writing
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.artifacts.small_files import read_json
from ulbq.config.adapter import AdapterConfig
from ulbq.errors import InputError, NumericsError
from ulbq.limits import bounded
from ulbq.models.side_files import check_link
from ulbq.models.source import ModelSource
from ulbq.nn.adapter import Adapter
from ulbq.nn.experts import Experts

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_FOLDER = "adapter"
"""Where an artifact holds its adapter."""

# What says where an adapter came from or which layers it is beside, and that is told by its tensors.
_ASIDE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
    | {"target_modules"}
)

AdapterTensors = dict[str, dict[str, torch.Tensor]]
"""Stored tensors by peft's short name (``lora_A.weight``), by full name of the linear layer."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

ADAPTER_FILES = (f"{ADAPTER_FOLDER}/{_CONFIG}", f"{ADAPTER_FOLDER}/{_WEIGHTS}")
"""What an artifact's adapter consists of, relative to the artifact."""

_PREFIX = "base_model.model."
_SHORT = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_HINT = "Make the artifact again, or restore it from a copy; `adapter=False` leaves the adapter out."


class _StoredAdapter(BaseModel):
    """What counts of peft's configuration; the forms of LoRA that ulbq does not write are refused."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1, le=limits.WIDTH)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(default=0, ge=0, lt=1)
    use_dora: bool = False
    bias: Literal["none"] = "none"
    use_rslora: Literal[False] = False
    rank_pattern: dict[str, Any] = Field(default={}, max_length=0)
    alpha_pattern: dict[str, Any] = Field(default={}, max_length=0)


def _not_ours(values: Mapping[str, Any]) -> str | None:
    """The first key of peft's that is set to what ulbq does not compute; None where all are as peft has them."""
    from peft import LoraConfig

    usual: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        if name in _StoredAdapter.model_fields or name in _ASIDE:
            continue
        # A key that this version of peft does not know is a feature that is off if its value is.
        if value != usual[name] if name in usual else value:
            return f"{name} {json.dumps(value)[:60]}"
    return None


def adapter_folder(source: ModelSource) -> Path | None:
    """Where a model's adapter lies; None for one without. Only artifacts have adapters."""
    folder = source.path / ADAPTER_FOLDER
    return folder if source.kind == "artifact" and folder.is_dir() else None


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, torch.Tensor], base_name: str) -> None:
    """Write an adapter folder that ``peft.PeftModel.from_pretrained`` loads onto the model.

    Args:
        folder: made where it is missing.
        config: form of the adapter; which layers it is for is told by ``tensors``.
        tensors: by full name of the linear layer, a dot and peft's short name, as of :meth:`Adapter.tensors`.
        base_name: path or id of the model that the adapter is for.

    Raises:
        NumericsError: values that float16 does not hold.
        ResourceError: the disk is full or refuses.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NumericsError(
                f"The adapter's '{name}' has values that are not finite in float16.",
                hint="Train the adapter at a lower rate.",
            )
    described = lora_config(config, {split_name(name)[0] for name in tensors})
    described.base_model_name_or_path = base_name
    described.inference_mode = True
    with writing(folder):
        folder.mkdir(exist_ok=True)
        described.save_pretrained(str(folder))
        write_shard(folder / _WEIGHTS, {_PREFIX + name: tensor.to(torch.float16) for name, tensor in tensors.items()})


def copy_adapter(source: Path, folder: Path, base_name: str) -> None:
    """Copy an adapter's two files into a folder that is made; nothing else that lies beside them.

    Args:
        source: its own folder.
        folder: the copy's.
        base_name: path of the model that the copy is for.

    Raises:
        InputError: one is missing, or a link that leads out of its folder.
    """
    folder.mkdir()
    for name in (_CONFIG, _WEIGHTS):
        check_link(source / name, source.parent)
        if not (source / name).is_file():
            raise InputError(f"'{source / name}' is missing.", hint=_HINT)
        shutil.copyfile(source / name, folder / name)
    described = read_json(folder / _CONFIG, limits.SETTINGS_SIZE) | {"base_model_name_or_path": base_name}
    write_atomically(folder / _CONFIG, (json.dumps(described, indent=2) + "\n").encode())


def lora_config(config: AdapterConfig, linears: Collection[str]) -> "LoraConfig":
    """How peft describes an adapter beside the layers of these full names."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        # peft declares whole numbers, and computes with any.
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=target_pattern(set(linears)),
        task_type="CAUSAL_LM",
    )


def read_config(folder: Path) -> AdapterConfig:
    """The form of a stored adapter, without its ``targets``. Raises InputError where it cannot be read."""
    path = folder / _CONFIG
    try:
        values = read_json(path, limits.SETTINGS_SIZE)
        stored = _StoredAdapter.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise InputError(f"'{path}' is not ulbq's LoRA or DoRA: {field}: {first['msg']}.", hint=_HINT) from error
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read: {error}.", hint=_HINT) from error
    if odd := _not_ours(values):
        raise InputError(
            f"'{path}' is not ulbq's LoRA or DoRA: {odd} changes what the adapter computes, and is not supported.",
            hint=_HINT,
        )
    return AdapterConfig(rank=stored.r, alpha=stored.lora_alpha, dropout=stored.lora_dropout, dora=stored.use_dora)


def read_adapter(folder: Path) -> tuple[AdapterConfig, AdapterTensors]:
    """A stored adapter.

    Args:
        folder: the adapter's own folder.

    Returns:
        Its form, the adapted layers spelled out in ``targets`` (within the blocks where all blocks are alike, else in
        full), and its float16 tensors by linear layer.

    Raises:
        InputError: a file is missing or damaged, or a layer's tensors do not make an adapter of that form.
    """
    config = read_config(folder)
    stored = LazyTensors([folder / _WEIGHTS])
    for name in sorted(stored.names):
        if not split_name(name)[0].startswith(_PREFIX):
            raise InputError(f"'{folder / _WEIGHTS}' holds '{name}', which is no part of an adapter.", hint=_HINT)
    found = by_layer(stored, _PREFIX)
    if not found:
        raise InputError(f"'{folder / _WEIGHTS}' holds no adapter.", hint=_HINT)
    for linear, tensors in found.items():
        _check(folder, linear, tensors, config)
    return config.model_copy(update={"targets": _targets(found)}), found


def load_adapters(model: PreTrainedModel, folder: Path) -> dict[str, Adapter]:
    """A stored adapter as modules, float32 and trainable, by full name of the linear layer.

    Args:
        model: what it is for; a skeleton will do.
        folder: the adapter's own folder.

    Raises:
        InputError: the adapter is damaged, or belongs to another model.
    """
    config, found = read_adapter(folder)
    check_fits(model, folder, found)
    return build_adapters(config, found)


def by_layer(stored: LazyTensors, prefix: str) -> AdapterTensors:
    """The tensors of adapters, by linear layer and peft's short name; ``prefix`` is taken off the layers' names."""
    found: AdapterTensors = {}
    for name in sorted(stored.names):
        linear, short = split_name(name.removeprefix(prefix))
        found.setdefault(linear, {})[short] = stored.read(name)
    return found


def build_adapters(config: AdapterConfig, found: AdapterTensors) -> dict[str, Adapter]:
    """Stored adapters as modules, float32 and trainable, by linear layer."""
    adapters = {}
    for linear, tensors in found.items():
        columns, rows = tensors["lora_A.weight"].shape[1], tensors["lora_B.weight"].shape[0]
        # Its own generator: the values are replaced, and torch's global one must not notice.
        adapters[linear] = Adapter(config, columns, rows, generator=torch.Generator())
        adapters[linear].assign(tensors)
    return adapters


def attach_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put a stored adapter onto a model, through peft itself; the model stays the object that it is.

    Raises:
        InputError: the adapter is damaged, or belongs to another model; or peft rewrites its layers' names for this
            kind of model, as it does where transformers fused the experts of a mixture that has shared ones too.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    config, found = read_adapter(folder)
    check_fits(model, folder, found)
    # Described by its tensors, not by its own words: they name the same layers, as was seen, and any number of others.
    described = lora_config(config, found)
    described.inference_mode = True
    with calm_peft(model):
        try:
            # Without the device peft would read the tensors onto any accelerator that it finds.
            wrapped = PeftModel.from_pretrained(model, str(folder), config=described, torch_device=str(model.device))
        except ValueError as error:
            raise beyond_peft(model, f"the adapter in '{folder}'") from error
    if {name for name, module in model.named_modules() if isinstance(module, LoraLayer)} != found.keys():
        raise beyond_peft(model, f"the adapter in '{folder}'")
    # The layers were exchanged in place; peft's own wrapper around the model is not needed.
    wrapped.requires_grad_(False).eval()
    return model


@contextmanager
def calm_peft(model: PreTrainedModel) -> Iterator[None]:
    """Keep peft quiet, and from taking single experts for fused ones, whose layers it would call otherwise."""
    config = model.config
    known = vars(config).get("model_type")
    single = any(isinstance(module, Experts) for module in model.modules())
    with warnings.catch_warnings():
        # peft asks the model by a property's old name.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        if single:
            vars(config)["model_type"] = ""
        try:
            yield
        finally:
            if single:
                del vars(config)["model_type"]
                vars(config).update({} if known is None else {"model_type": known})


def beyond_peft(model: PreTrainedModel, what: str) -> InputError:
    """The sentence for an adapter that peft misplaces; ``what`` names it."""
    return InputError(
        f"peft puts {what} onto other layers than it is for, in a '{model.config.model_type}'.",
        hint="Adapt the attention alone (q_proj, k_proj, v_proj, o_proj), or use `adapter=False`.",
    )


def check_fits(model: PreTrainedModel, folder: Path, found: AdapterTensors) -> None:
    """Refuse an adapter for layers that a model has not, or one that lacks layers that it names. Raises InputError."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(model.named_modules())
    for linear, tensors in found.items():
        layer = modules.get(linear)
        shape = (tensors["lora_B.weight"].shape[0], tensors["lora_A.weight"].shape[1])
        if not isinstance(layer, torch.nn.Linear) or (layer.out_features, layer.in_features) != shape:
            raise InputError(
                f"The adapter in '{folder}' is for another model: '{linear}' is no layer of {list(shape)} here.",
                hint=_HINT,
            )
    with bounded(f"The target_modules of the adapter in '{folder}'", hint=_HINT), sound_pattern(folder):
        described = LoraConfig.from_pretrained(str(folder))
        # peft would only warn of these, and go on with an adapter of noise.
        for name in sorted(modules.keys() - found.keys()):
            if check_target_module_exists(described, name):
                raise InputError(f"The adapter in '{folder}' lacks the tensors of '{name}'.", hint=_HINT)


@contextmanager
def sound_pattern(folder: Path) -> Iterator[None]:
    """A sentence for target_modules that are neither names nor an expression."""
    try:
        yield
    except (re.error, RecursionError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"The target_modules of the adapter in '{folder}' make no sense: {error}.", hint=_HINT
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """Linear layer and peft's short name; the layer is empty where the name ends in none of them."""
    short = next((short for short in _SHORT if name.endswith(f".{short}")), "")
    return (name.removesuffix(f".{short}"), short) if short else ("", name)


def _check(folder: Path, linear: str, tensors: Mapping[str, torch.Tensor], config: AdapterConfig) -> None:
    """Refuse tensors that do not make one layer's adapter. Raises InputError."""
    a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
    if a is None or b is None or (config.dora and "lora_magnitude_vector" not in tensors):
        raise InputError(f"The adapter in '{folder}' lacks tensors of '{linear}'.", hint=_HINT)
    expected: dict[str, tuple[int, ...]] = {
        "lora_A.weight": (config.rank, a.shape[-1]),
        "lora_B.weight": (b.shape[0], config.rank),
    }
    if config.dora:
        expected["lora_magnitude_vector"] = (b.shape[0],)
    for short, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(short):
            raise InputError(
                f"The adapter in '{folder}' holds '{linear}.{short}' as {list(tensor.shape)}, "
                f"which its {_CONFIG} does not say.",
                hint=_HINT,
            )


def _indexed(linear: str) -> tuple[str, str, str]:
    """A layer's name before, at and after its block's number; the number is empty where the name has none."""
    match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", linear)
    return (match[1], match[2], match[3]) if match else (linear, "", "")


def _layers(linears: Iterable[str]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Names inside the blocks, by the list of blocks and the numbers of the blocks that have them."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for prefix, number, suffix in map(_indexed, linears):
        numbers.setdefault((prefix, suffix), []).append(number)
    keys = {name: (name[0], tuple(sorted(found, key=lambda n: int(n or 0)))) for name, found in numbers.items()}
    ordered = sorted(keys, key=lambda name: (keys[name], name))
    return {key: [suffix for _, suffix in names] for key, names in groupby(ordered, key=lambda name: keys[name])}


def target_pattern(linears: Iterable[str]) -> str:
    """The regular expression for peft's ``target_modules`` that matches these layers and no others."""

    def one(prefix: str, numbers: tuple[str, ...], suffixes: list[str]) -> str:
        if numbers == ("",):
            return re.escape(prefix)
        return f"{re.escape(prefix)}({'|'.join(numbers)})({'|'.join(map(re.escape, suffixes))})"

    return "|".join(one(*key, suffixes) for key, suffixes in _layers(linears).items())


def _targets(linears: Iterable[str]) -> tuple[str, ...]:
    """The adapted layers, spelled as short as is exact: inside their block where all blocks are adapted alike."""
    layers = _layers(linears)
    alike = len(layers) == 1 and all(numbers != ("",) for _, numbers in layers)
    return tuple(suffix[1:] for suffixes in layers.values() for suffix in suffixes) if alike else tuple(sorted(linears))

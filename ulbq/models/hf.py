"""Quantized artifacts for transformers: what ``AutoModelForCausalLM.from_pretrained`` needs to load them packed.

This module is imported while transformers itself is on its way in, so that everything else waits until a model is
loaded: what is imported here at the top is transformers' own, and loaded by then.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ulbq.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ulbq.artifacts.shards import LazyTensors
    from ulbq.formats import AnyScheme
    from ulbq.nn.quant_linear import QuantLinear

METHOD = "ulbq"
"""The ``quant_method`` of our artifacts."""

_ABOUT = ("method", "layers", "adapter", "prefill_cache")


@register_quantization_config(METHOD)
class UlbqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an artifact's ``config.json``.

    Args:
        method: what made the artifact, for people.
        layers: schemes of the layers that have one of their own, as JSON objects by full name. None in artifacts
            that are older than this key: then the manifest beside the weights says it, and without a manifest all
            layers must have the one scheme.
        adapter: whether the artifact's adapter shall be attached; None: if there is one.
        prefill_cache: keep a dense copy of every packed weight for products with many rows. It is a choice of whoever
            loads the model, and not saved.
        scheme: fields of the scheme of all layers that have none of their own.
    """

    def __init__(
        self,
        method: str = "",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        adapter: bool | None = None,
        prefill_cache: bool = False,
        quant_method: str = METHOD,
        **scheme: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.method = method
        self.layers = layers
        self.adapter = adapter
        self.prefill_cache = prefill_cache
        for name, value in scheme.items():
            setattr(self, name, value)

    @property
    def scheme(self) -> dict[str, Any]:
        """Fields of the scheme that layers share; empty where the configuration names none."""
        return {name: value for name, value in vars(self).items() if name not in (*_ABOUT, "quant_method")}

    def name_schemes(self, own: "Mapping[str, AnyScheme]", shared: "AnyScheme | None") -> None:
        """Say how layers are packed: what is saved from here on has no manifest to look it up in."""
        for field, value in (shared.model_dump(mode="json") if shared is not None else {}).items():
            setattr(self, field, value)
        self.layers = {name: scheme.model_dump(mode="json") for name, scheme in own.items() if scheme != shared}

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it."""
        found = super().to_dict()
        del found["prefill_cache"]
        return {name: value for name, value in found.items() if value is not None}


@register_quantizer(METHOD)
class UlbqQuantizer(HfQuantizer):
    """Puts packed layers into a model before its weights are loaded, and the adapter onto it afterwards.

    Errors are :class:`~ulbq.errors.UlbqError`, as everywhere in ulbq.
    """

    quantization_config: UlbqConfig

    def __init__(self, quantization_config: UlbqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packed: frozenset[str] = frozenset()
        self._folder: Path | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what packed layers cannot do: be made on the fly, lie on a disk, or wait on the CPU for a GPU.

        Raises:
            UsageError: one of these.
        """
        if not self.pre_quantized:
            raise UsageError(
                "A model is not quantized while it is loaded.",
                hint="Quantize it first, 'ulbq quantize MODEL -o DIR', and load DIR.",
            )
        if isinstance(device_map, dict):
            _check_devices(device_map)

    def get_new_dtype(self, converter: Any, param: Any, dtype: "torch.dtype | None") -> "torch.dtype | None":
        """Packed tensors stay as they are stored, whatever dtype the model has: a rounded scale is another weight."""
        target = converter.target_patterns[0].rpartition(".")[0]
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return None if target in self._packed else kept

    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        dtype: "torch.dtype | None" = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Exchange the linear layers that the checkpoint holds packed for empty packed ones.

        Raises:
            InputError: packed tensors are missing, or are not what configuration or manifest say.
        """
        import torch

        from ulbq.artifacts.shards import LazyTensors
        from ulbq.nn.quant_linear import is_dense_linear

        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise InputError(
                "Packed weights are loaded from the safetensors files of an artifact, and from nothing else."
            )
        stored, self._folder = LazyTensors(files), files[0].parent
        own, shared = read_schemes(self.quantization_config, self._folder)
        owners = {name.removesuffix(".codes") for name in stored.names if name.endswith(".codes")}
        base = f"{model.base_model_prefix}."
        # Those that were left out too, which are stored one by one and in full.
        layers = {name.rpartition(".")[0] for name in stored.names}
        _unfuse(model, {spelled for name in layers for spelled in (name, base + name, name.removeprefix(base))})
        found: dict[str, str] = {}
        for name, linear in list(model.named_modules()):
            spelled = (name, base + name, name.removeprefix(base))
            key = next((spelling for spelling in spelled if spelling in owners), None)
            if key is None or not (type(linear) is torch.nn.Embedding or is_dense_linear(linear)):
                continue
            scheme = own.get(key, shared)
            if scheme is None:
                raise InputError(
                    f"How '{key}' in '{self._folder}' is packed is written nowhere.",
                    hint="Copy the whole artifact again, its manifest.json above all.",
                )
            _check_stored(stored, key, scheme, (linear.weight.shape[0], linear.weight.shape[1]))
            packed = _exchanged(model, name, key, scheme, dtype or model.dtype)
            packed.cache = self.quantization_config.prefill_cache
            # transformers would draw random weights for it otherwise.
            packed._is_hf_initialized = True  # type: ignore[assignment]
            found[name] = key
        if lost := owners.difference(found.values()):
            raise InputError(
                f"'{self._folder}' holds '{min(lost)}' packed, and a {type(model).__name__} has no such linear layer.",
                hint="Its config.json belongs to another model.",
            )
        self._packed = frozenset(found)
        guards = {re.escape(f"{name}.weight") for name, key in found.items() if f"{key}.weight" in stored.guards}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *guards}
        self.quantization_config.name_schemes({key: own[key] for key in found.values() if key in own}, shared)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Bring packed weights into the layout that products take, and attach the adapter."""
        from ulbq.models.adapter_files import ADAPTER_FOLDER, attach_adapter
        from ulbq.nn.experts import Experts
        from ulbq.nn.quant_linear import QuantLinear

        _check_devices(getattr(model, "hf_device_map", None) or {})
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.prepare()
            if isinstance(module, Experts):
                # What is saved keeps the names of today: transformers' older ones have no place for packed experts.
                model._weight_conversions = []  # type: ignore[assignment]
        config, folder = self.quantization_config, self._folder
        adapter = None if folder is None else folder / ADAPTER_FOLDER
        if adapter is None or config.adapter is False or (config.adapter is None and not adapter.is_dir()):
            config.adapter = False
            return model
        if not adapter.is_dir():
            raise InputError(
                f"The model in '{folder}' was trained with an adapter, and that is not beside it.",
                hint="Fetch all of it, with 'hf download' for one, and load that folder.",
            )
        config.adapter = True
        return attach_adapter(model, adapter)

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> "tuple[dict[str, torch.Tensor] | None, dict[str, str]]":
        """The stored tensors of packed layers, and a guard as in the artifact; peft's adapter alone where one trains.

        Raises:
            UsageError: the artifact's own adapter is attached.
        """
        if self.quantization_config.adapter:
            raise UsageError(
                "A model with its adapter attached cannot be saved as one: an artifact holds them apart.",
                hint="Copy the artifact's folder; or load the base alone, with quantization_config['adapter'] = False "
                "in its configuration, and save peft's adapter and the base one after the other.",
            )
        if getattr(model, "_hf_peft_config_loaded", False) or not self._packed:
            return None, {}
        import torch

        from ulbq.artifacts.shards import guarded

        return model.state_dict() | {f"{guarded(self._packed)}.weight": torch.empty(0, dtype=torch.bfloat16)}, {}

    def _dequantize(self, model: "PreTrainedModel", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        raise UsageError(
            "A packed model is not made dense in memory.", hint="'ulbq convert DIR --to dense' writes a dense model."
        )

    def is_serializable(self) -> bool:
        """Packed layers save the tensors that they were loaded from."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on packed layers, which hand gradients on."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The products are operators that torch.compile knows."""
        return True


def read_schemes(config: UlbqConfig, folder: Path) -> "tuple[dict[str, AnyScheme], AnyScheme | None]":
    """Schemes by full layer name, and that of all other layers; None where nothing says it. Raises InputError."""
    from ulbq.artifacts.manifest import MANIFEST_NAME, QuantizedManifest, read_manifest
    from ulbq.formats import read_scheme

    layers, shared = config.layers, config.scheme
    if layers is None and (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        if isinstance(manifest, QuantizedManifest):
            layers, shared = {layer.name: layer.scheme for layer in manifest.layers}, manifest.scheme
    try:
        own = {name: read_scheme(scheme) for name, scheme in (layers or {}).items()}
        return own, read_scheme(shared) if shared else None
    except ValueError as error:
        raise InputError(
            f"'{folder}' stores weights in a format that this version of ulbq does not know.",
            hint="Upgrade with 'pip install --upgrade ulbq'.",
        ) from error


def _unfuse(model: "PreTrainedModel", layers: set[str]) -> None:
    """Put single experts in the place of fused ones of which some of these layers are."""
    from ulbq.models.experts import unfuse
    from ulbq.nn.experts import Experts

    unfuse(model, layers)
    for module in model.modules():
        if any(isinstance(child, Experts) for child in module.children()):
            # Qwen3-Omni's would draw the fused weights that are not there any more.
            module._is_hf_initialized = True  # type: ignore[assignment]


def _exchanged(
    model: "PreTrainedModel", name: str, stored: str, scheme: "AnyScheme", dtype: "torch.dtype"
) -> "QuantLinear":
    """The empty packed layer or table that now stands in the place of a dense one, which is ``stored`` by that name.

    Raises:
        InputError: the scheme is none of a table's.
    """
    import torch

    from ulbq.nn.quant_embedding import QuantEmbedding, swap_table
    from ulbq.nn.quant_linear import QuantLinear

    dense: Any = model.get_submodule(name)
    with torch.device("meta"):
        if not isinstance(dense, torch.nn.Embedding):
            bias = dense.bias is not None
            layer = QuantLinear(scheme, dense.in_features, dense.out_features, bias=bias, dtype=dtype)
            model.set_submodule(name, layer)
            return layer
        try:
            table = QuantEmbedding(scheme, dense, dtype=dtype)
        except ValueError as error:
            raise _mismatch(stored, str(error)) from error
        swap_table(model, name, table, _untie(model, name))
        return table


def _untie(model: "PreTrainedModel", embedding: str) -> list[str]:
    """Names of the modules whose weight is the embedding's; transformers is told that it has no parameter to tie."""
    ties = model.all_tied_weights_keys
    tied = [name for name, source in ties.items() if source == f"{embedding}.weight"]
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if name not in tied}
    model._tied_weights_keys = {
        name: source for name, source in (model._tied_weights_keys or {}).items() if name not in tied
    }
    return [name.removesuffix(".weight") for name in tied]


def _check_devices(device_map: Mapping[str, Any]) -> None:
    devices = {str(device) for device in device_map.values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise UsageError(
            "Packed layers stay on the device that they run on: they are not offloaded to the disk or the CPU.",
            hint="Give a device_map of GPUs alone, or 'cpu'.",
        )


def _check_stored(stored: "LazyTensors", linear: str, scheme: "AnyScheme", shape: tuple[int, int]) -> None:
    """Compare the headers of a layer's tensors with its scheme. Raises InputError."""
    import torch

    try:
        specs = scheme.tensors(*shape)
    except ValueError as error:
        raise _mismatch(linear, str(error)) from error
    for short, spec in specs.items():
        name = f"{linear}.{short}"
        if name not in stored.names:
            raise _mismatch(linear, f"'{short}' is missing")
        if stored.shape(name) != spec.shape or stored.dtype(name) != getattr(torch, spec.dtype):
            raise _mismatch(linear, f"'{short}' must be {spec.dtype} {list(spec.shape)}")


def _mismatch(linear: str, what: str) -> InputError:
    return InputError(
        f"'{linear}' is packed otherwise than the configuration says: {what}.",
        hint="Copy the whole artifact again, its manifest.json with it; 'ulbq inspect --verify' checks it.",
    )

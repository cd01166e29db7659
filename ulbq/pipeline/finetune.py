"""``finetune``: a quantized artifact goes on learning as a whole; what it is stored as is read from its manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.config.quantize import QuantizeRequest, takes
from ulbq.errors import InputError
from ulbq.methods import METHODS
from ulbq.models.adapter_files import adapter_folder, read_adapter
from ulbq.models.source import ModelSource, resolve
from ulbq.quantizers.trainable import TRAINABLE


def end_to_end_request(source: str, options: Mapping[str, Any]) -> QuantizeRequest:
    """The quantization run that trains an artifact end to end and leaves its blocks as they are.

    Args:
        source: path of the artifact.
        options: fields of a request that say how; None for what was left open.

    Raises:
        InputError: no quantized artifact, or one that cannot be read.
    """
    found = resolve(source, offline=bool(options.get("offline")))
    if not isinstance(found.manifest, QuantizedManifest):
        raise InputError(
            f"'{source}' is no quantized artifact, and there is nothing to fine-tune end to end.",
            hint="Quantize it first: 'ulbq quantize'.",
        )
    manifest = found.manifest
    own = manifest.method in METHODS and "end_to_end" in takes(manifest.method)
    method = manifest.method if own else TRAINABLE[manifest.scheme["format"]].method
    known = takes(method)
    form = {name: value for name, value in manifest.scheme.items() if name in known}
    given = {name: value for name, value in options.items() if value is not None}
    values = {"source": source, "method": method, "epochs": 0, **form, **_adapter(found), **given}
    if "penalty" in known:
        values["penalty"] = 0.0  # what holds salient weights in place has no part in this
    if values.get("end_to_end_train") == "all":
        values["train_weights"] = True
    return QuantizeRequest.model_validate(values)


def telling_name(source: str) -> str:
    """What the artifact is called that such a run makes."""
    return f"{Path(source).resolve().name}-end-to-end"


def _adapter(source: ModelSource) -> dict[str, Any]:
    """Options for the adapter that an artifact has, or for none."""
    folder = adapter_folder(source)
    if folder is None:
        return {"adapter": False}
    config, adapters = read_adapter(folder)
    targets = {} if adapters.keys() == source.packed.keys() else {"targets": config.targets}
    return {"adapter": True, "rank": config.rank, "alpha": config.alpha, "dora": config.dora, **targets}

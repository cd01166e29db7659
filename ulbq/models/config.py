"""Reads a model's configuration, and refuses what is not a causal language model that we can open."""

import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ulbq import limits
from ulbq.artifacts.small_files import parse_json, read_small
from ulbq.errors import InputError
from ulbq.models.gguf_header import GgufHeader
from ulbq.models.rope_factors import ROPE_FACTORS, scale_frequencies
from ulbq.models.tokenizer_files import check_ids

# What transformers raises for a configuration that it cannot use, depending on where it notices.
_CONFIG_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)
# Largest numbers that a configuration or a GGUF header may hold, by their names.
_WIDTHS = (
    r"hidden_size|intermediate_size|head_dim|_heads|n_embd|n_head|d_model|ffn_dim|head_count|"
    r"embedding_length|feed_forward_length|key_length|value_length"
)
_MOST = (
    (re.compile(r"(num_|n_)?(\w+_)?(layers?|blocks|block_count|depth)"), limits.LAYERS),
    (re.compile(r"(num_|n_)(\w+_)?experts|expert_count"), limits.EXPERTS),
    (re.compile(rf"\w*({_WIDTHS})"), limits.WIDTH),
    (re.compile(r"(\w+_)?vocab_size"), limits.VOCABULARY),
)
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of a configuration, at any depth, under which tools describe how they packed the weights."""

_QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside the weights that say the same, with the tool that writes each."""

_GGUF_SIZES = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Fields of a configuration by what a GGUF file calls them."""

_NOT_GENERATIVE = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder in Hugging Face layout, without its ``quantization_config``.

    Raises:
        InputError: no ``config.json``, not JSON, an architecture that transformers does not know, one that runs code
            from the repository, or a model that is not a causal language model.
    """
    raw = read_raw_config(folder)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(
            f"'{folder / 'config.json'}' names no model_type.",
            hint="ulbq needs the config.json of a transformers causal language model.",
        )
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise InputError(
                f"'{folder}' brings its own Python code for model type '{model_type}', which ulbq does not run.",
                hint="Use a model whose architecture is part of transformers.",
            )
        raise InputError(
            f"transformers {transformers.__version__} does not know the model type '{model_type}' of '{folder}'.",
            hint="A newer version may: pip install --upgrade transformers.",
        )
    try:
        config = AutoConfig.for_model(**_plain(raw))
    except _CONFIG_ERRORS as error:
        raise InputError(
            f"'{folder / 'config.json'}' cannot be read as a '{model_type}' model: {_first(error)}"
        ) from error
    config.name_or_path = str(folder)
    check_causal(config, str(folder))
    _name_class(config)
    return config


def read_raw_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands. Raises InputError where it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"'{folder}' has no config.json, so it is not a model folder.", hint=_what_lies_there(folder))
    try:
        # As Python writes it, Infinity and all; transformers writes such numbers as objects, {"__float__": "Infinity"}.
        read = parse_json(read_small(path, limits.CONFIG_SIZE).decode("utf-8"), constants=True)
        raw = PreTrainedConfig._decode_special_floats(read)
    except (ValueError, OSError) as error:
        raise InputError(f"'{path}' cannot be read: {_first(error)}", hint="Fetch the model again.") from error
    if not isinstance(raw, dict):
        raise InputError(f"'{path}' is not a JSON object.", hint="Fetch the model again.")
    check_counts(raw, str(path))
    check_ids(raw, str(path))
    return raw


def packing(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """What says how a folder's weights are packed; None where nothing says that they are.

    Looks at every depth of the configuration (multimodal models describe their text model inside) and at the files
    that older tools write beside it.

    Args:
        folder: of the model.
        raw: its ``config.json``.

    Returns:
        The description, with the tool that packed them as its ``quant_method``.
    """
    if (said := quantization(raw)) is not None:
        return {**said, "quant_method": str(said.get("quant_method") or _undersigned(said))}
    for name, tool in _QUANTIZATION_FILES.items():
        if (beside := _describes(folder / name)) is not None:
            return {**beside, "quant_method": tool}
    return None


def _undersigned(said: Mapping[str, Any]) -> str:
    """The tool behind a description that names none."""
    if {"bits", "group_size"} <= said.keys():
        return "mlx"
    return "compressed-tensors" if "config_groups" in said else "an unknown tool"


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of weights that are not packed, and of no code of its own."""
    left = {key: value for key, value in raw.items() if key not in (*_QUANTIZATION_KEYS, "auto_map")}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in left.items()}


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a ``config.json`` says of how its weights are packed, at whichever depth; None where it says nothing."""
    for key in _QUANTIZATION_KEYS:
        if value := raw.get(key):
            return value if isinstance(value, dict) else {}
    inner = (value for value in raw.values() if isinstance(value, dict))
    return next((found for value in inner if (found := quantization(value)) is not None), None)


def _describes(file: Path) -> dict[str, Any] | None:
    """What a file says of packed weights; ModelOpt's may say nothing of them, but of the cache of keys and values."""
    if not file.is_file():
        return None
    try:
        said = parse_json(read_small(file, limits.SETTINGS_SIZE).decode("utf-8"))
    except (ValueError, OSError):
        return {}
    about = said.get("quantization") if isinstance(said, dict) else None
    if isinstance(about, dict) and "quant_algo" in about and about["quant_algo"] is None:
        return None
    return said if isinstance(said, dict) else {}


def read_gguf_config(file: Path, header: GgufHeader) -> PreTrainedConfig:
    """The configuration that transformers derives from a GGUF file's metadata. Raises InputError where it cannot."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            # With the vocabulary in it, transformers would read for seconds what it then leaves out.
            Path(folder, file.name).write_bytes(header.without_vocabulary())
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=file.name)
    except (*_CONFIG_ERRORS, IndexError, struct.error) as error:
        raise InputError(
            f"transformers cannot derive a model configuration from '{file}': {_first(error)}",
            hint="Use the model's original folder or Hub id instead of the GGUF file.",
        ) from error
    if header.uncounted is not None:
        config.vocab_size = header.uncounted  # of some architectures transformers looks at the vocabulary alone
    for key, name in _GGUF_SIZES.items():
        stated = header.values.get(f"{header.architecture}.{key}")
        if isinstance(stated, int) and getattr(config, name, stated) != stated:
            setattr(config, name, stated)  # of some architectures transformers takes its own default
    config.name_or_path = str(file.parent)
    check_causal(config, str(file))
    _name_class(config)
    _scale_frequencies(config, file, header)
    return config


def _scale_frequencies(config: PreTrainedConfig, file: Path, header: GgufHeader) -> None:
    """Take over what a GGUF file divides its rotary frequencies by, of which transformers takes no notice."""
    stored = header.tensors.get(ROPE_FACTORS)
    if stored is None:
        return
    # Anything else than a short row of float32 is no such file's.
    sound = stored.kind == GGMLQuantizationType.F32 and len(stored.shape) == 1 and stored.shape[0] <= limits.WIDTH
    if not sound or not scale_frequencies(config, torch.from_numpy(header.data(ROPE_FACTORS).view(np.float32).copy())):
        raise InputError(
            f"'{file}' scales its rotary frequencies ('{ROPE_FACTORS}') as no rotary embedding of transformers does.",
            hint="Use the model's original folder or Hub id instead of the GGUF file.",
        )


def cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes that the keys and values of one token take in all layers together, ``itemsize`` each value.

    Layers without attention count as if they had it: an upper bound for hybrids.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = (getattr(config, "num_key_value_heads", None) or heads) * width
    return int(2 * config.num_hidden_layers * values * itemsize)


def check_counts(values: object, where: str) -> None:
    """Refuse a configuration that describes a model beyond all bounds: building it would not end. Raises InputError.

    Args:
        values: of the configuration, those of nested ones too.
        where: the file, for the message.
    """
    if isinstance(values, list):
        for value in values:
            check_counts(value, where)
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        if isinstance(value, int) and abs(value) > limits.LAYERS:
            most = next((most for pattern, most in _MOST if pattern.fullmatch(str(name))), limits.COUNT)
            if abs(value) > most:
                raise InputError(f"'{where}' says {name} {_shown(value)}; ulbq takes up to {most:,}.")
        check_counts(value, where)


def check_gguf_counts(header: GgufHeader, where: str) -> None:
    """The same for the numbers in a GGUF file's header."""
    for name, value in header.values.items():
        check_counts({name.rpartition(".")[2]: value}, where)


def _shown(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**15 else f"of {len(str(value))} digits"


def check_causal(config: PreTrainedConfig, where: str) -> None:
    """Refuse encoders and encoder-decoders. Raises InputError."""
    if config.is_encoder_decoder:
        raise InputError(
            f"'{where}' is an encoder-decoder model ('{config.model_type}').",
            hint="ulbq quantizes decoder-only causal language models.",
        )
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InputError(f"'{where}' says architectures {architectures!r}, which are no names.", hint="Fetch it again.")
    headless = bool(architectures) and all(name.endswith(_NOT_GENERATIVE) for name in architectures)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if headless or not known:
        what = ", ".join(architectures) or config.model_type
        raise InputError(
            f"'{where}' is not a causal language model ({what}).",
            hint="ulbq quantizes decoder-only causal language models.",
        )


def _name_class(config: PreTrainedConfig) -> None:
    """Say in ``architectures`` which class the model is, where its source did not: engines load what that names."""
    if not config.architectures:
        names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
        config.architectures = [names[config.model_type]] if config.model_type in names else None


def _what_lies_there(folder: Path) -> str:
    """A hint drawn from what the folder holds instead."""
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"Give the GGUF file itself: {ggufs[0]}"
    if (folder / "adapter_config.json").is_file():
        return "It holds a PEFT adapter; give its base model."
    return "Give a folder in Hugging Face layout, a .gguf file, a Hub id or an artifact of ulbq."


def _first(error: BaseException) -> str:
    """The first line of an exception's text; the rest is for developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

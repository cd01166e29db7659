"""Loads a whole model, dense or packed, ready for logits and generation."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ulbq import limits
from ulbq.artifacts.small_files import parse_json, read_small
from ulbq.config.run import DtypeName
from ulbq.errors import InputError
from ulbq.models.adapter_files import adapter_folder, attach_adapter
from ulbq.models.blocks import materialize, skeleton
from ulbq.models.skeleton import empty_model
from ulbq.models.source import ModelSource
from ulbq.models.tokenizer_files import check_ids
from ulbq.nn.quant_linear import QuantLinear

DTYPES: dict[DtypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the names that options give them."""


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    adapter: bool = True,
    prefill_cache: bool = False,
) -> PreTrainedModel:
    """The model with all its parameters in memory, frozen and in eval mode.

    Packed linear layers stay packed; there is no dense copy of their weights.

    Args:
        source: the model.
        dtype: of parameters and of the arithmetic; what transformers keeps in another dtype has that.
        device: where it shall be.
        adapter: attach the adapter of an artifact that has one, as peft does; without it, the base alone.
        prefill_cache: keep a dense copy of every packed weight, in ``dtype``, from its first product with many rows on.

    Raises:
        InputError: a parameter is missing or has another shape than the configuration says, or a file beside the
            weights cannot be read, the adapter among them.
    """
    model = unfilled_model(source, dtype)
    materialize(model, source, None, device=device)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.cache = prefill_cache
    folder = adapter_folder(source) if adapter else None
    return model if folder is None else attach_adapter(model, folder)


def unfilled_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The skeleton that :func:`load_model` fills, with the model's own settings for writing.

    Raises:
        InputError: a file beside the weights cannot be read.
    """
    # In full precision experts stay as transformers has them, which computes them faster.
    model = skeleton(source, dtype) if source.packed else empty_model(source.config, dtype)
    model.config.dtype = dtype
    if (source.path / "generation_config.json").is_file():
        try:
            # First as a file of bounded size and depth, which transformers does not see to.
            parse_json(
                read_small(source.path / "generation_config.json", limits.SETTINGS_SIZE).decode(), constants=True
            )
            found = GenerationConfig.from_pretrained(source.path, local_files_only=True)
            # Strings that end a text want a tokenizer in every call; here a text ends by its tokens.
            found.stop_strings = None
            check_ids(found.to_dict(), str(source.path / "generation_config.json"))
            model.generation_config = found
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"'{source.path / 'generation_config.json'}' cannot be read.",
                hint="Fetch it again, or remove it: the model works without.",
            ) from error
    return model


def loading_memory(source: ModelSource, dtype: torch.dtype) -> int:
    """Bytes that :func:`load_model` takes: all weights, packed ones as they are stored; the largest matrix twice."""
    manifest = source.quantized
    layers = (*manifest.layers, *manifest.tables) if manifest else ()
    packed = {f"{layer.name}.weight" for layer in layers}
    dense = [p.nbytes for name, p in unfilled_model(source, dtype).named_parameters() if name not in packed]
    return sum(sum(layer.bits.values()) for layer in layers) // 8 + sum(dense) + max(dense) + source.gguf_size


class ModelMemory(NamedTuple):
    """Bytes that a loaded model holds.

    Attributes:
        weights: of parameters and buffers, packed ones as they are held for products; tied ones count once.
        cache: of dense copies beside packed weights.
    """

    weights: int
    cache: int


def model_memory(model: nn.Module) -> ModelMemory:
    """What a loaded model, or a part of one, holds now: caches grow with its first products."""
    held = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    layers = (layer for layer in model.modules() if isinstance(layer, QuantLinear))
    return ModelMemory(sum(held.values()), sum(layer.cached_bytes for layer in layers))

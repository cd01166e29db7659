"""Which models can be written as GGUF, and what their files say of them.

llama.cpp computes each architecture with code of its own. Those written here were read there and held against
transformers' logits; another architecture is refused, however like one of them it looks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig, PreTrainedModel

from ulbq.errors import InputError
from ulbq.export.rules import plain_reason
from ulbq.models.rope_factors import rope_type
from ulbq.models.source import ModelSource


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a model type.

    Attributes:
        permuted: rows of queries and keys are stored with the two halves of a head's rotary pairs interleaved.
        factors: its rotary frequencies can be divided by factors, one each, stored as ``rope_freqs.weight``.
        normalized: whether llama.cpp scales what a token's experts count to a sum of one; None without experts.
    """

    arch: MODEL_ARCH
    permuted: bool = False
    factors: bool = False
    normalized: bool | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, permuted=True, factors=True),
    "mistral": Family(MODEL_ARCH.LLAMA, permuted=True, factors=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "mixtral": Family(MODEL_ARCH.LLAMA, permuted=True, normalized=True),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, normalized=False),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, normalized=True),
}
"""By transformers' model type."""

# Whose code in llama.cpp reads biases of queries, keys and values alone, where transformers has four with one switch.
_WITHOUT_OUTPUT_BIAS = frozenset({"qwen3", "qwen3_moe"})

ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")
"""Ends of the names of what decides where tokens go, which llama.cpp has in float32."""


def unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Why a model has no GGUF file of ours; None where it has one."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"llama.cpp's form of '{config.model_type}' is none of those written here ({', '.join(FAMILIES)})"
    rope = rope_type(config)
    if rope != "default" and not (rope == "linear" or (family.factors and rope == "llama3")):
        return f"its rotary embedding is of the type '{rope}'"
    if (why := plain_reason(config, "llama.cpp")) is not None:
        return why
    if config.model_type in _WITHOUT_OUTPUT_BIAS and getattr(config, "attention_bias", False):
        return f"its attention's output has a bias, which llama.cpp does not read for '{config.model_type}'"
    return None if family.normalized is None else _of_experts(config, normalized=family.normalized)


def _of_experts(config: PreTrainedConfig, *, normalized: bool) -> str | None:
    """Why a mixture cannot be written whose type has a form in llama.cpp."""
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return "some of its blocks have no experts, and all have them in llama.cpp"
    if getattr(config, "norm_topk_prob", normalized) != normalized:
        return f"it has norm_topk_prob={config.norm_topk_prob}, and llama.cpp the contrary for '{config.model_type}'"
    if not getattr(config, "qkv_bias", True):
        return "its attention has no biases, which llama.cpp reads"
    return None


def family(source: ModelSource) -> Family:
    """The family of a model that :func:`unsupported_reason` lets through. Raises InputError for any other."""
    why = unsupported_reason(source.config)
    if why is not None:
        raise InputError(f"'{source.given}' cannot be written as GGUF: {why}.")
    return FAMILIES[source.config.model_type]


def head_width(config: PreTrainedConfig) -> int:
    """Values of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_hyperparameters(writer: GGUFWriter, source: ModelSource) -> None:
    """Write what llama.cpp must know to compute the model."""
    config, width = source.config, head_width(source.config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    if FAMILIES[config.model_type].normalized is not None:
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(parameters.get("rope_theta", 10000.0)))
    if rope_type(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))


def rope_factors(source: ModelSource, model: PreTrainedModel) -> torch.Tensor | None:
    """float32 ``[head_dim / 2]``: by what Llama 3 divides the rotary frequencies; None where it divides none."""
    if rope_type(source.config) != "llama3":
        return None
    scaled = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    width = head_width(source.config)
    base = float(source.config.rope_parameters["rope_theta"])
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled.float()


def row_order(source: ModelSource, name: str, rows: int) -> torch.Tensor | None:
    """In which order llama.cpp has the rows of a parameter; None where it has them as they are."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if not FAMILIES[source.config.model_type].permuted or owner not in ("q_proj", "k_proj"):
        return None
    width = head_width(source.config)
    return torch.arange(rows).view(rows // width, 2, width // 2).transpose(1, 2).flatten()

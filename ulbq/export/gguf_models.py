"""Which models can be written as GGUF, and what their files say of them.

llama.cpp computes each architecture with code of its own. Those written here were read there and held against
transformers' logits; another architecture is refused, however like one of them it looks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ulbq.errors import InputError
from ulbq.export.rules import plain_reason
from ulbq.models.rope_factors import ROPE_FACTORS
from ulbq.models.source import ModelSource


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a model type.

    Attributes:
        permuted: rows of queries and keys are stored with the two halves of a head's rotary pairs interleaved.
        ropes: rotary embeddings that it computes beside the plain one, by transformers' names.
        normalized: whether llama.cpp scales what a token's experts count to a sum of one; None without experts.
        period: of blocks whose attention reaches over a window, each such block reaches over all; 0 without windows.
        shifted: what norms multiply by is stored with the one added that transformers adds.
        numbers: what llama.cpp must know beside the common numbers: GGUFWriter's methods by names in the configuration.
        needs: values in the configuration that llama.cpp's code has as a matter of course.
        read: whether transformers has tables to read a file of it.
    """

    arch: MODEL_ARCH
    permuted: bool = False
    ropes: tuple[str, ...] = ("linear",)
    normalized: bool | None = None
    period: int = 0
    shifted: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    read: bool = True


_LLAMA = Family(MODEL_ARCH.LLAMA, permuted=True, ropes=("linear", "llama3"))
_SCALES = {
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}
_WINDOW = {"sliding_window": "add_sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False}

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, ropes=(), period=2, shifted=True, numbers=_WINDOW | _CAPS, needs=_GEMMA),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3,
        period=6,
        shifted=True,
        numbers=_WINDOW,
        needs=_GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "phi3": Family(MODEL_ARCH.PHI3, ropes=("longrope",)),
    "smollm3": Family(
        MODEL_ARCH.SMOLLM3, permuted=True, needs={"attention_bias": False, "mlp_bias": False}, read=False
    ),
    "olmo2": Family(MODEL_ARCH.OLMO2, needs={"attention_bias": False, "tie_word_embeddings": False}, read=False),
    "granite": Family(MODEL_ARCH.GRANITE, permuted=True, numbers=_SCALES, read=False),
    "glm4": Family(MODEL_ARCH.GLM4, read=False),
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
    kind = _rope(config).get("rope_type", "default")
    if kind != "default" and kind not in family.ropes:
        return f"its rotary embedding is of the type '{kind}'"
    for name, needed in family.needs.items():
        if getattr(config, name, needed) != needed:
            return f"it has {name}={getattr(config, name)!r}, and llama.cpp's '{config.model_type}' {needed!r}"
    if family.period:
        return _of_windows(config, family.period)
    if (why := plain_reason(config, "llama.cpp")) is not None:
        return why
    if config.model_type in _WITHOUT_OUTPUT_BIAS and getattr(config, "attention_bias", False):
        return f"its attention's output has a bias, which llama.cpp does not read for '{config.model_type}'"
    positions = getattr(config, "no_rope_layers", None) or []
    if positions != [int((index + 1) % 4 != 0) for index in range(len(positions))]:
        return "other blocks than every fourth go without rotary positions"
    return None if family.normalized is None else _of_experts(config, normalized=family.normalized)


def _of_windows(config: PreTrainedConfig, period: int) -> str | None:
    """Why a Gemma cannot be written."""
    kinds = ["full_attention" if (block + 1) % period == 0 else "sliding_attention" for block in range(1000)]
    if list(config.layer_types) != kinds[: config.num_hidden_layers]:
        return f"the blocks that attend to all tokens are not one in {period}"
    if config.use_bidirectional_attention:
        return "its attention looks ahead"
    # By the number of blocks llama.cpp knows the largest of each generation, and that it scales by another width.
    largest = config.num_hidden_layers == {2: 46, 6: 62}[period]
    scalar = config.hidden_size // config.num_attention_heads if largest else head_width(config)
    if config.query_pre_attn_scalar != scalar:
        return f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes {scalar}"
    if period == 2 and (config.attn_logit_softcapping is None or config.final_logit_softcapping is None):
        return "its logits have no bounds, and llama.cpp's do"
    return None


def _rope(config: PreTrainedConfig, kind: str = "full_attention") -> dict[str, Any]:
    """Transformers' parameters of the rotary embedding, of blocks of a kind where these have their own."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = parameters.get(kind, parameters)
    return found


def unread_reason(config: PreTrainedConfig) -> str | None:
    """Why transformers does not read the file of a model, as a sentence; None where it does."""
    if config.model_type == "mixtral":
        return "transformers takes a GGUF file of a Mixtral for one of a Llama."
    if not FAMILIES[config.model_type].read:
        return f"transformers reads no GGUF file of a '{config.model_type}' model."
    if _rope(config).get("rope_type") == "longrope":
        return "transformers reads no factors for long text in a GGUF file."
    return None


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
    if FAMILIES[config.model_type].normalized is not None:
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for name, add in FAMILIES[config.model_type].numbers.items():
        getattr(writer, add)(getattr(config, name))
    _add_rope(writer, config)


def _add_rope(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    parameters = _rope(config)
    writer.add_rope_dimension_count(_rope_width(config))
    writer.add_rope_freq_base(float(parameters.get("rope_theta", 10000.0)))
    if (windowed := _rope(config, "sliding_attention")) != parameters:
        writer.add_rope_freq_base_swa(float(windowed["rope_theta"]))
    match parameters.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(parameters["factor"]))
        case "longrope":
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
            _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
            writer.add_rope_scaling_attn_factors(scale)


def _rope_width(config: PreTrainedConfig) -> int:
    """How many values of a head are rotated."""
    return int(head_width(config) * _rope(config).get("partial_rotary_factor", 1.0))


def rope_tensors(source: ModelSource, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By what rotary frequencies are divided: float32 ``[rotary width / 2]`` by llama.cpp's names; mostly none."""
    parameters = _rope(source.config)
    if parameters.get("rope_type") == "longrope":
        names = ("long", "short")
        return {f"rope_factors_{name}.weight": torch.tensor(parameters[f"{name}_factor"]).float() for name in names}
    if parameters.get("rope_type") != "llama3":
        return {}
    scaled = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    width = head_width(source.config)
    plain = 1.0 / float(parameters["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return {ROPE_FACTORS: plain / scaled.float()}


def shift(source: ModelSource, name: str) -> float:
    """What llama.cpp has added to a parameter."""
    return float(FAMILIES[source.config.model_type].shifted and name.endswith("norm.weight"))


def row_order(source: ModelSource, name: str, rows: int) -> torch.Tensor | None:
    """In which order llama.cpp has the rows of a parameter; None where it has them as they are."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if not FAMILIES[source.config.model_type].permuted or owner not in ("q_proj", "k_proj"):
        return None
    width = head_width(source.config)
    return torch.arange(rows).view(rows // width, 2, width // 2).transpose(1, 2).flatten()

"""Tiny models of the families that are written as GGUF, by tests.models.tiny's names: what to change in each."""

from typing import Any

_FIVE = ["sliding_attention"] * 5
_WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256}  # what transformers' reader takes them to be

GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers' reader takes them to be so wide
    "gemma2": _WIDE,
    "gemma3": {"num_hidden_layers": 7, "layer_types": [*_FIVE, "full_attention", "sliding_attention"], **_WIDE},
    "phi3": {},
    "smollm3": {"num_hidden_layers": 5},  # the fourth without rotary positions
    "olmo2": {"tied": False},
    "granite": {},
    "glm4": {"tied": False},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
}

# llama.cpp takes the long factors where its context is longer than the original one, whatever the text.
LONGROPE: dict[str, Any] = {
    **{"max_position_embeddings": 1024, "original_max_position_embeddings": 256},
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        **{"short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0], "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0]},
    },
}

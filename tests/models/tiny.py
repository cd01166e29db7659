"""Tiny random models of every family, with a tokenizer, saved as Hugging Face folders.

Norms and biases are random too: a layer whose bias was never read, or read from a neighbour, shows in the logits.
"""

import string
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_SPECIAL = ("<s>", "</s>", "<pad>")
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
# Alternating layer types, and a window short enough that a test's 32 tokens reach beyond it.
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
}

_FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    **{"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1},
}

# Experts that transformers holds fused. Of DeepSeek and GLM also a correction bias in a persistent buffer; GPT-OSS
# stores its own fused, as [in, out], gate and up by turns, and with biases; Llama 4 too, and scales what enters them.
_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "deepseek": ("deepseek_v3", _LATENT),
    "qwen2_moe": ("qwen2_moe", {**_FEW_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {**_FEW_EXPERTS, "head_dim": 32}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "glm4_moe": (
        "glm4_moe",
        {
            **{"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
            **{"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1},
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, **_SLIDING},
    ),
    "llama4": (
        "llama4_text",
        {
            **{"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 32},
            **{"intermediate_size_mlp": 64, "attention_chunk_size": 8},
        },
    ),
}

# Mamba beside attention.
_HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba": ("jamba", {"use_mamba_kernels": False}),
}

# Whose weights can be rotated like Llama's, with what each has of its own; and one that only looks so.
_LIKE_LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral": ("ministral", {"head_dim": 32}),
    "smollm3": ("smollm3", {}),
    "seed_oss": ("seed_oss", {"head_dim": 32, "attention_bias": True, "attention_out_bias": True}),
    "granite": (
        "granite",
        {
            **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
            **{"attention_multiplier": 0.3, "logits_scaling": 2.0},
        },
    ),
    "gemma": ("gemma", {"head_dim": 16}),
}

# Half of each head is rotated, in pairs that lie side by side.
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4": ("glm4", {"head_dim": 16}),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
MIXTURES: tuple[str, ...] = tuple(_MIXTURES)


def tiny_config(family: str, *, tied: bool | None = None, vocab: int = 256, **changes: Any) -> PreTrainedConfig:
    """Configuration of a model with three blocks and hidden size 64; ``tied`` None: as the family does."""
    model_type, special = (_FAMILIES | _MIXTURES | _HYBRIDS | _LIKE_LLAMA | _OTHERS)[family]
    values = {**_COMMON, "vocab_size": vocab, **special, **changes}
    if "layer_types" in special and "layer_types" not in changes:
        values["layer_types"] = special["layer_types"][: values["num_hidden_layers"]]
    if tied is not None:
        values["tie_word_embeddings"] = tied
    return AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if v is not None})


def tiny_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode; leaves torch's global generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            stored = model.state_dict()
            for name, buffer in model.named_buffers():
                if name in stored:
                    buffer.add_(torch.randn_like(buffer) * 0.1)
    return model.eval()


def tiny_tokenizer(vocab: int = 256) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly ``vocab`` tokens (246 to 922): three special ones, bytes, pairs of small letters."""
    # The thirteen bytes that no UTF-8 text holds make room for the special tokens.
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - never)
    merges = list(product(string.ascii_lowercase, repeat=2))[: vocab - len(_SPECIAL) - len(letters)]
    tokens = [*_SPECIAL, *letters, *map("".join, merges)]
    if len(tokens) != vocab:
        raise ValueError(f"this tokenizer cannot have {vocab} tokens")
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=_CHAT_TEMPLATE
    )


def save_tiny(
    family: str,
    folder: Path,
    *,
    tied: bool | None = None,
    vocab: int = 256,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a tiny model and its tokenizer into ``folder``, and return it.

    ``shard_size`` as in ``save_pretrained``: "100KB" makes several shards. ``changes`` go to the configuration.
    """
    model = tiny_model(tiny_config(family, tied=tied, vocab=vocab, **changes), seed=seed).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder

"""Writes a tiny Llama as a GGUF file, laid out as llama.cpp's own converter does it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from transformers import PreTrainedModel

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Vocabulary(NamedTuple):
    """A byte-level tokenizer as a GGUF file has it, or with scores one of SentencePiece's kind."""

    tokens: Sequence[str]
    merges: Sequence[str] = ()
    types: Sequence[int] = ()
    scores: Sequence[float] = ()


def write_tiny_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    architecture: str = "llama",
    parts: int = 1,
    says_vocabulary: bool = True,
    more: Mapping[str, torch.Tensor] = {},
    pre: str | None = "gpt-2",
    vocabulary: Vocabulary | None = None,
    add_bos: bool | None = None,
    add_space: bool | None = None,
) -> Path:
    """Write a tiny Llama with an untied head; linear weights as Q8_0, all else, and ``more`` tensors, as float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if says_vocabulary:
        writer.add_vocab_size(config.vocab_size)
    if vocabulary is None:
        vocabulary = Vocabulary([*(f"<{i}>" for i in range(config.vocab_size - 3)), "a", "b", "ab"], ["a b"])
    writer.add_tokenizer_model("llama" if vocabulary.scores else "gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.types:
        writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if add_space is not None:
        writer.add_add_space_prefix(add_space)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            tensor = _interleave(tensor, config.num_attention_heads)
        elif "k_proj" in name:
            tensor = _interleave(tensor, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if "proj" in name else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    for name, tensor in more.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from the two halves that transformers rotates to the adjacent pairs that llama.cpp rotates."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, block, inner = name.split(".", 3)
    return f"blk.{block}.{_NAMES[inner.removesuffix('.weight')]}.weight"

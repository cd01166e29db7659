"""Which models let a rotation of their residual stream through exactly, and what in them it touches.

That is a matter of what a model computes, which neither names nor shapes tell: Gemma's norm has the name and the shape
of Llama's and scales by 1 + w. So the model types are declared, each one read and held to its logits by a test, and the
parameters of a model at hand are compared with what the declaration knows: one more, from a setting or a newer
transformers, and the model is refused.

What keeps the others out: norms behind attention and MLP, whose weights stand between a layer and the stream (Gemma 2
and 3, OLMo 2), norms that take the mean off (GPT-NeoX, StarCoder 2, Cohere), compressed values (DeepSeek), and experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ulbq.errors import InputError
from ulbq.models.blocks import ModelStructure


@dataclass(frozen=True)
class _Layout:
    """Names inside a block.

    Attributes:
        readers: by RMSNorm, the linear layers that read it.
        values: that of them whose last outputs are the values.
        beside: whatever else may be there; it works on queries and keys.
    """

    readers: Mapping[str, tuple[str, ...]]
    values: str
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    beside: frozenset[str] = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})


_SPLIT = _Layout(
    readers={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    values="self_attn.v_proj",
)
_FUSED = _Layout(
    readers={"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
    values="self_attn.qkv_proj",
)
_LAYOUTS: dict[str, _Layout] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "seed_oss"), _SPLIT),
    "phi3": _FUSED,
}

ROTATABLE: tuple[str, ...] = tuple(_LAYOUTS)
"""Model types that can be rotated."""


@dataclass(frozen=True)
class BlockParts:
    """What a rotation touches.

    Attributes:
        hidden: width of the residual stream.
        head_dim: of the values.
        heads: that read values.
        value_heads: that have values of their own; divides ``heads``.
        final_norm: full name of the weight of the norm before the head.
        readers: names inside a block: by RMSNorm, the linear layers that read it.
        values: that of them whose last outputs are the values.
        output: the linear layer that reads the values and writes the stream.
        down: the other one that writes the stream.
    """

    hidden: int
    head_dim: int
    heads: int
    value_heads: int
    final_norm: str
    readers: Mapping[str, tuple[str, ...]]
    values: str
    output: str
    down: str


def block_parts(model: PreTrainedModel, found: ModelStructure) -> BlockParts:
    """What a rotation of this model touches.

    Args:
        model: a skeleton whose head is not tied.
        found: its structure.

    Raises:
        InputError: its type is not known to let a rotation through, or it has a parameter that is not known.
    """
    config: Any = model.config
    layout = _LAYOUTS.get(config.model_type)
    if layout is None:
        raise _refused(config, "are not known to let a rotation through exactly")
    final_norm = f"{found.blocks_prefix.rpartition('.')[0]}.norm.weight"
    linears = {name for readers in layout.readers.values() for name in readers} | {layout.output, layout.down}
    needed = {f"{name}.weight" for name in linears | layout.readers.keys()}
    known = needed | {f"{name}.bias" for name in linears} | layout.beside
    outside = {f"{name}.weight" for name in (*found.embeddings, found.head)} | {final_norm}
    names = set(model.state_dict())
    for index in range(found.n_blocks):
        prefix = f"{found.blocks_prefix}.{index}."
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if strange := (inside - known) | (needed - inside):
            raise _refused(config, f"are not as they are known here ('{prefix}{min(strange)}')")
        outside |= {prefix + name for name in inside}
    if found.tied or len(found.embeddings) != 1 or names != outside:
        raise _refused(config, f"do not stand alone ('{min(names ^ outside, default='lm_head.weight')}')")
    attention = model.get_submodule(f"{found.blocks_prefix}.0.{layout.output}")
    heads, value_heads = config.num_attention_heads, config.num_key_value_heads
    return BlockParts(
        hidden=config.hidden_size,
        head_dim=int(attention.in_features) // heads,  # type: ignore[arg-type]
        heads=heads,
        value_heads=value_heads,
        final_norm=final_norm,
        readers=layout.readers,
        values=layout.values,
        output=layout.output,
        down=layout.down,
    )


def _refused(config: Any, why: str) -> InputError:
    return InputError(
        f"The blocks of the model type '{config.model_type}' {why}, so it cannot be rotated.",
        hint=f"Leave out `rotate`. Types that can be: {', '.join(ROTATABLE)}.",
    )

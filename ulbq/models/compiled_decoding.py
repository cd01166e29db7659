"""Models of Llama's kind that go on from one text through compiled code, on the CPU.

Transformers takes a hundred operations of torch for a block, each of which costs more than its work on one token.
"""

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ulbq import runtime
from ulbq.kernels import Product, attention, between, build, decode
from ulbq.kernels.tiles import FLOATS
from ulbq.nn.quant_embedding import TiedHead
from ulbq.nn.quant_linear import QuantLinear, is_dense_linear

_MODELS = frozenset(f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary positions that do not depend on a text's length."""


def unsupported_reason(model: PreTrainedModel, device: torch.device | None = None) -> str | None:
    """Why a model's texts do not go through compiled code, whatever its layers; None where they do.

    Args:
        model: with its weights, or without.
        device: where it shall run, if it is not there.
    """
    name, kind = type(model).__name__, (device or model.device).type
    if name not in _MODELS or not type(model).__module__.startswith("transformers."):
        return f"{name}: one of {', '.join(sorted(_MODELS))}"
    if kind != "cpu" or model.dtype not in FLOATS:
        return f"{model.dtype} on {kind}: float32, bfloat16 or float16 on the CPU"
    kinds = getattr(model.config, "layer_types", None) or []
    window = getattr(model.config, "sliding_window", None) if not kinds else None
    if window or any(kind != "full_attention" for kind in kinds):
        return "attention of a window: of all tokens"
    base: Any = model.base_model
    if 2 * len(base.rotary_emb.inv_freq) != base.layers[0].self_attn.head_dim:
        return "rotary positions of a part of a head: of all of it"
    rotation = getattr(model.base_model.rotary_emb, "rope_type", None)
    if model.config.hidden_act != "silu" or rotation not in ROTATIONS:
        return f"{model.config.hidden_act}, rotary positions '{rotation}': silu, one of {', '.join(sorted(ROTATIONS))}"
    return "its modules are watched" if watched(model) else build.unavailable_reason()


def watched(model: nn.Module) -> bool:
    """Whether calls of a module do more than its class says."""
    return any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


class Compiled:
    """What the texts of a model have in common: its products, and angles of positions.

    Args:
        model: one that :func:`unsupported_reason` has nothing against.
        blocks: in order.
        state: of its tensors, when these were made.
    """

    def __init__(self, model: Any, blocks: list[decode.CompiledBlock], state: Hashable) -> None:
        base, attention = model.base_model, model.base_model.layers[0].self_attn
        self.blocks, self.state, self.dtype, width = blocks, state, model.dtype, attention.head_dim
        found = _product(model.lm_head, model.dtype)
        # One that has no product makes its logits itself.
        self.head = None if found is None else (found, model.lm_head.out_features)
        self.sizes = decode.CompiledSizes(
            hidden=model.config.hidden_size,
            intermediate=model.config.intermediate_size,
            heads=attention.q_proj.out_features // width,
            shared=attention.k_proj.out_features // width,
            width=width,
            epsilon=base.norm.variance_epsilon,
            scaling=attention.scaling,
        )
        self.last_norm = base.norm.weight.detach().float()
        self._angles = (torch.empty(0, width), torch.empty(0, width))
        runtime.use_large_pages([*model.parameters(), *model.buffers()])

    def angles(self, model: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[≥ count, width]`` float32 of the first positions."""
        found = self._angles
        if len(found[0]) < count:
            none, places = torch.empty(0, dtype=self.dtype), torch.arange(count).unsqueeze(0)
            both = model.base_model.rotary_emb(none, places)
            # Both at once: another thread may write a text of its own.
            self._angles = found = (both[0][0].float().contiguous(), both[1][0].float().contiguous())
        return found


class Decoder:
    """A model and a text that grows by any number of tokens at first, and by one after the other behind them.

    Args:
        model: in eval mode.
        compiled: what :func:`products` gives for it.
        room: tokens that the text may have.
    """

    def __init__(self, model: Any, compiled: Compiled, room: int) -> None:
        self._model, self._blocks, self._sizes = model, compiled.blocks, compiled.sizes
        self._head = None if compiled.head else model.lm_head
        shape = (len(compiled.blocks), 2, compiled.sizes.shared, room, compiled.sizes.width)
        self._caches = torch.empty(shape, dtype=compiled.dtype)
        self._cosines, self._sines = compiled.angles(model, room)
        self._compiled = decode.CompiledBlocks(
            compiled.blocks, compiled.sizes, compiled.last_norm, compiled.head, self._caches
        )
        self._length = 0

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read tokens ``[n]``; logits ``[vocabulary]`` float32 of what comes behind the last one."""
        if self._length == 0:
            x = self._read(tokens)
            logits = self._compiled.finish(x)
        else:
            x, here = self._model.base_model.embed_tokens(tokens)[0].float(), self._length
            logits = self._compiled(x, here, self._cosines[here], self._sines[here])
        self._length += len(tokens)
        if self._head is not None:
            logits = self._head(x.to(self._model.dtype)).float()
        return logits

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        """The beginning of the text, into the caches; what comes out of the last block for its last token, float32."""
        count, base = len(tokens), self._model.base_model
        if self._model.dtype != torch.bfloat16 or not build.has_pairs() or self._sizes.width % 16:
            return self._read_by_torch(tokens)
        x: torch.Tensor = base.embed_tokens(tokens).float()
        for index, (layer, block) in enumerate(zip(base.layers, self._blocks, strict=True)):
            normed = self._norm(x, block.before_attention)
            of_layer, caches = layer.self_attn, self._caches[index, :, :, :count]
            query = self._place(of_layer.q_proj(normed), block.query_norm)
            caches[0] = key = self._place(of_layer.k_proj(normed), block.key_norm)
            caches[1] = value = self._heads(of_layer.v_proj(normed))
            looked = attention.attend(query[None], key[None], value[None], self._sizes.scaling)
            x += of_layer.o_proj(looked[0].transpose(0, 1).flatten(1))
            normed = self._norm(x, block.before_mlp)
            x += layer.mlp.down_proj(between.gated(layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)))
        return x[-1]

    def _read_by_torch(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same by transformers, for other types."""
        cache, found = DynamicCache(), list[torch.Tensor]()
        hook = self._model.base_model.norm.register_forward_pre_hook(lambda _, given: found.append(given[0][0, -1]))
        with hook:
            self._model.base_model(tokens[None], past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        for room, layer in zip(self._caches, layers, strict=True):
            room[0, :, : len(tokens)], room[1, :, : len(tokens)] = layer.keys[0], layer.values[0]
        return found[0].float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows in bfloat16."""
        return between.rms_norm(x, weight, self._sizes.epsilon, half=True)[1]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[heads, n, width]`` of ``[n, heads · width]``."""
        heads: torch.Tensor = x.unflatten(1, (-1, self._sizes.width)).transpose(0, 1)
        return heads

    def _place(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """The same at their positions, in bfloat16."""
        if norm is not None:
            x = self._norm(x.unflatten(1, (-1, self._sizes.width)).float(), norm).flatten(1)
        count = len(x)
        angles = (self._cosines[None, :count], self._sines[None, :count])
        return between.rotate(self._heads(x)[None], *angles, torch.bfloat16)[0]


_KEPT = WeakKeyDictionary[nn.Module, Compiled]()


def products(model: Any) -> Compiled | None:
    """What a model's tokens are computed with; None where the model or a layer is of another kind.

    It is kept until the model goes, or a tensor of it is another or has other values.
    """
    kept = _KEPT.get(model)
    supported = unsupported_reason(model) is None
    if kept is not None and supported and kept.state == _state(model):
        return kept
    # First, so that two copies of packed weights are in memory at no time.
    kept = None
    _KEPT.pop(model, None)
    if supported:
        blocks = [_block(block, model.dtype) for block in model.base_model.layers]
        known = [block for block in blocks if block is not None]
        if len(known) < len(blocks):
            return None
        # A layer may only now have brought its tensors into the order of its kernels.
        kept = _KEPT[model] = Compiled(model, known, _state(model))
    return kept


def addresses(model: nn.Module) -> Hashable:
    """What changes with every module and tensor of a model, and with the factors of its attention."""
    modules = tuple((id(module), type(module), getattr(module, "scaling", None)) for module in model.modules())
    return modules, tuple((tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers()))


def _state(model: nn.Module) -> Hashable:
    """The same, and what changes with the values of vectors, which may be copied."""
    values = tuple(
        (None if tensor.is_inference() else tensor._version, _values(tensor))
        for tensor in (*model.parameters(), *model.buffers())
    )
    return addresses(model), values


def _values(tensor: torch.Tensor) -> bytes | None:
    if tensor.dim() != 1:
        return None
    found: bytes = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found


def _block(block: Any, dtype: torch.dtype) -> decode.CompiledBlock | None:
    attention, mlp = block.self_attn, block.mlp
    layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    made: list[Any] = [_product(layer, dtype) for layer in (*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    if None in made:
        return None
    norms = (block.input_layernorm, block.post_attention_layernorm)
    of_heads = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    weights: list[Any] = [None if norm is None else _floats(norm.weight) for norm in (*norms, *of_heads)]
    return decode.CompiledBlock(*made, *weights)


def _product(layer: nn.Module, dtype: torch.dtype) -> Product | None:
    """What tokens are multiplied with; None for an adapter, or a layout that has nothing for them."""
    if type(layer) is QuantLinear or type(layer) is TiedHead:
        # What is rounded costs about what bfloat16 does, and ten times what float16 does.
        return layer.product(exact=dtype != torch.bfloat16)
    if is_dense_linear(layer) and layer.weight.dtype in FLOATS:
        return decode.dense(layer.weight.detach(), _floats(layer.bias))
    return None


def _floats(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.detach().float().contiguous()

"""A whole model under training: quantized layers that train or stay packed, everything beside the blocks frozen."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ulbq.finetuning.head import Head
from ulbq.finetuning.teacher import HiddenTap
from ulbq.models.watch import watching
from ulbq.training.attention import chunked_attention
from ulbq.training.fused import FusedParts
from ulbq.training.linear import TrainedLinear
from ulbq.training.optimizer import parameters_by_role
from ulbq.training.precision import Precision
from ulbq.training.sharding import is_sharded


class Student:
    """Runs a model whose blocks hold :class:`TrainedLinear` layers, or packed ones with peft's adapters beside them.

    Args:
        model: all of it, on the device, in eval mode; float32, but for embeddings and head where these are wanted as
            they are stored.
        blocks: its decoder blocks, sharded or not.
        precision: device and dtype of the matrix products.
        checkpointing: keep only the blocks' inputs for the backward pass, and run each block a second time there.
            Without it everything that autograd keeps of every block, the quantized weights among it, lives at once.
        adapters: layers of peft's; a :class:`TrainedLinear` knows its own adapter.

    Attributes:
        model: as given.
        blocks: as given.
        sharded: whether the blocks are, and processes run them together.
        layers: the trained layers by full name.
        roles: parameters of the blocks by role.
        head: from what :meth:`run` gives to logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        precision: Precision,
        *,
        checkpointing: bool = True,
        adapters: Sequence[nn.Module] = (),
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.sharded = is_sharded(blocks[0])
        self._precision = precision
        named = model.named_modules()
        self.layers = {name: layer for name, layer in named if isinstance(layer, TrainedLinear)}
        own = [layer.adapter for layer in self.layers.values() if layer.adapter is not None]
        self._adapters = [*own, *adapters]
        model.requires_grad_(False)
        self.roles = parameters_by_role(blocks, self.layers.values())
        for layer in self.layers.values():
            layer.register_forward_hook(_forget_matrix)
        self._fused = FusedParts(blocks, precision)
        if checkpointing:
            # Not transformers' own switch: it works in training mode alone, which turns the model's dropout on.
            for block in blocks:
                # A bound method would be a cycle, and keep the whole model in memory until somebody collects it.
                block.forward = partial(_checkpointed, weakref.ref(block))
        self._tap = HiddenTap(blocks)
        self.head = Head(model, precision)

    def run(
        self, tokens: torch.Tensor, *, hidden: bool = False, adapted: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """What the head reads, ``[batch, length, hidden]``, and the outputs of all blocks where wanted.

        Args:
            tokens: int64 ``[batch, length]``.
            hidden: whether the blocks' outputs are wanted.
            adapted: whether the adapters take part.
        """
        for layer in self.layers.values():
            layer.adapted = adapted
        for adapter in self._adapters:
            adapter.train(torch.is_grad_enabled())  # dropout is for training alone
        with self._precision.autocast():
            return self._tap.run(self.model, tokens.to(self._precision.device), hidden=hidden)

    @contextmanager
    def fast(self) -> Iterator[None]:
        """While it lasts, attention, norms and gates run and go back by the kernels of the blocks' training."""
        with chunked_attention(self._precision), self._fused.active():
            yield

    @torch.no_grad()
    def input_sizes(self, tokens: torch.Tensor) -> dict[str, float]:
        """Root mean square of each layer's inputs, by full name, from one run; 0 for a layer that was not called."""
        sizes = dict.fromkeys(self.layers, 0.0)

        def note(name: str, x: torch.Tensor) -> None:
            sizes[name] = (x.float().square().sum() / max(1, x.numel())).sqrt().item()

        with watching(self.layers, note):
            self.run(tokens)
        return sizes


def _checkpointed(reference: "weakref.ref[nn.Module]", *args: Any, **kwargs: Any) -> Any:
    block = reference()
    if block is None:
        raise ReferenceError("the block is gone")
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Stopped early, each block's second run ends in an exception, whose traceback keeps the last layer's tensors.
    return checkpoint(forward, *args, use_reentrant=False, early_stop=False, **kwargs)


def _forget_matrix(layer: nn.Module, arguments: Any, output: Any) -> None:
    """Penalties on the weights are none of this training's: kept, the matrices would be a second model."""
    if isinstance(layer, TrainedLinear):
        layer.matrix = None

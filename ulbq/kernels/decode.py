"""One token through all blocks of a model of Llama's kind on the CPU, compiled (``cpu/decode.cpp``).

Products are made as :mod:`ulbq.kernels.tiles` and its like make those of one row. What stands between them is float32.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ulbq.kernels.build import library
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS

Tensor = torch.Tensor


def dense(weight: Tensor, bias: Tensor | None) -> Product:
    """A matrix ``[out, in]`` in one of the types of activations, with a float32 bias ``[out]``."""
    return Product("ulbq_dense_linear", weight.contiguous(), FLOATS[weight.dtype], *weight.shape, bias)


class CompiledBlock(NamedTuple):
    """What a block computes with: its products, and float32 weights of its norms.

    Attributes:
        queries, keys, values, output, gate, up, down: products.
        before_attention, before_mlp: ``[hidden]``.
        query_norm, key_norm: ``[width]`` of each head; None where there are none.
    """

    queries: Product
    keys: Product
    values: Product
    output: Product
    gate: Product
    up: Product
    down: Product
    before_attention: Tensor
    before_mlp: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "heads", "shared", "width", "intermediate")),
        *((name, ctypes.c_int64) for name in ("position", "room")),
        ("epsilon", ctypes.c_double),
        ("scaling", ctypes.c_double),
        ("type", ctypes.c_int64),
    )


class CompiledSizes(NamedTuple):
    """Dimensions of a model's blocks, and factors.

    Attributes:
        hidden, intermediate: widths of a token, and between the halves of an MLP.
        heads, shared: of queries; of keys and values.
        width: of a head.
        epsilon: of the norms.
        scaling: of the scores of attention.
    """

    hidden: int
    intermediate: int
    heads: int
    shared: int
    width: int
    epsilon: float
    scaling: float


class CompiledBlocks:
    """All blocks of a model, its last norm and its head, and the caches of one text.

    Args:
        blocks: in order.
        sizes: of all.
        last_norm: float32 ``[hidden]``.
        head: and how many logits it makes; None where somebody else makes them.
        caches: ``[blocks, 2, shared, room, width]`` keys and values of the tokens so far.
    """

    def __init__(
        self,
        blocks: Sequence[CompiledBlock],
        sizes: CompiledSizes,
        last_norm: Tensor,
        head: tuple[Product, int] | None,
        caches: Tensor,
    ) -> None:
        self._kept, self._last_norm, self._head = (blocks, caches), last_norm, head
        self._table = torch.tensor(
            [[_address(part) for part in (*block, *both)] for block, both in zip(blocks, caches, strict=True)]
        )
        room, kind = caches.shape[3], FLOATS[caches.dtype]
        self._step = _Step(layers=len(blocks), room=room, type=kind, **sizes._asdict())

    def __call__(self, x: Tensor, position: int, cosine: Tensor, sine: Tensor) -> Tensor:
        """A token goes through all blocks, and joins the caches.

        Args:
            x: ``[hidden]`` float32, its embedding; what the last norm makes of it comes in its place.
            position: how many tokens the caches hold; there is room for one more.
            cosine, sine: ``[width]`` float32 of the rotation of its position.

        Returns:
            Logits ``[vocabulary]`` float32; empty without a head.
        """
        self._step.position = position
        return self._run(self._step, x, cosine, sine)

    def finish(self, x: Tensor) -> Tensor:
        """The same of what came out of the last block already."""
        step = _Step.from_buffer_copy(self._step)
        step.layers = 0
        return self._run(step, x, None, None)

    def _run(self, step: _Step, x: Tensor, *angles: Tensor | None) -> Tensor:
        head, count = self._head or (None, 0)
        logits = torch.empty(count, dtype=torch.float32)
        library().ulbq_decode(
            self._table.data_ptr(), ctypes.byref(step), self._last_norm.data_ptr(), _address(head),
            *map(_address, angles), x.data_ptr(), logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return logits


def _address(part: Product | Tensor | None) -> int:
    if part is None:
        return 0
    return part.data_ptr() if isinstance(part, Tensor) else part.address or 0

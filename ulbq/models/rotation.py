"""Rotations of a model's weights that leave its function as it is.

A row x of activations that arrives as x R, R orthogonal, means the same to a linear layer W that became W R; and a
layer whose output is to arrive so becomes Rᵀ W. Randomized Hadamard matrices as R spread what stands in few channels
over all of them, so that few weights of a group stand out (QuIP#, 2402.04396; QuaRot, 2404.00456; R1 and R2 of
SpinQuant, 2405.16406). The rotations that need nothing at inference are made here:

- of the residual stream, the same in every block: embeddings, head, and every layer that reads or writes the stream.
  An RMSNorm commutes with it once its weight has moved into the layers that read it: norms become ones;
- of the values of each attention head: rows of the value projection, and the columns of the output projection that
  read them. Heads that share a key and value head share its rotation.

The inputs of ``down_proj`` stay as they are: between them and the layer before stands a gate, which no rotation passes.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch

from ulbq.artifacts.records import RotationRecord
from ulbq.errors import InputError
from ulbq.models.blocks import ModelStructure, structure
from ulbq.models.checkpoint import TensorReader
from ulbq.models.hadamard import hadamard_factors
from ulbq.models.rotatable import BlockParts, block_parts
from ulbq.models.skeleton import empty_model
from ulbq.models.source import ModelSource

# Values that are rotated at once, in float64: enough for full speed, little beside an embedding.
_CHUNK = 2**20


class Rotation:
    """An orthogonal map of rows: random signs, then one matrix on every ``width`` neighbours.

    Args:
        signs: ±1, float64 ``[size]``.
        factors: square float64 matrices whose Kronecker product, divided by the root of its order, is that matrix.

    Attributes:
        size: values of a row.
        width: order of the matrix; divides ``size``.
    """

    def __init__(self, signs: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> None:
        self.size = len(signs)
        self.width = prod(map(len, factors))
        self._signs = signs
        self._factors = factors

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rotated float64 rows ``[..., size]``."""
        values = (rows * self._signs).reshape(-1, self.width)
        for factor in reversed(self._factors):
            # The last of the product's axes is worked on and becomes the first; in the end each is in its place.
            values = (values.unflatten(1, (-1, len(factor))) @ factor).transpose(1, 2).flatten(1)
        return values.reshape(rows.shape) / sqrt(self.width)


class RotatedTensors:
    """Reads the tensors of a model, rotated; one at a time, like those that it reads from.

    Weights of the blocks' linear layers come in float32 (float64 stays), not rounded once more before they are
    quantized. Everything else comes in the dtype that it is stored in: rotated embeddings, head and biases are rounded
    to it.

    Args:
        stored: the tensors as they are.
        changes: what is to be done, by parameter name.

    Attributes:
        names: every name that can be read; the head of a model that was tied is one of them.
    """

    def __init__(self, stored: TensorReader, changes: Mapping[str, "Change"]) -> None:
        self._stored = stored
        self._changes = changes
        made = {name for name, change in changes.items() if change.stored in stored.names}
        self.names = frozenset(stored.names - changes.keys() | made)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises KeyError for a name that is not there."""
        change = self._changes.get(name)
        if change is None:
            return self._stored.read(name)
        tensor = self._stored.read(change.stored)
        scale = None if change.norm is None else self._stored.read(change.norm).double()
        # What is damaged is handed on as it is: whoever reads it checks it and says so.
        damaged = tensor.shape != change.shape or (scale is not None and scale.shape != tensor.shape[-1:])
        if damaged or not tensor.is_floating_point():
            return tensor
        if change.is_norm:
            return torch.ones_like(tensor)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return change.apply(tensor, scale, wide if change.quantized else tensor.dtype)


@dataclass(frozen=True)
class Change:
    """What happens to one parameter.

    Attributes:
        stored: name that it is read under.
        shape: that it has to have.
        norm: name of the weight that its columns take over.
        columns: rotates what it reads.
        rows: rotates what it writes: of a fused layer, its last ``rows.size`` outputs.
        is_norm: it is a norm's weight, which other layers take over.
        quantized: it is the weight of a block's linear layer.
    """

    stored: str
    shape: torch.Size
    norm: str | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    is_norm: bool = False
    quantized: bool = False

    def apply(self, tensor: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The rotated weight ``[out, in]`` or bias ``[out]`` in ``dtype``; ``scale`` ``[in]`` is the norm's weight."""
        columns, rows = self.columns, self.rows
        if columns is not None:
            folded = (lambda part: columns(part)) if scale is None else (lambda part: columns(part * scale))
            tensor = _by_rows(tensor, folded, dtype if rows is None else torch.float64)
        if rows is None:
            return tensor
        turned = _by_rows(tensor[-rows.size :].movedim(0, -1), rows, dtype).movedim(-1, 0)
        return torch.cat([tensor[: -rows.size].to(dtype), turned])


def rotated(source: ModelSource, seed: int) -> ModelSource:
    """The same model with its residual stream and the values of its heads rotated; no tensor is read yet.

    Its head is stored by itself, since the last norm's weight goes into it and not into the embedding. Its
    ``content_hash`` is the original's, which is what an artifact names as the model that it was made from.

    Args:
        source: in full precision.
        seed: of the signs, and of a matrix where no Hadamard matrix of the width is known.

    Raises:
        InputError: a model whose blocks are not known to let a rotation through exactly.
    """
    if source.packed:
        raise ValueError("codes cannot be rotated")
    if source.carried:
        raise InputError(
            f"'{source.given}' holds what is no part of its text model ('{source.carried[0]}'), and cannot be rotated.",
            hint="Leave out `rotate`.",
        )
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    plan = _Plan(source, config, seed)
    return dataclasses.replace(
        source,
        config=config,
        tensors=RotatedTensors(source.tensors, dict(plan.changes())),
        stored=None,
        rotation=plan.record,
    )


class _Plan:
    """Who reads, writes and norms the residual stream of a model, and the rotations that it gets."""

    def __init__(self, source: ModelSource, config: Any, seed: int) -> None:
        before, model = empty_model(source.config), empty_model(config)
        self._found: ModelStructure = structure(model)
        self._parts: BlockParts = block_parts(model, self._found)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._names = source.names
        self._tied = structure(before).tied
        parts = self._parts
        generator = torch.Generator().manual_seed(seed)
        self._residual = Rotation(_signs(parts.hidden, generator), _factors(parts.hidden, generator))
        matrix = _factors(parts.head_dim, generator)
        self._values, self._outputs = [], []
        for _ in range(self._found.n_blocks):
            signs = _signs(parts.value_heads * parts.head_dim, generator).view(parts.value_heads, -1)
            shared = signs.repeat_interleave(parts.heads // parts.value_heads, 0)
            self._values.append(Rotation(signs.flatten(), matrix))
            self._outputs.append(Rotation(shared.flatten(), matrix))
        self.record = RotationRecord(
            seed=seed, residual=_describe(parts.hidden), values=f"{_describe(parts.head_dim)} a head"
        )

    def changes(self) -> Iterator[tuple[str, Change]]:
        """Every parameter that changes."""
        parts, residual = self._parts, self._residual
        embedding, head = f"{self._found.embeddings[0]}.weight", f"{self._found.head}.weight"
        # Checkpoints store a tied pair under either name.
        shared = embedding if embedding in self._names else head
        yield self._change(embedding, stored=shared if self._tied else None, columns=residual)
        yield self._change(head, stored=shared if self._tied else None, norm=parts.final_norm, columns=residual)
        yield self._change(parts.final_norm, is_norm=True)
        for index in range(self._found.n_blocks):
            prefix = f"{self._found.blocks_prefix}.{index}."
            for norm, readers in parts.readers.items():
                weight = f"{prefix}{norm}.weight"
                yield self._change(weight, is_norm=True)
                for reader in readers:
                    rows = self._values[index] if reader == parts.values else None
                    yield from self._linear(prefix + reader, norm=weight, columns=residual, rows=rows)
            yield from self._linear(prefix + parts.output, columns=self._outputs[index], rows=residual)
            yield from self._linear(prefix + parts.down, rows=residual)

    def _linear(self, name: str, *, rows: Rotation | None = None, **reading: Any) -> Iterator[tuple[str, Change]]:
        yield self._change(f"{name}.weight", rows=rows, quantized=True, **reading)
        if rows is not None and f"{name}.bias" in self._shapes:
            yield self._change(f"{name}.bias", rows=rows)

    def _change(self, name: str, stored: str | None = None, **what: Any) -> tuple[str, Change]:
        return name, Change(stored or name, self._shapes[name], **what)


def _by_rows(matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A matrix (or a vector) whose rows were changed in float64, a few at a time."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    result = torch.empty(rows.shape, dtype=dtype)
    for start in range(0, len(rows), step := max(1, _CHUNK // rows.shape[1])):
        part = slice(start, start + step)
        result[part] = change(rows[part].double())
    return result.view(matrix.shape)


def _signs(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, (size,), generator=generator).double() * 2 - 1


def _factors(order: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Of a Hadamard matrix; of a random orthogonal one times the root of its order where none is known."""
    found = hadamard_factors(order)
    if found is not None:
        return found
    normal = torch.randn(order, order, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    # Signs that do not depend on the library, and a uniform draw from all orthogonal matrices.
    return (q * r.diagonal().sign() * sqrt(order),)


def _describe(order: int) -> str:
    factors = hadamard_factors(order)
    if factors is None:
        return f"random orthogonal {order}"
    product = "·".join(str(len(factor)) for factor in factors)
    return f"Hadamard {order}" + (f" = {product}" if len(factors) > 1 else "")

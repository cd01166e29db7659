"""What the parts of a model hold in memory while they are worked on: what all predictions add up.

Bytes and values are counted from the code, not fitted to runs; ``benchmarks/predictions.py`` compares them with runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ulbq import distributed
from ulbq.data.generate import writing_memory
from ulbq.methods.base import Needs
from ulbq.models.blocks import Linear, block_list
from ulbq.models.tables import has_plain_tables
from ulbq.solvers.hessian import FEWEST_TOKENS, factor_memory, sum_memory

FLOAT, HALF = 4, 2
# Columns² of a Hessian as a drift of inputs is made good (`solvers/drift.py`): both sums in float64, the factor, and
# what is solved.
_DRIFT_BYTES = 4 * 8 + FLOAT
OPENED_COPIES = 2
"""Of an artifact's weights that live together while it is opened at the end of a run."""
# A weight of a packed layer while it is made dense to be looked at: codes, float32, and the dtype that is asked for.
DENSE_BYTES = 9
# Of each weight that is solved: its code, and its share of a scale.
_FOUND_BYTES = 1.5
# Weights of a table of tokens, or of a head, that are rounded at a time.
TABLE_PART = 1 << 22
# Values of a layer that are compared at a time with what is stored: both in float64, and their difference.
_COMPARED, _COMPARED_BYTES = 1 << 20, 3 * 8
# What oneDNN keeps of the products that it compiles for a text that grows (`runtime.calm_threads`).
_PRODUCTS = 64 << 20
# Of a layer beside its matrix while a gradient goes through it: codes, levels, the gradient as it came and as float32.
_UNPACKED_BYTES = 11


@dataclass(frozen=True)
class Sizes:
    """Values in the parts of a model.

    Attributes:
        hidden, vocabulary: as its configuration has them.
        weights: all of it, tied ones once.
        inside: of each block.
        embedded: outside the blocks without an untied head: what lies before the first block, and the last norm.
        ending: outside the blocks without an untied embedding: what lies behind the last block.
        head: of the matrix that gives the logits.
        table: of the largest matrix outside the blocks.
        halved: of the embedding, where a walk looks it up in half precision.
        by_rows: whether a model that is read block by block leaves the embedding on disk.
    """

    hidden: int
    vocabulary: int
    weights: int
    inside: tuple[int, ...]
    embedded: int
    ending: int
    head: int
    table: int
    halved: int = 0
    by_rows: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, *, halves: bool = False, rotated: bool = False) -> "Sizes":
        """Of a skeleton, whether its matrices are stored in half precision, and whether they are rotated then."""
        config = model.config.get_text_config()
        weights = sum(p.numel() for p in model.parameters())
        inside = tuple(sum(p.numel() for p in block.parameters()) for block in block_list(model)[1])
        outer = weights - sum(inside)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables = [0 if one is None else sum(p.numel() for p in one.parameters()) for one in (embedding, head)]
        tied = head is None or head.weight is embedding.weight
        own = [0, 0] if tied else tables
        half = halves and has_plain_tables(model)
        return cls(
            hidden=int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            weights=weights,
            inside=inside,
            embedded=outer - own[1],
            ending=outer - own[0],
            head=tables[1],
            table=max(tables),
            halved=tables[0] if half else 0,
            by_rows=half and not rotated,
        )

    @property
    def outer(self) -> int:
        """Values outside the blocks."""
        return self.weights - sum(self.inside)

    def walk_begins(self, kept: int) -> int:
        """Bytes as a walk over the blocks begins: what embeds as it is read, or beside the first block and a store."""
        embedding = FLOAT * self.embedded - (FLOAT - HALF) * self.halved
        return embedding + max(0 if self.halved else FLOAT * self.table, FLOAT * self.inside[0] + kept)

    def head_at_work(self, itemsize: int) -> int:
        """Bytes of a head's matrix in another order, as oneDNN multiplies many rows in half precision by it."""
        return 0 if itemsize == FLOAT else itemsize * self.head

    def writing(
        self, config: PreTrainedConfig, dtype: torch.dtype, samples: int, length: int, streamed_room: int | None = None
    ) -> int:
        """Bytes of the model that writes so many samples of so many tokens, and of what it writes.

        Loaded whole, or with one block at a time, and then with so much room for what it writes.
        """
        room, held = streamed_room or 0, self.held_at_once(dtype.itemsize, streamed=streamed_room is not None)
        beside = self.head_at_work(dtype.itemsize) + writing_memory(config, dtype, samples, length, room) + _PRODUCTS
        return held + max(beside, dtype.itemsize * self.table if streamed_room is None else 0)

    def held_at_once(self, itemsize: int, *, streamed: bool) -> int:
        """Bytes of the weights that are in memory while the model is called: all, or one block of them.

        With one block, rows of an embedding in half precision come from the disk, unless it is the head or rotated.
        """
        outer = self.ending if self.by_rows else self.outer
        return itemsize * (outer + max(self.inside) if streamed else self.weights)

    def passed(self, itemsize: int, kept: int, tokens: int, widest: int, logits: int) -> int:
        """Bytes of passing all blocks one after the other, and of the head behind them.

        Args:
            itemsize: of the weights.
            kept: bytes of activations in memory.
            tokens: that run at once.
            widest: outputs of the widest layer.
            logits: bytes of those that are made at once.
        """
        embedded, table = (self.embedded - self.halved, 0) if self.by_rows else (self.embedded, self.table)
        embedding = itemsize * (embedded + max(table, self.inside[0]))
        block = itemsize * (max(self.inside) + tokens * passed_activations(self.hidden, widest) // FLOAT)
        return kept + max(embedding, block, itemsize * self.ending + self.head_at_work(itemsize) + logits)


def load_memory(stored: int, table: int) -> int:
    """Bytes of a whole model as it is loaded: the largest matrix is mapped from its file beside its copy.

    Args:
        stored: bytes of the model.
        table: bytes of its largest matrix.
    """
    return stored + table


def part_of_blocks(held: int, blocks: int) -> int:
    """Bytes in one of several processes of what so many sharded blocks hold: its part, and two blocks that are whole.

    The second is the next one, gathered while the first is at work.
    """
    return held // distributed.size() + 2 * held // blocks


def wide(linears: Sequence[Linear]) -> int:
    """Outputs of the widest of some layers."""
    return max((linear.out_features for linear in linears), default=0)


def trained_activations(hidden: int, widest: int, itemsize: int) -> int:
    """Bytes a token that autograd keeps of one block.

    Float32 are the residuals, what the norms get and give, and their gradients; in the dtype of the products queries,
    keys, values, attention's output and their likes, and of the widest layer gate, product and their gradients.
    """
    return hidden * (24 + 10 * itemsize) + 6 * widest * itemsize


def passed_activations(hidden: int, widest: int) -> int:
    """Bytes a token of one block without gradients: residuals, and three of the widest layer's outputs."""
    return 3 * FLOAT * (hidden + widest)


def trained_layer(largest: int) -> int:
    """Bytes of the largest layer, of so many weights, as a gradient goes through it."""
    return _UNPACKED_BYTES * largest


def compared_layer(linears: Sequence[Linear]) -> int:
    """Bytes of the largest of some layers as it is compared with what is stored of it."""
    size = layer_size(linears)
    return DENSE_BYTES * size + _COMPARED_BYTES * min(size, _COMPARED)


def layer_size(linears: Sequence[Linear]) -> int:
    """Weights of the largest of some layers."""
    return max((linear.out_features * linear.in_features for linear in linears), default=0)


def input_groups(linears: Sequence[Linear]) -> dict[tuple[str, int], list[Linear]]:
    """Layers that read the same input, as far as names and shapes tell, in their order."""
    groups: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        groups.setdefault((linear.name.rpartition(".")[0], linear.in_features), []).append(linear)
    return groups


def solving_memory(linears: Sequence[Linear], needs: Needs, tokens: int, *, aside: int = FLOAT) -> int:
    """Bytes that the closed forms of a block's layers take, the block itself not counted.

    Args:
        linears: of the block.
        needs: of the method.
        tokens: that second moments are made of.
        aside: of each weight that was solved, bytes of what it was.
    """
    if needs.hessians == "none":
        return round(needs.layer_bytes * layer_size(linears))
    groups = input_groups(linears)
    stages: dict[str, list[tuple[str, int]]] = {}
    for key in groups:
        # Experts come all at once.
        place = ".".join("*" if part.isdigit() else part for part in key[0].split(".")[-2:])
        stages.setdefault(f"{place} {key[1]}" if needs.hessians == "sequence" else "", []).append(key)
    # Where inputs shall do what those of the full-precision model do, its block runs beside the one that is solved.
    drifts = needs.drifts
    solved = most = 0
    for keys in stages.values():
        sums = [_moments(key, len(groups[key]), needs, tokens) for key in keys]
        live = sum(sums)
        for key, own in zip(keys, sums, strict=True):
            layers, columns = groups[key], key[1]
            whole = sum(linear.out_features * linear.in_features for linear in layers)
            solving, correcting = _solving(layers, columns, needs, tokens), 0
            if drifts and tokens >= FEWEST_TOKENS * columns:
                solving, correcting = solving + aside * whole, _DRIFT_BYTES * columns**2
            most = max(most, solved + live + max(solving, correcting))
            # What it was is still wanted to compare with; its second moments are not.
            solved, live = solved + aside * whole, live - own
    return most + drifts * FLOAT * sum(linear.out_features * linear.in_features for linear in linears)


def _moments(key: tuple[str, int], layers: int, needs: Needs, tokens: int) -> int:
    """Bytes of the sums of one input that some layers read; of members of a list nobody knows who sees few tokens."""
    few = needs.rounds_few and tokens < FEWEST_TOKENS * key[1] and not key[0].rpartition(".")[2].isdigit()
    # How far it has drifted, and of each layer that reads it its own.
    count = 1 + needs.heldout_moments + needs.output_groups * layers
    return count * sum_memory(key[1], diagonal=few) + needs.drifts * (not few) * sum_memory(key[1])


def _solving(layers: Sequence[Linear], columns: int, needs: Needs, tokens: int) -> int:
    """Bytes of solving some layers that read one input, its second moments not counted."""
    size = layer_size(layers)
    if needs.stacked:
        size = sum(linear.out_features * linear.in_features for linear in layers)
    at_once = min(size, needs.at_once or size)
    # A part that goes over the end of a layer is a copy.
    copied = FLOAT * at_once if at_once < size and len(layers) > 1 else 0
    solving = copied + round(needs.layer_bytes * at_once + _FOUND_BYTES * (size - at_once))
    solving = max(solving, round((FLOAT + _FOUND_BYTES) * size))
    if needs.between_outputs:
        solving += FLOAT * wide(layers) ** 2
        solving = max(solving, factor_memory(wide(layers)))
    if not needs.rounds_few:
        return max(solving + FLOAT * columns**2, factor_memory(columns))
    return max(solving, factor_memory(columns, overwrite=True) if tokens >= FEWEST_TOKENS * columns else 0)

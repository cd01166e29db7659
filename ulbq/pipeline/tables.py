"""The table of tokens and the head in few bits: rounded once, in the scratch folder while the run lasts."""

import dataclasses
from collections.abc import Mapping

import torch

from ulbq import distributed, formats
from ulbq.artifacts.records import LayerRecord
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.artifacts.store import ArtifactWriter
from ulbq.formats import AffineScheme, affine
from ulbq.formats.bits import stored_bits
from ulbq.formats.rounding import relative_error
from ulbq.methods.base import Packed
from ulbq.models.blocks import Linear, check_values
from ulbq.models.checkpoint import TensorReader
from ulbq.models.names import read_state, state_names
from ulbq.models.source import ModelSource
from ulbq.pipeline.memory import TABLE_PART
from ulbq.pipeline.quantization_plan import Job
from ulbq.progress import Progress
from ulbq.solvers.rtn import round_to_nearest

TABLES = "tables"
"""Journal key of the records of packed tables."""


def with_tables(job: Job, writer: ArtifactWriter, progress: Progress) -> Job:
    """The run with its tables rounded to nearest, ranges searched, or as the artifact has them that it goes on from.

    Raises:
        NumericsError: a table has values that are not finite, or too large.
    """
    shard = writer.scratch / "tables.safetensors"
    if TABLES not in writer.journal:
        made = {table: _packed(job, table, scheme, progress) for table, scheme in job.tables.items()}
        tensors = {f"{table.name}.{short}": t for table, (packed, _) in made.items() for short, t in packed.items()}
        distributed.check_agreement(list(tensors.values()), "tables")
        write_shard(shard, tensors)
        writer.record(TABLES, {"tables": [record for _, record in made.values()]}, files=[shard])
    return dataclasses.replace(job, embedded=_embedded(job, LazyTensors([shard])))


def table_records(journal: Mapping[str, dict[str, list[object]]]) -> tuple[LayerRecord, ...]:
    """What the manifest says of the tables."""
    return tuple(LayerRecord.model_validate(record) for record in journal.get(TABLES, {}).get("tables", ()))


def read_tables(job: Job) -> dict[str, torch.Tensor]:
    """The stored tensors of the tables, by full name."""
    found = job.embedded.tensors if job.embedded is not None else None
    if not isinstance(found, Embedded):
        return {}
    return {name: found.stored.read(name) for name in sorted(found.stored.names)}


class Embedded:
    """A model's tensors, with its tables as they are stored in few bits.

    Args:
        tensors: of the model.
        stored: of the tables.
        tables: how they are stored, by the names of their weights.
    """

    def __init__(
        self, tensors: TensorReader, stored: LazyTensors, tables: Mapping[str, tuple[Linear, AffineScheme]]
    ) -> None:
        self._tensors, self.stored, self._tables = tensors, stored, tables

    @property
    def names(self) -> frozenset[str]:
        """Every name that can be read."""
        return self._tensors.names | self._tables.keys()

    def read(self, name: str) -> torch.Tensor:
        """One tensor; of a table, float32."""
        if name not in self._tables:
            return self._tensors.read(name)
        table, scheme = self._tables[name]
        shorts = scheme.tensors(table.out_features, table.in_features)
        packed = {short: self.stored.read(f"{table.name}.{short}") for short in shorts}
        return formats.dequantize(scheme, packed, table.in_features)


def _embedded(job: Job, stored: LazyTensors) -> ModelSource:
    tables = {f"{table.name}.weight": (table, scheme) for table, scheme in job.tables.items()}
    return dataclasses.replace(job.source, tensors=Embedded(job.source.tensors, stored, tables))


def _packed(job: Job, table: Linear, scheme: AffineScheme, progress: Progress) -> tuple[Packed, LayerRecord]:
    """A table's tensors, and what is said of them: those of the artifact that the run goes on from, if it has any."""
    start = None if job.start is None else job.start.source
    if start is not None and (record := start.tables.get(table.name)) is not None:
        return start.read_packed(table.name), record
    name, shape = f"{table.name}.weight", (table.out_features, table.in_features)
    weight = read_state(job.source, name, state_names(job.model)[name])
    check_values(job.source, name, weight)
    parts, lost, norm = list[Packed](), 0.0, 0.0
    with progress.phase(f"Rounding {table.name}", table.out_features) as phase:
        for rows in weight.split(max(1, TABLE_PART // table.in_features)):
            exact = rows.float()
            found = round_to_nearest(exact, scheme)
            parts.append(affine.pack(scheme, found.codes, found.scales))
            squares = exact.double().square().sum().item()
            stored = formats.dequantize(scheme, parts[-1], table.in_features)
            lost, norm = lost + squares * relative_error(exact, stored), norm + squares
            phase.advance(len(rows))
    codes, scales = (torch.cat([part[short] for part in parts], -2) for short in ("codes", "scales"))
    bits = {str(role): count for role, count in stored_bits(scheme.tensors(*shape)).items()}
    described = scheme.model_dump(mode="json")
    record = LayerRecord(name=table.name, shape=shape, scheme=described, bits=bits, error=lost / norm if norm else 0.0)
    return {"codes": codes, "scales": scales}, record

"""What commands say of what they made."""

from pathlib import Path

import pytest

from tests.artifacts.sample import quantized
from ulbq.artifacts import BitsReport, BlockRecord, LayerRecord
from ulbq.artifacts.manifest import Manifest
from ulbq.artifacts.records import Coverage, FileEntry
from ulbq.commands.results import show_converted, show_quantized
from ulbq.runtime import PhaseRecord


def said(capsys: pytest.CaptureFixture[str], manifest: Manifest, path: str = "q") -> dict[str, str]:
    (show_converted(manifest) if manifest.name == "c" else show_quantized(Path(path), manifest))  # type: ignore[arg-type]
    rows = capsys.readouterr().err.splitlines()
    return {name: text.strip() for name, _, text in (row.partition(" ") for row in rows)}


def test_sizes_before_and_after(capsys):
    whole = Coverage(quantized=4096, in_blocks=4096, embeddings=0, total=5000, bits=3.88)
    rows = said(capsys, quantized(coverage=whole))
    assert rows["size"] == "2.4 kB of weights, 10.0 kB in 16 bits; 2.281 bits per weight, 3.88 a parameter over all"


def test_an_adapters_bits_are_told(capsys):
    bits = BitsReport(parts={"codes": 8192, "adapter": 4096}, weights=4096)
    assert "3.000 bits per weight (2.000 without its adapter)" in said(capsys, quantized(bits=bits))["size"]


def test_errors_of_blocks_are_one_line(capsys):
    blocks = [
        BlockRecord(index=i, start_error=1, end_error=e, steps=1, seconds=1) for i, e in enumerate((0.1, 0.8, 0.4))
    ]
    assert said(capsys, quantized(blocks=tuple(blocks)))["errors"] == "output, block by block ▂█▅ 0.1 to 0.8 (block 1)"


def test_where_nothing_trained_the_weights_errors_are_told(capsys):
    layer = quantized().layers[0]
    layers = [
        LayerRecord.model_validate({**layer.model_dump(), "name": f"model.layers.{block}.{name}", "error": error})
        for block, name, error in ((0, "a", 0.1), (0, "b", 0.3), (1, "a", 0.1))
    ]
    rows = said(capsys, quantized(blocks=(), layers=tuple(layers)))
    assert rows["errors"] == "weights, block by block █▅ 0.1 to 0.2 (block 0)"


def test_time_memory_and_the_next_command(capsys):
    phases = [PhaseRecord(name="a", seconds=60, peak_memory=10**9), PhaseRecord(name="b", seconds=5, peak_memory=10**8)]
    rows = said(capsys, quantized(phases=tuple(phases)), "my models/q")
    assert rows["took"] == "1:05, 1.0 GB of memory"
    assert rows["next"] == "ulbq eval 'my models/q'"


def test_a_conversion_tells_its_weights(capsys):
    entry = FileEntry(size=10**6, sha256="")
    files = {"model.safetensors": entry, "adapter/a.safetensors": entry, "config.json": entry}
    assert said(capsys, quantized(name="c", files=files))["size"] == "2.0 MB of weights as an artifact"

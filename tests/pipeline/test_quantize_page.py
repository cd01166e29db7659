"""The page of a quantized artifact: its own numbers, in words that a person types."""

from pathlib import Path

from tests.artifacts.sample import quantized
from tests.evaluation.test_report import Page
from tests.pipeline.runs import request
from ulbq.artifacts import BitsReport
from ulbq.artifacts.records import Coverage
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.quantize_page import REPORT, page
from ulbq.runtime import PhaseRecord


def test_an_artifact_has_its_page(tiny_llama: Path, tmp_path: Path) -> None:
    path, manifest = quantize(request(tiny_llama, tmp_path / "q", method="rtn", bits=3, group_size=32))
    text = (path / REPORT).read_text(encoding="utf-8")
    Page(text)
    assert REPORT in manifest.files
    assert f"{manifest.bits.bits_per_weight:.3f}" in text
    for told in (
        "rtn w3g32 of tiny-llama",
        "Error by layer",
        "Bits by part",
        "<th>--bits</th><td>3</td>",
        "in 16 bits",
    ):
        assert told in text, told


def test_settings_sizes_and_time_are_told() -> None:
    whole = Coverage(quantized=4096, in_blocks=4096, embeddings=0, total=5000, bits=3.88)
    asked = {"method": "apiq", "bits": 2, "refit": False, "skip": ["a", "b"], "seed": 7, "data_dir": "/home/me"}
    phases = (
        PhaseRecord(name="blocks", seconds=60, peak_memory=10**9),
        PhaseRecord(name="end", seconds=5, peak_memory=1),
    )
    bits = BitsReport(parts={"codes": 8192, "adapter": 4096}, weights=4096)
    text = page(quantized(request=asked, bits=bits, coverage=whole, phases=phases, warnings=("Mind the gap.",)))
    read = Page(text)
    for told in ("3.000", "2.000 without its adapter", "10.0 kB in 16 bits", "Error by block", "a, b", "Mind the gap."):
        assert told in read.text, told
    assert "<th>all</th><td>65.0 s</td><td>1.0 GB</td>" in text
    # Where it ran is nobody's business.
    assert "/home/me" not in text

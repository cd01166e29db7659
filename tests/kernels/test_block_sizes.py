"""Tables of block sizes, and how they are measured."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ulbq.kernels import block_sizes
from ulbq.kernels.block_sizes import BlockSizes, DenseRows, blocks, dense_rows, slug

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tuning", BENCHMARKS / "tuning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tuning", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(block_sizes.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_are_whole(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == (slug(table["device"]) or "default")
    for kernel in ("vector", "small", "large", "gradient"):
        for bits in range(1, 5):
            size = blocks(table["device"], kernel, bits)
            assert size.block_n & (size.block_n - 1) == 0
            assert size.block_m == 4 if kernel == "vector" else size.block_m >= 16
    assert all(
        1 <= dense_rows(table["device"], bits).kept <= dense_rows(table["device"], bits).made for bits in range(5)
    )


def test_an_unknown_gpu_gets_the_defaults() -> None:
    assert blocks("Some GPU", "vector", 2) == blocks("", "vector", 2)
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_fastest_candidates_are_written(
    tuning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(kernel: str, bits: int, size: BlockSizes) -> float:
        return float("inf") if size.warps != 4 else abs(size.block_n - 64 * bits) + size.stages

    def cross(bits: int, large: dict[str, int]) -> DenseRows:
        return DenseRows(large["block_n"] * bits, 65)

    tuning.write("Some GPU", tmp_path / "some-gpu.json", measure, cross)
    monkeypatch.setattr(block_sizes, "FOLDER", tmp_path)
    block_sizes._read.cache_clear()
    found = {(kernel, bits): blocks("Some GPU", kernel, bits) for kernel in tuning.CANDIDATES for bits in (1, 2, 4)}
    made = [dense_rows("Some GPU", bits).made for bits in (1, 2, 4)]
    block_sizes._read.cache_clear()
    assert made == [64, 256, 1024]
    assert [found["large", bits].block_n for bits in (1, 2, 4)] == [64, 128, 256]
    assert [found["small", bits].block_n for bits in (1, 2)] == [64, 128]
    assert {(size.warps, size.stages) for size in found.values()} <= {(4, 1), (4, 2)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tuning: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"^--tune needs a CUDA GPU, and this machine has none\.$"):
        tuning.tune()

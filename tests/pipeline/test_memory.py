"""What parts of models and of runs hold, counted by hand and, slowly, in runs that hold nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.models.tiny import save_tiny
from ulbq.config.methods import ClaqOptions, GptqOptions
from ulbq.finetuning.head import LOGITS_MEMORY, logits_memory
from ulbq.methods import METHODS
from ulbq.methods.base import Needs
from ulbq.models.blocks import Linear, skeleton
from ulbq.models.source import resolve
from ulbq.pipeline.memory import Sizes, solving_memory
from ulbq.sensitivity.head import head_memory
from ulbq.solvers.hessian import factor_memory

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

_Q, _O = Linear("layers.0.self_attn.q_proj", 64, 64), Linear("layers.0.self_attn.o_proj", 64, 64)
_UP, _DOWN = Linear("layers.0.mlp.up_proj", 256, 64), Linear("layers.0.mlp.down_proj", 64, 256)
_BLOCK = (_Q, _O, _UP, _DOWN)


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_of_a_model(tied: bool, tmp_path: Path) -> None:
    model = skeleton(resolve(str(save_tiny("llama", tmp_path / "tiny", tied=tied, vocab=256))))
    sizes, table = Sizes.of(model), 256 * 64
    assert (sizes.hidden, sizes.vocabulary, sizes.head, sizes.table) == (64, 256, table, table)
    assert sizes.weights == sum(sizes.inside) + sizes.outer
    # Beside both tables only the last norm.
    assert sizes.outer == (1 if tied else 2) * table + 64
    assert sizes.embedded == sizes.ending == table + 64


@pytest.mark.parametrize(("halves", "rotated", "rows"), [(False, False, 0), (True, False, 256 * 64), (True, True, 0)])
def test_a_rotated_embedding_is_not_read_by_its_rows(halves: bool, rotated: bool, rows: int, tmp_path: Path) -> None:
    model = skeleton(resolve(str(save_tiny("llama", tmp_path / "tiny", tied=False, vocab=256))))
    sizes = Sizes.of(model, halves=halves, rotated=rotated)
    assert sizes.held_at_once(2, streamed=True) == 2 * (sizes.outer - rows + max(sizes.inside))
    assert sizes.halved == halves * 256 * 64
    # Before the first block: the last norm and, unless its rows are read, the embedding beside what is read.
    beside = sizes.inside[0] if rows else 256 * 64 + max(256 * 64, sizes.inside[0])
    ending = sizes.ending + sizes.head
    passed = sizes.passed(2, 0, 0, 0, 0)
    assert passed == 2 * max(64 + beside, max(sizes.inside), ending)


def test_solving_without_second_moments_takes_the_largest_layer() -> None:
    assert solving_memory(_BLOCK, Needs(layer_bytes=10.5), 100) == 10.5 * 64 * 256


def test_solving_in_sequence_takes_the_largest_factor() -> None:
    needs = Needs(hessians="sequence", layer_bytes=30)
    # What became of the other three layers, and of the last one the moments and what they are factored in.
    assert solving_memory(_BLOCK, needs, 64) == 4 * (2 * 64**2 + 256 * 64) + (4 + 24) * 256**2


def test_moments_of_too_few_tokens_are_not_factored_where_a_method_rounds_then() -> None:
    needs = Needs(hessians="sequence", layer_bytes=1, stacked=True, rounds_few=True)
    few, enough = (solving_memory(_BLOCK, needs, tokens) for tokens in (63, 64))
    solved = 4 * (2 * 64**2 + 256 * 64)
    # Of what is stacked codes, scales and what they stand for.
    assert few == solved + 4 * 256**2 + 5.5 * 64 * 256
    assert enough == solved + (4 + 24) * 256**2
    wide = (Linear("layers.0.mlp.down_proj", 8, 16384),)
    few, enough = (solving_memory(wide, needs, tokens) for tokens in (4095, 4096))
    assert few == 4 * 1024 * 16384 + 5.5 * 8 * 16384  # squares on the diagonal
    assert enough == 4 * 16384**2 + factor_memory(16384, overwrite=True)


def test_what_was_solved_lies_beside_in_half_precision() -> None:
    needs = Needs(hessians="sequence", layer_bytes=30)
    whole, half = (solving_memory(_BLOCK, needs, 64, aside=aside) for aside in (4, 2))
    assert whole - half == 2 * (2 * 64**2 + 256 * 64)


def test_a_matrix_that_is_solved_in_parts_takes_less() -> None:
    needs = Needs(hessians="sequence", layer_bytes=20, rounds_few=True, at_once=64 * 64)
    size = 64 * 256
    assert solving_memory((_DOWN,), needs, 1) == 4 * 256**2 + 20 * 64 * 64 + 1.5 * (size - 64 * 64)
    # A part that goes over the end of a layer is copied.
    stacked = dataclasses.replace(needs, stacked=True, layer_bytes=40)
    both = (dataclasses.replace(_DOWN, name="layers.0.mlp.one"), dataclasses.replace(_DOWN, name="layers.0.mlp.two"))
    assert solving_memory(both, stacked, 1) == 4 * 256**2 + 44 * 64 * 64 + 1.5 * (2 * size - 64 * 64)


def test_moments_of_a_whole_block_live_together() -> None:
    last_first = (_DOWN, *_BLOCK[:3])
    one, whole = (solving_memory(last_first, Needs(hessians=kind, layer_bytes=1), 64) for kind in ("sequence", "block"))
    assert whole - one == 4 * 2 * 64**2


def test_methods_tell_what_they_hold() -> None:
    def needs(name: str, **options: Any) -> Needs:
        return METHODS[name].from_options(METHODS[name].Options.model_validate({"bits": 2, **options}), 64).needs

    # As read and as latents; gradients, moments and two snapshots of what trains.
    assert needs("efficientqat").copies == needs("db-llm").copies == 7
    assert needs("efficientqat", train="grid").copies == 2
    assert needs("efficientqat", optimizer="adamw-bf16").copies == 6
    assert needs("efficientqat", train="rounding", optimizer="sign").copies == 7
    started, solver = needs("efficientqat", start="gptq"), METHODS["gptq"].from_options(GptqOptions(bits=2), 64).needs
    assert (started.layer_bytes, started.stacked) == (solver.layer_bytes, solver.stacked)
    refitted, plain = (METHODS["claq"].from_options(ClaqOptions(refit=on), 64).needs for on in (True, False))
    assert refitted.layer_bytes > plain.layer_bytes


def test_logits_are_counted_by_the_positions_of_a_chunk() -> None:
    assert logits_memory(1000, 4, 20, CPU) == 4 * 4 * 1000 * 20
    # As many as take the memory of a chunk, and sixteen at least.
    assert logits_memory(1000, 4, 10**6, CPU) == pytest.approx(LOGITS_MEMORY, rel=1e-3)
    assert logits_memory(10**6, 4, 10**6, CPU) == 4 * 4 * 10**6 * 16


def test_chunks_of_logits_grow_with_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, gpu = SimpleNamespace(total_memory=64 << 30), torch.device("cuda")
    if not torch.cuda.is_available():
        assert logits_memory(1000, 4, 10**6, gpu) == logits_memory(1000, 4, 10**6, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert logits_memory(1000, 4, 10**6, gpu) == pytest.approx(2 << 30, rel=1e-3)
    assert head_memory(10**6, 10**6, gpu) == 2 << 30
    facts.total_memory = 1 << 30
    assert logits_memory(1000, 4, 10**6, gpu) == logits_memory(1000, 4, 10**6, CPU)


_FREED = """
import ctypes
from ulbq import runtime

runtime.map_large_blocks()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

# The second is freed while the third stands behind it: in a heap it would stay.
blocks = [c.malloc(20 << 20) for _ in range(3)]
for block in blocks:
    ctypes.memset(block, 1, 20 << 20)
before = held()
c.free(blocks[1])
print(before - held() >= 20 << 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_blocks_go_back_as_they_are_freed() -> None:
    done = subprocess.run([sys.executable, "-c", _FREED], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_recorded_predictions_are_right() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "predictions-cpu.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"tiny", "default", "block"}
    for row in rows:
        ratios = {what: row[what] for what in ("memory", "disk", "artifact") if what in row}
        assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.2), row


_RUN = """
import ctypes, gc, json, sys
from pathlib import Path
from ulbq import runtime
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.saliency import saliency

small, big, changes = json.loads(sys.argv[1])
request, work = (SaliencyRequest, saliency) if "kind" in changes else (QuantizeRequest, quantize)
# Once, so that nothing is left to import.
work(request(**{**changes, **small}))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before, plans = runtime.peak_memory(), []
runtime.LIBRARY_MEMORY = 0
work(request(**{**changes, **big}), on_plan=plans.append)
plan = plans[0]
said = plan.peak_memory if "kind" in changes else plan.cost.peak_memory
print(json.dumps([said - before, runtime.peak_memory() - before]))
"""
"""Predicted and measured bytes of a run, beyond what the process held before it."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, found = tmp_path_factory.mktemp("memory"), {}
    for name, hidden, inside in (("small", 128, 256), ("big", 512, 1408)):
        model = save_tiny(
            "llama",
            folder / name,
            tied=False,
            dtype=torch.bfloat16,
            hidden_size=hidden,
            intermediate_size=inside,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
        tokens = folder / f"{name}.safetensors"
        count, length = (4, 16) if name == "small" else (10, 256)
        save_file({"tokens": torch.randint(250, (count, length), generator=torch.Generator().manual_seed(0))}, tokens)
        found[name] = {
            **{"source": str(model), "out": str(folder / f"{name}-out"), "force": True, "device": "cpu"},
            **{"calibration": str(tokens), "samples": count - 2, "sequence_length": length},
        }
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process holds")
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rtn", "bits": 4},
        {"method": "gptq", "bits": 2},
        {"method": "claq"},
        {"method": "trellis"},
        {"method": "efficientqat", "epochs": 1},
        {"method": "efficientqat", "epochs": 1, "train": "grid"},
        {"method": "efficientqat", "epochs": 1, "train": "rounding", "optimizer": "sign"},
        {"method": "db-llm", "epochs": 1},
        {"method": "apiq", "epochs": 1},
        {"method": "apiq", "epochs": 1, "granularity": "layer"},
        {"method": "ulb-sapr", "epochs": 1},
        {"kind": "fisher"},
        {"kind": "wanda"},
        {"kind": "hessian"},
        {"kind": "magnitude"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_what_a_run_holds(changes: dict[str, Any], given: dict[str, dict[str, Any]]) -> None:
    calibrated = changes.get("method") != "rtn" and changes.get("kind") != "magnitude"
    idle = () if calibrated else ("calibration", "samples", "sequence_length")
    runs = [{name: value for name, value in given[which].items() if name not in idle} for which in ("small", "big")]
    # What is freed goes back at once: what lives is all that is counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps([*runs, changes])],
        **{"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True, "check": True},
    )
    said, took = json.loads(done.stdout.splitlines()[-1])
    assert said == pytest.approx(took, rel=0.2)

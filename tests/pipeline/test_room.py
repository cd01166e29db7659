"""A run that memory has no room for is refused before its work begins, with a setting that fits."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.models.tiny import save_tiny
from ulbq import distributed, runtime
from ulbq.config.quantize import QuantizeRequest, resolve
from ulbq.errors import ResourceError
from ulbq.methods.base import set_aside
from ulbq.models.blocks import structure
from ulbq.models.skeleton import empty_model
from ulbq.models.source import resolve as resolved
from ulbq.pipeline import quantization_plan, room
from ulbq.pipeline.predict import Cost, RunSizes, predict, trained_memory, whole_memory
from ulbq.pipeline.quantization_plan import Job, build_method, prepare
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent
from ulbq.training.precision import Precision


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def asked(folder: Path, **options: Any) -> QuantizeRequest:
    save_file({"tokens": torch.randint(3, 250, (20, 256)).int()}, folder / "tokens.safetensors")
    given = {"method": "efficientqat", "bits": 2, "group_size": 32, "samples": 16, "sequence_length": 256}
    given |= {"batch_size": 8, "calibration": str(folder / "tokens.safetensors"), "device": "cpu", "offline": True}
    return QuantizeRequest(source=str(save_tiny("llama", folder / "m")), out=folder / "q", **{**given, **options})


def on_gpu(job: Job, free: int, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The job as on a GPU with so much memory: nothing is computed on it."""
    monkeypatch.setattr(runtime, "free_memory", lambda device: free)
    monkeypatch.setattr(runtime, "describe_device", lambda device: "a GPU")
    moved = dataclasses.replace(job, precision=Precision(torch.device("cuda"), torch.bfloat16))
    return dataclasses.replace(moved, plan=job.plan.model_copy(update={"cost": room._cost(moved)}))


def device_memory(job: Job, **changes: Any) -> int:
    return room._cost(job, **changes).device_memory


def test_a_run_that_takes_far_more_than_is_free_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"predicted to take 0\.\d GiB of memory, and 0\.0 GiB are free") as error:
        quantize(asked(tmp_path))
    assert error.value.hint == "Free some, or take a machine with more memory."
    assert not list(tmp_path.glob("q*"))


def test_a_run_that_may_not_fit_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, told = prepare(asked(tmp_path), Silent()), Notes()
    more = job.plan.cost.peak_memory - runtime.peak_memory()
    monkeypatch.setattr(runtime, "available_memory", lambda: round(0.9 * more))
    room.check_room(job, told)
    assert "it may end for lack of it" in told.said[-1]


def test_the_hint_is_a_setting_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = on_gpu(prepare(asked(tmp_path), Silent()), 0, monkeypatch)
    one = room._one_by_one(job)
    whole, least, half = device_memory(job), device_memory(job, **one), device_memory(job, sequence_length=128, **one)
    assert half < least < whole
    told = Notes()
    # Samples can run one after the other: that is found out as they train.
    room.check_room(on_gpu(job, least, monkeypatch), told)
    assert not told.said
    with pytest.raises(ResourceError, match="of a GPU, and") as error:
        room.check_room(on_gpu(job, half, monkeypatch), told)
    assert error.value.hint == "With `sequence_length=128` it fits."
    with pytest.raises(ResourceError) as error:
        room.check_room(on_gpu(job, half // 2, monkeypatch), told)
    assert "`device=cpu`" in error.value.hint


def test_device_and_host_are_predicted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(asked(tmp_path), Silent())
    cpu, gpu = job.plan.cost, on_gpu(job, 1 << 30, monkeypatch).plan.cost
    assert cpu.device_memory == 0 < gpu.device_memory
    assert gpu.peak_memory < cpu.peak_memory
    assert (gpu.disk, gpu.artifact) == (cpu.disk, cpu.artifact)
    # Activations stay on the host, and beyond the memory for them on disk.
    stores = 4 * 64 * 256 * 18
    small = room._cost(on_gpu(job, 1 << 30, monkeypatch), activation_memory=0)
    assert gpu.peak_memory - small.peak_memory == pytest.approx(3 * stores, rel=0.4)
    assert small.device_memory == gpu.device_memory


def test_a_mapped_file_and_other_machines_take_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, told = prepare(asked(tmp_path), Silent()), Notes()
    more = job.plan.cost.peak_memory - runtime.peak_memory()
    mapped = 40 << 30
    cost = job.plan.cost.model_copy(update={"peak_memory": job.plan.cost.peak_memory + mapped})
    source = dataclasses.replace(job.source, path=tmp_path / "m.gguf", kind="gguf")
    with (tmp_path / "m.gguf").open("wb") as file:
        file.truncate(mapped)
    job = dataclasses.replace(job, source=source, plan=job.plan.model_copy(update={"cost": cost}))
    monkeypatch.setattr(runtime, "available_memory", lambda: 2 * more)
    monkeypatch.setattr(room.distributed, "size", lambda: 16)
    room.check_room(job, told)
    assert not told.said


def test_activations_that_scores_keep_are_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(tmp_path, method="gptq", bits=3, target_bits=3.9, batch_size=None)
    job = on_gpu(prepare(request, Silent()), 1 << 30, monkeypatch)
    large, small = room._cost(job, activation_memory=1 << 30), room._cost(job, activation_memory=1)
    assert large.device_memory == small.device_memory
    assert large.peak_memory > small.peak_memory


def test_what_passes_a_teacher_that_is_read_by_blocks_is_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tmp_path, end_to_end="kl", teacher="cached", stream=True, epochs=0)
    job = on_gpu(prepare(request, Silent()), 1 << 30, monkeypatch)
    large, small = room._cost(job, activation_memory=1 << 30), room._cost(job, activation_memory=0)
    assert job.streamed
    assert large.device_memory == small.device_memory
    # Guesses of 18 samples, and their hidden states in half precision.
    settings = job.method.needs.end_to_end
    assert settings is not None
    beside = 18 * 256 * (settings.teacher_top_k * 8 + 4 + 2 * 64)
    assert large.peak_memory - small.peak_memory == beside


def predicted_70b(method: str, *, sharded: bool = False, **options: Any) -> Cost:
    """What a model of Llama-70B's shape takes on a GPU."""
    return predict(replace(sizes_of_70b(method, **options), sharded=sharded))


def sizes_of_70b(method: str, **options: Any) -> RunSizes:
    """A run on a model of Llama-70B's shape, on a GPU."""
    config = AutoConfig.for_model("llama", **_70B, vocab_size=128256, dtype="bfloat16", tie_word_embeddings=False)
    model = empty_model(config, torch.float32)
    request = QuantizeRequest.model_validate(
        {"method": method, "group_size": 64, "calibration": "wikitext2", **options}
    )
    run = resolve(request, "quick", rotate=False, calibration="wikitext2")
    precision = Precision(torch.device("cuda"), torch.bfloat16)
    return RunSizes(run, build_method(request), structure(model), model, precision, halves=True)


def wanting_all(device: str = "cpu", *, halves: bool = False, rotate: bool = False, **options: Any) -> RunSizes:
    """What is predicted of the end-to-end training of two blocks of Llama-70B's shape."""
    config = AutoConfig.for_model("llama", **_70B, vocab_size=128256, dtype="bfloat16", tie_word_embeddings=False)
    model = empty_model(config, torch.bfloat16)
    request = QuantizeRequest(
        source="", method="efficientqat", calibration="wikitext2", end_to_end="kl", epochs=0, offline=True, **options
    )
    run = resolve(request, "quick", rotate=rotate, calibration="wikitext2")
    precision = Precision(torch.device(device), torch.bfloat16)
    return RunSizes(run, build_method(request), structure(model), model, precision, halves=halves)


def test_what_wants_all_of_a_model_reads_halves_as_such() -> None:
    halved, plain = (wanting_all(teacher="cached", halves=halves) for halves in (True, False))
    for predicted in (whole_memory, trained_memory):
        assert predicted(halved) < predicted(plain)


def test_a_rotated_teacher_and_its_student_hold_their_embeddings() -> None:
    plain, rotated = (trained_memory(wanting_all(halves=True, rotate=rotate)) for rotate in (False, True))
    assert rotated - plain == 2 * (2 * 128256 * 8192)


def test_guesses_of_a_teacher_do_not_count_against_a_gpu() -> None:
    memory = []
    for device in ("cpu", "cuda"):
        asked = [wanting_all(device, teacher="cached", activation_memory=room) for room in (0, 1 << 20)]
        memory.append([(trained_memory(one), whole_memory(one)) for one in asked])
    assert memory[0][0] != memory[0][1]
    assert memory[1][0] == memory[1][1]


def test_a_plan_asks_what_halves_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def ask(sizes: RunSizes, **_: bool) -> int:
        told.append(sizes.halves)
        return 0

    for name in ("trained_memory", "whole_memory"):
        monkeypatch.setattr(quantization_plan, name, ask)
    prepare(asked(tmp_path, end_to_end="kl", epochs=0), Silent())
    assert told == [resolved(str(tmp_path / "m")).halves] * 2


_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
_70B |= {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("method", "batch_size"), [("efficientqat", 4), ("db-llm", 2), ("gptq", None), ("ulb-sapr", 1)]
)
def test_a_block_of_70b_fits_in_24_gb(method: str, batch_size: int | None) -> None:
    options = {"batch_size": batch_size} if batch_size else {"bits": 3}
    assert predicted_70b(method, samples=128, sequence_length=1024, **options).device_memory < 24e9


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("efficientqat", [16.5, 13.0, 11.3, 10.5]),
        ("db-llm", [16.5, 13.1, 11.4, 10.5]),
        ("apiq", [16.8, 13.3, 11.6, 10.7]),
        ("ulb-sapr", [21.9, 18.4, 16.7, 16.7]),
    ],
)
def test_a_block_of_70b_is_shared_by_gpus(method: str, expected: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``docs/guides/devices.md`` has it."""
    found = []
    for count in (1, 2, 4, 8):
        monkeypatch.setattr(distributed, "_world", distributed._World(0, count, None))
        cost = predicted_70b(method, sharded=count > 1, samples=128, sequence_length=1024, micro_batch=1)
        found.append(round(cost.device_memory / 1e9, 1))
    assert found == expected


def test_blocks_are_not_sharded_for_what_fewer_samples_at_once_would_save() -> None:
    few, many = (sizes_of_70b("efficientqat", samples=128, sequence_length=4096, micro_batch=count) for count in (1, 4))
    assert predict(few).device_memory < predict(many).device_memory
    assert trained_memory(few) == trained_memory(many)


def test_moments_in_bfloat16_take_half_as_much() -> None:
    whole, half = (
        predicted_70b("ulb-sapr", samples=128, sequence_length=1024, batch_size=1, optimizer=optimizer)
        for optimizer in ("adamw", "adamw-bf16")
    )
    weights = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert whole.device_memory - half.device_memory == 4 * weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_set_aside_without_a_change(dtype: torch.dtype) -> None:
    weight = (torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 3).to(dtype).float()
    kept = set_aside(weight)
    assert kept.dtype == dtype
    assert torch.equal(kept.float(), weight)

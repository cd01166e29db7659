"""The end-to-end phase in whole runs on tiny models: what it improves, stores, resumes and refuses."""

import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import save_tiny
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.records import EndToEndRecord
from ulbq.artifacts.store import ArtifactWriter
from ulbq.artifacts.whole import verify
from ulbq.blockwise.samples import Samples
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.student import Student
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline import end_to_end
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.streams import Streams
from ulbq.progress import Silent
from ulbq.quantizers.binary_mos import BinaryMosQuantizer

_FIELDS = ("end_to_end", "end_to_end_epochs", "end_to_end_lr_factor", "end_to_end_train", "gradient_accumulation")
_NONE: dict[str, Any] = {"end_to_end_epochs": None, "end_to_end_lr_factor": None, "gradient_accumulation": None}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.safetensors"
    # Every token is followed by one of two: something that even a text's own tokens teach.
    generator = torch.Generator().manual_seed(7)
    steps = 1 + torch.randint(0, 2, (6, 24), generator=generator)
    tokens = 3 + (torch.randint(0, 40, (6, 1), generator=generator) + steps.cumsum(1)) % 40
    save_file({"tokens": tokens.int()}, path)
    return path


def request(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    values: dict[str, Any] = {"method": "db-llm", "epochs": 0, "samples": 4, "sequence_length": 24, "precision": "fp32"}
    values |= {
        "allow_partial": True,
        "end_to_end": "kl",
        "end_to_end_epochs": 1,
        "end_to_end_lr_factor": 1.0,
        "gradient_accumulation": 1,
    } | changes
    if values["method"] != "binary-mos":
        values.setdefault("group_size", 32)
    return QuantizeRequest(
        source=str(source), out=out, calibration=str(samples), device="cpu", offline=True, seed=1, **values
    )


def shards(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    return found | {f"adapter/{path.name}": path.read_bytes() for path in sorted(folder.glob("adapter/*.safetensors"))}


def divergence(dense: Path, packed: Path, samples: Path) -> float:
    """KL of the held-out samples between the full model and the artifact as it is loaded, in nats a token."""
    tokens = load_file(samples)["tokens"][4:].long()
    with torch.no_grad():
        teacher, student = (
            load_model(resolve(path), dtype=torch.float32)(tokens).logits.log_softmax(-1) for path in (dense, packed)
        )
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def record_of(manifest: QuantizedManifest) -> EndToEndRecord:
    assert manifest.end_to_end is not None
    return manifest.end_to_end


class _Stop(Exception):
    """Interrupts a run."""


class _StopAfter(Silent):
    """Interrupts the training after so many of its steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Any:
        inner, outer = super().phase(name, total), self

        class Phase:
            def __enter__(self) -> Any:
                inner.__enter__()
                return self

            def __exit__(self, *error: Any) -> Any:
                return inner.__exit__(*error)

            def advance(self, steps: int = 1, detail: str = "") -> None:
                if name == "Training end to end":
                    outer._left -= steps
                    if outer._left < 0:
                        raise _Stop

        return Phase()


@pytest.mark.parametrize(
    "changes",
    [
        {"end_to_end": "kl", "end_to_end_train": "all"},
        {"end_to_end": "kl", "teacher": "cached", "teacher_top_k": 16},
        {"end_to_end": "kl-hidden"},
        {"end_to_end": "dad"},
        {"method": "apiq", "adapter": False},
        {"method": "binary-mos", "end_to_end": "kl-hidden", "end_to_end_train": "all", "end_to_end_lr_factor": 0.2},
    ],
    ids=str,
)
def test_the_stored_model_comes_closer_to_the_full_one(
    changes: dict[str, Any], tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    only = {name: value for name, value in changes.items() if name in ("method", "adapter")}
    before, plain = quantize(request(tiny_llama, tmp_path / "start", samples, **only, end_to_end="none", **_NONE))
    after, manifest = quantize(request(tiny_llama, tmp_path / "tuned", samples, **changes))
    record = record_of(manifest)
    assert record.end_error < record.start_error
    assert record.epochs == 1
    assert record.steps == 4
    assert divergence(tiny_llama, after, samples) < divergence(tiny_llama, before, samples)
    assert plain.end_to_end is None
    verify(after)


def test_the_recorded_loss_is_that_of_the_stored_model(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    path, manifest = quantize(request(tiny_llama, tmp_path / "q", samples))
    assert record_of(manifest).end_error == pytest.approx(divergence(tiny_llama, path, samples), rel=0.01)
    layers = {layer.name: layer for layer in manifest.layers}
    dense = resolve(tiny_llama).read("model.layers.1.mlp.up_proj.weight")
    stored = load_model(resolve(path), dtype=torch.float32).get_submodule("model.layers.1.mlp.up_proj").weight
    error = float((stored - dense).square().sum() / dense.square().sum())
    assert layers["model.layers.1.mlp.up_proj"].error == pytest.approx(error, rel=1e-3)


def test_a_start_that_nothing_improves_on_stays(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    warnings: list[str] = []

    class Heard(Silent):
        def warn(self, text: str) -> None:
            warnings.append(text)

    far = request(tiny_llama, tmp_path / "far", samples, end_to_end_lr_factor=3000.0, end_to_end_train="all")
    path, manifest = quantize(far, Heard())
    assert record_of(manifest).epochs == 0
    assert record_of(manifest).end_error == record_of(manifest).start_error
    assert any("did not improve" in text for text in warnings)
    plain = far.model_copy(update={"out": tmp_path / "plain"} | dict.fromkeys(_FIELDS))
    assert shards(path) == shards(quantize(plain)[0])


@pytest.mark.parametrize("steps", [0, 4, 6])
def test_an_interrupted_phase_goes_on_to_the_same_bytes(
    steps: int, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    changes = {"adapter": True, "rank": 4, "dropout": 0.2, "epochs": 1, "base_share": 0.3, "end_to_end_epochs": 2}
    straight, _ = quantize(request(tiny_llama, tmp_path / "straight", samples, **changes))
    out = tmp_path / "stopped"
    with pytest.raises(_Stop):
        quantize(request(tiny_llama, out, samples, **changes), _StopAfter(steps))
    resumed, manifest = quantize(request(tiny_llama, out, samples, **changes))
    assert shards(resumed) == shards(straight)
    assert record_of(manifest).steps == 8


def test_a_run_stopped_between_the_written_blocks_goes_on_to_the_same_bytes(
    tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = quantize(request(tiny_llama, tmp_path / "straight", samples))
    plain = ArtifactWriter.record

    def stopping(self: ArtifactWriter, key: str, value: Any, **more: Any) -> None:
        plain(self, key, value, **more)
        if key == "tuned 1":
            raise _Stop

    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(ArtifactWriter, "record", stopping)
        with pytest.raises(_Stop):
            quantize(request(tiny_llama, out, samples))
    assert shards(quantize(request(tiny_llama, out, samples))[0]) == shards(straight)


def test_a_run_stopped_in_the_middle_of_the_exchange_goes_on_to_the_same_bytes(
    tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = quantize(request(tiny_llama, tmp_path / "straight", samples))
    plain = os.replace

    def stopping(old: Any, new: Any) -> None:
        plain(old, new)
        if Path(old).parent.name == "tuned" and not Path(old).name.startswith(".tmp"):
            raise _Stop

    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopping)
        with pytest.raises(_Stop):
            quantize(request(tiny_llama, out, samples))
    assert shards(quantize(request(tiny_llama, out, samples))[0]) == shards(straight)


def test_an_adapter_trains_along(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    with_adapter = {"adapter": True, "rank": 4, "dora": True}
    before, _ = quantize(request(tiny_llama, tmp_path / "b", samples, **with_adapter, end_to_end="none", **_NONE))
    after, manifest = quantize(request(tiny_llama, tmp_path / "a", samples, **with_adapter, end_to_end_lr_factor=0.3))
    assert record_of(manifest).epochs == 1
    old, new = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (before, after))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old if "lora_B" in name)
    assert any(not torch.equal(old[name], new[name]) for name in old if "magnitude" in name)


def test_scales_alone_leave_every_code_where_it_was(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    plain, _ = quantize(
        request(tiny_llama, tmp_path / "plain", samples, method="binary-mos", end_to_end="none", **_NONE)
    )
    codes = {}
    for train in ("scales", "all"):
        asked = request(tiny_llama, tmp_path / train, samples, method="binary-mos", end_to_end_train=train)
        stored = load_file(quantize(asked)[0] / "model-block-00001.safetensors")
        codes[train] = {name: tensor for name, tensor in stored.items() if name.endswith("codes")}
    start = load_file(plain / "model-block-00001.safetensors")
    assert all(torch.equal(start[name], tensor) for name, tensor in codes["scales"].items())
    assert any(not torch.equal(start[name], tensor) for name, tensor in codes["all"].items())


def test_an_artifact_is_gone_on_from(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    first, made = quantize(request(tiny_llama, tmp_path / "first", samples))
    _, manifest = quantize(request(first, tmp_path / "second", samples))
    assert record_of(manifest).start_error == pytest.approx(record_of(made).end_error, rel=0.01)
    assert record_of(manifest).end_error < record_of(made).end_error


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "deepseek", "gemma2"])
def test_other_families_store_what_was_trained(family: str, samples: Path, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / family)
    path, manifest = quantize(request(dense, tmp_path / "q", samples, end_to_end_lr_factor=1.0, end_to_end_epochs=1))
    assert record_of(manifest).epochs == 1
    assert record_of(manifest).end_error == pytest.approx(divergence(dense, path, samples), rel=0.02)


@torch.no_grad()
def _overflow_adapter(student: Student) -> None:
    adapter = next(iter(student.layers.values())).adapter
    assert adapter is not None
    adapter.lora_a.fill_(1e6)


@torch.no_grad()
def _lose_norm(student: Student) -> None:
    student.roles["norms"][0].fill_(torch.nan)


@torch.no_grad()
def _turn_router(student: Student) -> None:
    """The experts exchange their tokens while they are packed; the weight at uniform gates does not show it."""
    quantizer = next(iter(student.layers.values())).quantizer
    assert isinstance(quantizer, BinaryMosQuantizer)
    quantizer.out_scales.mul_(torch.tensor([[1.0], [2.0]]))
    plain = quantizer.finalize

    def turned() -> dict[str, torch.Tensor]:
        packed = plain()
        return packed | {"router": packed["router"].flip(0)}

    quantizer.finalize = turned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("harm", "changes", "says"),
    [
        (
            _overflow_adapter,
            {"adapter": True, "rank": 4, "end_to_end_lr_factor": 0.3},
            "Block 0 has scales, norms or adapters",
        ),
        (_lose_norm, {}, "Block 0 has scales, norms or adapters"),
        (_turn_router, {"method": "binary-mos", "experts": 2}, "answers otherwise than the trained one"),
    ],
)
def test_what_cannot_be_stored_is_said_here_too(
    harm: Callable[[Student], None],
    changes: dict[str, Any],
    says: str,
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = end_to_end._write

    def harmed(phase: Any, student: Student) -> None:
        sizes = student.input_sizes(phase.examples.tokens[-1:])
        harm(student)
        monkeypatch.setattr(Student, "input_sizes", lambda self, tokens: sizes)
        plain(phase, student)

    monkeypatch.setattr(end_to_end, "_write", harmed)
    with pytest.raises(NumericsError, match=says):
        quantize(request(tiny_llama, tmp_path / "q", samples, **changes))


@pytest.mark.parametrize("loss", ["kl", "kl-hidden"])
def test_the_student_is_gone_with_its_phase(
    loss: str, tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, left = [], []
    build, train = end_to_end.build_student, end_to_end.train_end_to_end

    def watched(*arguments: Any, **named: Any) -> Student:
        student = build(*arguments, **named)
        built.extend(weakref.ref(module) for module in student.model.modules())
        return student

    def trained(*arguments: Any) -> EndToEndRecord:
        record = train(*arguments)
        left.extend(type(module()).__name__ for module in built if module() is not None)
        return record

    monkeypatch.setattr(end_to_end, "build_student", watched)
    monkeypatch.setattr("ulbq.pipeline.quantize.train_end_to_end", trained)
    gc.disable()
    try:
        quantize(request(tiny_llama, tmp_path / "q", samples, end_to_end=loss))
    finally:
        gc.enable()
    assert built
    assert left == []


def test_hidden_states_from_a_cache_are_refused(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hidden states"):
        plan(request(tiny_llama, tmp_path / "q", samples, end_to_end="kl-hidden", teacher="cached"))


def test_the_plan_counts_student_and_teacher(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    big = save_tiny("llama", tmp_path / "big", num_hidden_layers=24)
    peak = {}
    for name, changes in {
        "none": {"end_to_end": "none", **_NONE},
        "ce": {"end_to_end": "ce"},
        "scales": {},
        "all": {"end_to_end_train": "all"},
    }.items():
        peak[name] = plan(request(big, tmp_path / "q", samples, **changes)).cost.peak_memory
    assert peak["none"] < peak["ce"] < peak["scales"] < peak["all"]


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    path = tmp_path / "instructions.jsonl"
    rows = [{"instruction": f"say {word}", "output": f"{word} {word}"} for word in "abcdefghijkl"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def on_instructions(source: Path, out: Path, samples: Path, text: Path, **changes: Any) -> QuantizeRequest:
    own = {"end_to_end_data": str(text), "end_to_end_samples": 5, "end_to_end": "ce", "sequence_length": 24}
    return request(source, out, samples, **own | changes)


def test_an_instruction_set_teaches_its_answers(
    tiny_llama: Path, samples: Path, instructions: Path, tmp_path: Path
) -> None:
    path, manifest = quantize(on_instructions(tiny_llama, tmp_path / "q", samples, instructions))
    record = record_of(manifest)
    assert record.end_error < record.start_error
    assert record.steps == 5
    assert (record.data["name"], record.data["samples"]) == ("instructions.jsonl", 7)
    assert manifest.calibration["name"] == "tokens.safetensors"
    stored = load_file(path / "end-to-end.safetensors")
    assert int(stored["taught"].sum()) == record.data["taught_tokens"]
    # The held-out loss is that of the answers alone.
    tokens, taught = stored["tokens"][5:].long(), stored["taught"][5:]
    with torch.no_grad():
        logits = load_model(resolve(path), dtype=torch.float32)(tokens).logits[:, :-1].log_softmax(-1)
    losses = -logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert record.end_error == pytest.approx(float(losses[taught[:, 1:]].mean()), rel=0.01)
    verify(path)


@pytest.mark.parametrize("steps", [3, 5])
def test_a_phase_on_instructions_goes_on_to_the_same_bytes(
    steps: int, tiny_llama: Path, samples: Path, instructions: Path, tmp_path: Path
) -> None:
    changes = {"end_to_end": "ce-kl", "end_to_end_epochs": 2, "method": "apiq", "adapter": False}
    changes |= {"end_to_end_train": "scales-zeros", "gradient_accumulation": 2}
    straight, _ = quantize(on_instructions(tiny_llama, tmp_path / "straight", samples, instructions, **changes))
    asked = on_instructions(tiny_llama, tmp_path / "stopped", samples, instructions, **changes)
    with pytest.raises(_Stop):
        quantize(asked, _StopAfter(steps))
    assert shards(quantize(asked)[0]) == shards(straight)


def test_zero_points_train_where_they_are_asked_to(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    changes = {"method": "apiq", "adapter": False, "bits": 3}
    zeros = {"end_to_end_train": "scales-zeros", "end_to_end_zero_lr": 0.15}
    learning = {"end_to_end": "ce", "end_to_end_epochs": 2}
    path, manifest = quantize(request(tiny_llama, tmp_path / "z", samples, **changes, **zeros, **learning))
    plain, _ = quantize(request(tiny_llama, tmp_path / "p", samples, **changes | _NONE | {"end_to_end": "none"}))
    before, after = (load_file(folder / "model-block-00001.safetensors") for folder in (plain, path))
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"scales", "zeros", "weight"}
    assert record_of(manifest).end_error < record_of(manifest).start_error
    tokens = load_file(samples)["tokens"][4:].long()
    with torch.no_grad():
        logits = load_model(resolve(path), dtype=torch.float32)(tokens).logits[:, :-1].log_softmax(-1)
    stored = -logits.gather(-1, tokens[:, 1:, None]).mean()
    assert record_of(manifest).end_error == pytest.approx(float(stored), rel=0.01)


@pytest.mark.parametrize("changes", [{"method": "db-llm"}, {"method": "apiq", "symmetric": True}, {"method": "claq"}])
def test_zero_points_that_are_not_there_are_refused(
    changes: dict[str, Any], tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    group = {"group_size": None} if changes["method"] == "claq" else {}
    with pytest.raises(UsageError, match="wants zero points"):
        plan(request(tiny_llama, tmp_path / "q", samples, end_to_end_train="scales-zeros", **changes, **group))


def test_embeddings_and_head_as_they_are_stored_give_the_same_bytes(
    tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = save_tiny("llama", tmp_path / "tied", tied=True)
    for name, dense in {"untied": tiny_llama, "tied": tied}.items():
        halved, _ = quantize(request(dense, tmp_path / f"{name}-half", samples, precision="bf16"))
        with monkeypatch.context() as patched:
            patched.setattr("ulbq.pipeline.student.tables_as_stored", lambda *given, **options: None)
            full, _ = quantize(request(dense, tmp_path / f"{name}-full", samples, precision="bf16"))
        assert shards(halved) == shards(full)


def test_the_student_holds_embeddings_and_head_once_and_as_stored(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[torch.dtype]] = []
    build = end_to_end.build_student

    def watched(*arguments: Any, **named: Any) -> Student:
        student = build(*arguments, **named)
        embedding, head = student.model.get_input_embeddings(), student.model.get_output_embeddings()
        assert embedding.weight is head.weight
        held.append({embedding.weight.dtype})
        return student

    monkeypatch.setattr(end_to_end, "build_student", watched)
    tied = save_tiny("llama", tmp_path / "tied", tied=True)
    for precision in ("bf16", "fp32"):
        quantize(request(tied, tmp_path / precision, samples, precision=precision))
    assert held == [{torch.bfloat16}, {torch.float32}]


def test_an_artifact_trains_without_a_walk_over_its_blocks(
    tiny_llama: Path, samples: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = quantize(request(tiny_llama, tmp_path / "first", samples, end_to_end="none", **_NONE))
    monkeypatch.setattr("ulbq.pipeline.blocks.Streams", None)
    path, manifest = quantize(request(first, tmp_path / "second", samples))
    assert manifest.blocks == ()
    assert manifest.calibration["name"] == "tokens.safetensors"
    own = on_instructions(first, tmp_path / "third", samples, instructions)
    with pytest.raises(UsageError, match="`calibration` means nothing"):
        plan(own)
    alone, manifest = quantize(own.model_copy(update={"calibration": None}))
    assert manifest.calibration == {}
    assert not (alone / "calibration.safetensors").exists()
    # Of so small a model the blocks take less than what follows in both.
    costs = [plan(request(source, path, samples)).cost for source in (first, tiny_llama)]
    assert costs[0].peak_memory <= costs[1].peak_memory


def test_samples_of_answers_are_no_calibration(
    tiny_llama: Path, samples: Path, instructions: Path, tmp_path: Path
) -> None:
    path, _ = quantize(on_instructions(tiny_llama, tmp_path / "q", samples, instructions))
    with pytest.raises(InputError, match="examples of an instruction set"):
        quantize(request(tiny_llama, tmp_path / "r", path / "end-to-end.safetensors"))


def test_the_model_may_write_the_text_itself(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "q", samples, end_to_end_data="self", end_to_end_samples=3)
    path, manifest = quantize(asked)
    assert record_of(manifest).data["name"] == "self"
    assert load_file(path / "end-to-end.safetensors")["tokens"].shape == (5, 24)


@pytest.mark.parametrize(("blocks", "end_to_end"), [(2, 4), (4, 2), (4, 4)])
def test_blocks_and_the_whole_may_train_on_other_numbers_of_the_same_samples(
    blocks: int, end_to_end: int, tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = dict[str, list[list[int]]]()

    class Noted(Examples):
        def __init__(self, tokens: torch.Tensor, training: int, taught: torch.Tensor | None = None) -> None:
            seen["train"], seen["held"] = tokens[:training].tolist(), tokens[training:].tolist()
            super().__init__(tokens, training, taught)

    class Walked(Streams):
        def __init__(self, job: Job, drawn: Samples, scratch: Path) -> None:
            seen["blocks"] = drawn.tokens.tolist()
            super().__init__(job, drawn, scratch)

    monkeypatch.setattr("ulbq.pipeline.end_to_end.Examples", Noted)
    monkeypatch.setattr("ulbq.pipeline.blocks.Streams", Walked)
    asked = request(tiny_llama, tmp_path / "q", samples, end_to_end_samples=end_to_end)
    path, manifest = quantize(asked.model_copy(update={"samples": blocks}))
    given = load_file(samples)["tokens"].tolist()
    assert seen == {"train": given[:end_to_end], "held": given[4:], "blocks": [*given[:blocks], *given[4:]]}
    assert record_of(manifest).steps == end_to_end
    assert load_file(path / "calibration.safetensors")["tokens"].tolist() == given

"""Fine-tuning on a task: what trains and what stays, going on after a stop, and the artifact that it leaves."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ulbq  # noqa: F401 - registers the format with transformers
from tests.data.conftest import write_jsonl
from tests.models.tiny import save_tiny
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.whole import verify
from ulbq.commands.app import main
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.data.examples import draw_examples
from ulbq.errors import InputError, NumericsError, ResourceError, UsageError
from ulbq.finetuning.checkpoint import TrainerCheckpoint
from ulbq.finetuning.student import Student
from ulbq.finetuning.trainer import Trainer
from ulbq.models.blocks import block_list
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline import finetune_run, finetuned
from ulbq.pipeline.convert import convert
from ulbq.pipeline.finetune_plan import FinetuneJob, prepare
from ulbq.pipeline.finetune_run import finetune
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.tasks import load_task, task_names
from ulbq.progress import Silent
from ulbq.training.optimizer import task_lr_factor
from ulbq.training.precision import Precision

MADE: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 3, "group_size": 32},
    "tables": {"method": "rtn", "bits": 3, "group_size": 32, "embedding_bits": 4, "head_bits": 8},
    "apiq": {
        "method": "apiq",
        "bits": 2,
        "group_size": 32,
        "rank": 2,
        "alpha": 3.0,
        "epochs": 0,
        "targets": ("o_proj",),
    },
    "db-llm": {"method": "db-llm", "group_size": 16, "epochs": 0},
    "claq": {"method": "claq", "bits": 2},
    "binary-mos": {"method": "binary-mos", "experts": 2, "zeros": "output", "epochs": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "m")
    (folder / "m" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    save_file({"tokens": torch.randint(3, 250, (6, 24), dtype=torch.int32)}, folder / "tokens.safetensors")
    rows = [{"instruction": f"count from {n % 5}", "output": f"{n % 5} then {n % 5 + 1}"} for n in range(30)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def made(folder: Path, name: str) -> Path:
    """An artifact of the module's model, made once."""
    out = folder / name
    if not out.exists():
        values = dict(MADE[name])
        if values["method"] != "rtn":
            values |= {"calibration": str(folder / "tokens.safetensors"), "samples": 4, "sequence_length": 24}
            values |= {"precision": "fp32"}
        quantize(QuantizeRequest(source=str(folder / "m"), out=out, device="cpu", offline=True, **values))
    return out


def job(source: Path, folder: Path, out: Path, task: str = "instructions", **changes: Any) -> FinetuneJob:
    options: dict[str, Any] = {"data": (str(folder / "rows.jsonl"),), "sequence_length": 200, "batch_size": 4}
    options |= {
        "samples": 16,
        "validation_samples": 4,
        "epochs": 2,
        "adapter_lr": 0.01,
        "precision": "fp32",
        "device": "cpu",
    }
    options |= {"offline": True, "out": out, "micro_batch": 2, "save_every": 2}
    return prepare(str(source), load_task(task), {**options, **changes}, Silent())


def reloaded_loss(out: Path, made_by: FinetuneJob) -> float:
    """Of the held-out examples, by the artifact read anew."""
    request = made_by.request
    source = resolve(str(out), offline=True)
    drawn = draw_examples(
        request.data or (),
        source.tokenizer(),
        template=request.template,
        samples=request.samples,
        heldout=request.held_out,
        length=request.sequence_length,
        seed=request.seed,
        data_dir=None,
        offline=True,
        progress=Silent(),
    )
    model = load_model(source, dtype=torch.float32)
    assert sum(isinstance(layer, QuantLinear) for layer in model.modules()) == 21 + len(source.tables)
    examples = finetune_run.examples_of(drawn, source)
    student = Student(model, block_list(model)[1], Precision(torch.device("cpu"), torch.float32))
    named: dict[str, Any] = {"schedule": task_lr_factor, "seeds": int, "folder": out}
    with Silent().phase("evaluation") as bar:
        return Trainer(student, None, examples, made_by.settings, **named).evaluate(bar)


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("model-*.safetensors"))}


def test_an_artifact_learns_and_its_packed_weights_stay(folder: Path, tmp_path: Path) -> None:
    base = made(folder, "rtn")
    before = shards(base)
    asked = job(base, folder, tmp_path / "ft", rank=4)
    path, manifest = finetune(asked)
    learnt = manifest.finetune
    assert learnt is not None
    verify(path)
    assert shards(path) == shards(base) == before
    assert (path / "model-outer.safetensors").samefile(base / "model-outer.safetensors")
    assert learnt.end_loss < 0.7 * learnt.start_loss
    assert learnt.losses[-1][1] < learnt.losses[0][1]
    assert (learnt.steps, len(learnt.losses), learnt.template, learnt.start) == (8, 8, "chat", "fresh")
    assert [step for step, _ in learnt.evaluations] == [0, 4, 8]
    assert learnt.evaluations[0][1] == learnt.start_loss
    assert learnt.evaluations[-1][1] == learnt.end_loss
    # To the bit: what was measured is what is stored.
    assert reloaded_loss(path, asked) == learnt.end_loss
    assert reloaded_loss(base, asked) == learnt.start_loss
    assert manifest.bits.parts["adapter"] == 16 * asked.plan.parameters
    assert manifest.bits.bits_per_weight > asked.manifest.bits.bits_per_weight
    assert [parent.kind for parent in manifest.parents] == ["folder", "quantized"]
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ulbq\n")
    assert "license: apache-2.0\n" in card  # the model's own, by way of the base's card
    assert "on 16 samples of" in card
    assert "loads it packed, adapter attached." in card
    assert "| vLLM (`vllm`) | `vllm serve OUT` | NVIDIA GPU |" in card
    report = (path / "finetune.html").read_text()
    assert report.count("<polyline") == 3
    assert report.count("<circle") == 3


def test_transformers_and_convert_take_it_and_it_learns_again(folder: Path, tmp_path: Path) -> None:
    path, first = finetune(job(made(folder, "rtn"), folder, tmp_path / "ft", rank=4, epochs=1))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    own = load_model(resolve(str(path), offline=True), dtype=torch.float32)
    tokens = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(model(tokens).logits, own(tokens).logits)
    dense, _ = convert(ConvertRequest(source=str(path), dtype="fp32", merge_adapter=True, out=tmp_path / "dense"))
    card = (dense / "README.md").read_text()
    assert "Fine-tuned with `ulbq finetune --task instructions`" in card
    assert "recipe" not in card
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    torch.testing.assert_close(plain(tokens).logits, own(tokens).logits, rtol=1e-3, atol=1e-3)
    again = job(path, folder, tmp_path / "again", epochs=1)
    assert again.plan.start == "trained"
    second = finetune(again)[1]
    assert first.finetune is not None
    assert second.finetune is not None
    assert second.finetune.start_loss == first.finetune.end_loss
    assert second.finetune.end_loss < first.finetune.end_loss
    assert [parent.kind for parent in second.parents] == ["folder", "quantized"]


class Stopped(Exception):
    """What a killed run looks like from inside."""


@pytest.mark.parametrize("train", ["adapter", "adapter-scales"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    base = made(folder, "rtn")
    options: dict[str, Any] = {"rank": 2, "dropout": 0.2, "train": train, "targets": ("q_proj",)}
    options |= {"scale_lr": 0.01} if train == "adapter-scales" else {}
    whole, _ = finetune(job(base, folder, tmp_path / "whole", **options))
    step = Trainer._step
    seen: list[int] = []

    def stop(self: Trainer, *arguments: Any) -> TrainerCheckpoint:
        made = step(self, *arguments)
        seen.append(made.step)
        if seen == [1, 2, 3, 4, 5]:
            raise Stopped
        return made

    monkeypatch.setattr(Trainer, "_step", stop)
    asked = job(base, folder, tmp_path / "stopped", **options)
    with pytest.raises(Stopped):
        finetune(asked)
    assert not (tmp_path / "stopped").exists()
    path, manifest = finetune(job(base, folder, tmp_path / "stopped", **options))
    assert seen == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert shards(path) == shards(whole)
    stored = "adapter/adapter_model.safetensors"
    assert (path / stored).read_bytes() == (whole / stored).read_bytes()
    uninterrupted = json.loads((whole / "manifest.json").read_text())["finetune"]
    resumed = manifest.model_dump(mode="json")["finetune"]
    assert {**resumed, "seconds": 0} == {**uninterrupted, "seconds": 0}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["stopped", "whole"]


@pytest.mark.parametrize("name", ["rtn", "tables", "db-llm", "claq", "binary-mos"])
def test_scales_train_beside_the_adapter_and_codes_stay(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made(folder, name)
    before = shards(base)
    asked = job(base, folder, tmp_path / "ft", rank=2, train="adapter-scales", scale_lr=0.01)
    path, manifest = finetune(asked)
    assert manifest.finetune is not None
    assert manifest.finetune.end_loss < manifest.finetune.start_loss
    assert reloaded_loss(path, asked) == manifest.finetune.end_loss
    verify(path)
    verify(base)
    assert shards(base) == before
    changed = set()
    for file in sorted(base.glob("model-block-*.safetensors")):
        old, new = load_file(file), load_file(path / file.name)
        assert old.keys() == new.keys()
        changed |= {key.rpartition(".")[2] for key in old if not torch.equal(old[key], new[key])}
    assert main(["inspect", str(path), "--layers"]) == 0
    said = capsys.readouterr()
    assert "not known" in said.out + said.err
    assert "instructions, adapter-scales, on 16 samples of" in " ".join((said.out + said.err).split())
    assert changed
    assert changed <= {"scales", "in_scales", "out_scales", "zeros", "codebooks"}


def test_dora_trains_magnitudes(folder: Path, tmp_path: Path) -> None:
    asked = job(made(folder, "rtn"), folder, tmp_path / "ft", rank=2, dora=True, targets=("q_proj", "down_proj"))
    path, manifest = finetune(asked)
    assert manifest.finetune is not None
    assert manifest.finetune.end_loss < manifest.finetune.start_loss
    assert reloaded_loss(path, asked) == manifest.finetune.end_loss
    stored = load_file(path / "adapter/adapter_model.safetensors")
    assert {name.rpartition("_proj.")[2] for name in stored} == {
        *("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    assert sum("magnitude" in name for name in stored) == 6


def test_a_trained_adapter_goes_on_or_is_left_behind(folder: Path, tmp_path: Path) -> None:
    base = made(folder, "apiq")
    asked = job(base, folder, tmp_path / "ft", epochs=1)
    assert (asked.plan.start, asked.adapter.rank, asked.adapter.alpha, asked.plan.linears) == ("trained", 2, 3.0, 3)
    path, manifest = finetune(asked)
    assert manifest.finetune is not None
    assert manifest.finetune.start_loss == reloaded_loss(base, asked)
    assert manifest.finetune.end_loss == reloaded_loss(path, asked)
    with pytest.raises(UsageError, match="`rank`: the artifact has a trained adapter"):
        job(base, folder, tmp_path / "no", rank=4)
    fresh = job(base, folder, tmp_path / "no", fresh=True, rank=4)
    assert (fresh.plan.start, fresh.adapter.rank, fresh.plan.linears) == ("fresh", 4, 21)
    with pytest.raises(UsageError, match="`fresh`: the artifact has no adapter"):
        job(made(folder, "rtn"), folder, tmp_path / "no", fresh=True)
    with pytest.raises(UsageError, match="no packed layer is called 'x_proj'"):
        job(made(folder, "rtn"), folder, tmp_path / "no", targets=("q_proj", "x_proj"))


@pytest.mark.parametrize("task", task_names())
def test_every_recipe_runs_a_step(folder: Path, tmp_path: Path, task: str) -> None:
    recipe = load_task(task)
    assert recipe.source
    assert recipe.name == task
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [{"question": f"{n} and 1?", "answer": f"It is #### {n + 1}"} for n in range(6)])
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 200)
    options: dict[str, Any] = {"data": (str(text if task == "wikitext2" else data),), "sequence_length": 250}
    options |= {"samples": 2, "validation_samples": 1, "epochs": 1, "rank": 2, "device": "cpu", "offline": True}
    asked = prepare(str(made(folder, "rtn")), recipe, {**options, "out": tmp_path / "ft"}, Silent())
    manifest = finetune(asked)[1]
    learnt = manifest.finetune
    assert learnt is not None
    expected = {"gsm8k": "gsm8k", "wikitext2": None, "instructions": "chat"}.get(task, "alpaca")
    assert (learnt.task, learnt.steps, learnt.template) == (task, 1, expected)
    given = recipe.options
    assert asked.request.adapter_lr == given["adapter_lr"]
    assert asked.adapter.alpha == given["alpha"]
    assert asked.adapter.dropout == given["dropout"]


def test_files_are_copied_where_they_cannot_be_linked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(finetuned.os, "link", refuse)
    base = made(folder, "rtn")
    path, _ = finetune(job(base, folder, tmp_path / "ft", rank=1, epochs=1, samples=4))
    assert shards(path) == shards(base)
    assert not (path / "model-outer.safetensors").samefile(base / "model-outer.safetensors")


def test_what_cannot_be_trained_is_a_sentence_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "ft"
    with pytest.raises(InputError, match="no quantized artifact, and there is nothing to fine-tune"):
        job(folder / "m", folder, out)
    with pytest.raises(InputError, match="mixes its scales for every token"):
        job(made(folder, "binary-mos"), folder, out, dora=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        job(made(folder, "rtn"), folder, out, data=(str(bad),))
    hurt = shutil.copytree(made(folder, "apiq"), tmp_path / "hurt")
    block = hurt / "model-block-00001.safetensors"
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    with pytest.raises(InputError, match=r"model-block-00001\.safetensors' was changed after"):
        job(hurt, folder, out)
    shutil.rmtree(hurt / "adapter")
    with pytest.raises(InputError, match=r"adapter_config\.json' is missing"):
        job(hurt, folder, out)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bad.jsonl", "hurt"]


def test_numbers_that_are_not_finite_end_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(made(folder, "rtn"), folder, tmp_path / "ft", rank=2)
    load = finetune_run._load

    def broken(some: FinetuneJob) -> Any:
        model = load(some)
        with torch.no_grad():
            model.get_submodule("base_model.model.model.norm").weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(finetune_run, "_load", broken)
    with pytest.raises(NumericsError, match="held-out answers is not finite") as caught:
        finetune(asked)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ulbq.finetuning.trainer.write_shard", full)
    with pytest.raises(ResourceError, match="The disk is full") as caught:
        finetune(job(made(folder, "rtn"), folder, tmp_path / "ft", rank=1))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ft").exists()


def test_a_manifest_without_the_record_is_still_read(folder: Path) -> None:
    manifest = json.loads((made(folder, "rtn") / "manifest.json").read_text())
    del manifest["finetune"]
    assert QuantizedManifest.model_validate(manifest).finetune is None

"""Settings of single layers: by a plan's patterns, or given out from one budget of bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import save_tiny
from tests.pipeline.runs import logits, request, simulated_logits
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.config.convert import ConvertRequest
from ulbq.errors import InputError, UsageError
from ulbq.export import engines
from ulbq.export.fit import Candidate
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.layer_plan import check_plan_file, read_plan, write_plan
from ulbq.pipeline.quantize import plan, quantize

PLAN = "mlp.down_proj: {bits: 4, group_size: 64}\nlayers.1: {group_size: 16}\nlayers.0.self_attn.o_proj: {skip: true}\n"
SIZE: dict[str, Any] = {"samples": 4, "sequence_length": 16, "precision": "fp32"}
TRAINED = {**SIZE, "epochs": 1, "batch_size": 2}
END = {"end_to_end": "kl", "end_to_end_epochs": 1}


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "parent", tied=True)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return str(path)


def settings(manifest: QuantizedManifest) -> dict[str, tuple[int, int]]:
    return {one.name[13:]: (one.scheme["bits"], one.scheme["group_size"]) for one in manifest.layers}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {}),
        ("gptq", SIZE),
        ("efficientqat", {**TRAINED, **END}),
        ("efficientqat", {**TRAINED, "start": "gptq"}),
        ("apiq", {**TRAINED, "rank": 4}),
    ],
)
def test_every_layer_gets_what_the_plan_says(
    method: str, options: dict[str, Any], parent: Path, file: str, samples: Path, tmp_path: Path
) -> None:
    own = {} if method == "rtn" else {"calibration": str(samples)}
    asked = request(parent, tmp_path / "q", method=method, bits=2, group_size=32, plan=file, **options, **own)
    planned = plan(asked)
    path, manifest = quantize(asked)
    found = settings(manifest)
    assert found["0.self_attn.q_proj"] == (2, 32)
    assert found["0.mlp.down_proj"] == (4, 64)
    assert found["1.self_attn.q_proj"] == (2, 16)
    assert found["1.mlp.down_proj"] == (4, 16)  # the later pattern wins, setting by setting
    assert "0.self_attn.o_proj" not in found
    assert manifest.bits.bits_per_weight == pytest.approx(planned.bits_per_weight)
    assert not any("of the weights in the blocks" in said for said in manifest.warnings)
    if method != "apiq":
        torch.testing.assert_close(logits(path), simulated_logits(parent, path), atol=1e-4, rtol=1e-4)


def test_widths_of_a_trellis(samples: Path, tmp_path: Path) -> None:
    parent = save_tiny("llama", tmp_path / "parent")
    file = tmp_path / "plan.yaml"
    file.write_text("v_proj: {bits: 4}")
    asked = request(parent, tmp_path / "q", method="trellis", plan=str(file), calibration=str(samples), **SIZE)
    _, manifest = quantize(asked)
    bits = {one.name.rpartition(".")[2]: one.scheme["bits"] for one in manifest.layers}
    assert (bits["v_proj"], bits["q_proj"]) == (4, 2)


def test_what_is_written_is_what_was_planned_and_made(parent: Path, file: str, tmp_path: Path) -> None:
    options = {"method": "rtn", "bits": 2, "group_size": 32}
    planned = plan(request(parent, tmp_path / "q", plan=file, **options))
    write_plan(tmp_path / "planned.yaml", planned)
    first, manifest = quantize(request(parent, tmp_path / "q", plan=file, **options))
    write_plan(tmp_path / "made.yaml", planned, manifest.layers)
    assert (tmp_path / "planned.yaml").read_text() == (tmp_path / "made.yaml").read_text()
    second, again = quantize(request(parent, tmp_path / "again", plan=str(tmp_path / "made.yaml"), **options))
    assert settings(again) == settings(manifest)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize(
    ("text", "method", "error", "said"),
    [
        ("nowhere: {bits: 4}", "rtn", InputError, "'nowhere' matches no linear layer"),
        ("q_proj: {bits: 5}", "rtn", InputError, r"q_proj\.bits: input should be"),
        ("q_proj: {bits: true}", "rtn", InputError, r"q_proj\.bits: input should be a number"),
        ("q_proj: {widths: 5}", "rtn", InputError, r"q_proj\.widths: extra inputs"),
        ("q_proj: {bits: 4}\nq_proj: {group_size: 32}", "rtn", InputError, "it has 'q_proj' twice"),
        ("q_proj:", "rtn", InputError, "'q_proj' has no map of settings"),
        ("q_proj: {group_size: 0}", "rtn", UsageError, "makes no groups"),
        ("- q_proj", "rtn", InputError, "no map of patterns"),
        ("q_proj: [", "rtn", InputError, "cannot be read"),
        (
            "q_proj: {bits: 4}",
            "db-llm",
            UsageError,
            "`bits` of 'model.layers.0.self_attn.q_proj' means nothing to dual",
        ),
    ],
)
def test_what_is_no_plan_is_refused(
    text: str, method: str, error: type[Exception], said: str, parent: Path, samples: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    more = {} if method == "rtn" else {"calibration": str(samples)}
    with pytest.raises(error, match=said):
        plan(request(parent, tmp_path / "q", method=method, plan=str(file), **more))


def test_a_group_size_of_a_plan_that_does_not_divide_names_the_plan(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("mlp: {group_size: 48}")
    with pytest.raises(InputError, match="groups of 48 do not divide") as refused:
        plan(request(parent, tmp_path / "q", method="rtn", group_size=32, plan=str(tmp_path / "plan.yaml")))
    assert "in the plan" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", "is no file"),
        ("nowhere/plan.yaml", "is in no folder"),
        ("text.txt", "exists and is no plan"),
        ("q", "is the artifact"),
        ("q/plan.yaml", "lies in it"),
        ("plan.yaml", None),
        ("empty.yaml", None),
        ("new.yaml", None),
    ],
)
def test_where_a_plan_cannot_be_written_is_said_before_the_run(
    name: str, said: str | None, file: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Not to be lost.")
    (tmp_path / "empty.yaml").touch()
    if said is None:
        return check_plan_file(tmp_path / name, tmp_path / "q")
    with pytest.raises(InputError, match=said):
        check_plan_file(tmp_path / name, tmp_path / "q")


def test_an_artifact_is_gone_on_from_with_its_widths(parent: Path, file: str, samples: Path, tmp_path: Path) -> None:
    options = {"method": "efficientqat", "bits": 2, "group_size": 32, "calibration": str(samples), **TRAINED}
    first, before = quantize(request(parent, tmp_path / "q", plan=file, **options))
    _, after = quantize(request(first, tmp_path / "again", **options))
    assert settings(after) == settings(before)
    with pytest.raises(UsageError, match="`plan` means nothing to an artifact"):
        plan(request(first, tmp_path / "other", plan=file, **options))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {"saliency": "none"}),
        ("gptq", {}),
        ("efficientqat", {"epochs": 1}),
        ("apiq", {"epochs": 1, "adapter": False}),
    ],
)
def test_a_budget_is_kept_and_spent(
    method: str, options: dict[str, Any], parent: Path, samples: Path, tmp_path: Path
) -> None:
    asked = request(
        parent,
        tmp_path / "q",
        **{"method": method, "bits": 2, "group_size": 64, "target_bits": 3.1, "calibration": str(samples)},
        **SIZE,
        **options,
    )
    planned = plan(asked)
    _, manifest = quantize(asked)
    assert planned.bits_per_weight == 3.1
    assert 2.9 < manifest.bits.bits_per_weight <= 3.1
    found = settings(manifest)
    assert len({bits for bits, _ in found.values()}) > 1
    for block in range(3):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            part = "self_attn" if "q_proj" in names else "mlp"
            assert len({found[f"{block}.{part}.{name}"] for name in names}) == 1  # engines make one layer of them


def test_a_budget_below_what_a_plan_takes_is_refused(parent: Path, samples: Path, tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text("layers: {group_size: 16}")
    asked = {"method": "gptq", "bits": 2, "group_size": 64, "calibration": str(samples), **SIZE}
    with pytest.raises(UsageError, match=r"`target_bits=3.1` is less than the 3\.1[0-9] bits"):
        plan(request(parent, tmp_path / "q", target_bits=3.1, plan=str(tmp_path / "groups.yaml"), **asked))


@pytest.mark.parametrize("settings", ["", "{}", "false", "[]", "{bits: null}"])
def test_a_pattern_of_which_nothing_is_said_is_refused(settings: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"q_proj: {settings}")
    with pytest.raises(InputError, match="The plan"):
        read_plan(str(tmp_path / "plan.yaml"))


def test_a_budget_is_no_part_of_a_dry_run(parent: Path, samples: Path, tmp_path: Path) -> None:
    asked = request(parent, tmp_path / "q", method="gptq", bits=2, target_bits=3.1, calibration=str(samples), **SIZE)
    with pytest.raises(UsageError, match="known only after a look"):
        write_plan(tmp_path / "plan.yaml", plan(asked))
    file = tmp_path / "bits.yaml"
    file.write_text("q_proj: {bits: 4}")
    with pytest.raises(UsageError, match="gives out the bits that the plan gives"):
        plan(asked.model_copy(update={"plan": str(file)}))


def test_engines_take_several_widths_or_say_why_not(parent: Path, tmp_path: Path) -> None:
    """Layers that an engine fuses have one width here; `transformers` reads any."""
    for text, taken in (("mlp.down_proj: {bits: 8}", True), ("q_proj: {bits: 8}", False)):
        file = tmp_path / "plan.yaml"
        file.write_text(text)
        out = tmp_path / f"q{taken}"
        folder, _ = quantize(request(parent, out, method="rtn", group_size=32, symmetric=True, plan=str(file)))
        into, sentence = engines.judge("vllm", Candidate.of(resolve(folder)))
        assert into.name == ("compressed-tensors" if taken else "dense")
        assert taken or "fuses q_proj, k_proj, v_proj" in sentence
        convert(ConvertRequest(source=str(folder), to="compressed-tensors", out=tmp_path / f"c{taken}"))
    assert read_plan(None) == {}

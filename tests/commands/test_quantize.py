"""The command ``quantize``: what it shows and refuses before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.models.tiny import save_tiny
from ulbq.commands.app import app, main
from ulbq.config.options import options
from ulbq.config.quantize import QuantizeRequest
from ulbq.methods import METHODS
from ulbq.pipeline import recipes

NO_REQUEST = {
    "recipe",
    "list_recipes",
    "settings",
    "help_all",
    "dry_run",
    "write_plan",
    "json",
    "quiet",
    "debug",
    "help",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("dense") / "m")


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file to calibrate on, which plans look for and do not read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()


def parameters() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands["quantize"].params}


def planned(capsys: pytest.CaptureFixture[str], source: Path, *words: str) -> dict[str, Any]:
    group = [] if {"binary-mos", "claq", "trellis"} & set(words) else ["--group-size", "32"]
    common = ["--calibration", "a.txt"] if "rtn" not in words else []
    arguments = ["quantize", str(source), *group, *common, "--device", "cpu", "--offline", "--dry-run", "--json"]
    assert main([*arguments, *words]) == 0
    request: dict[str, Any] = json.loads(capsys.readouterr().out)["request"]
    return request


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["quantize", "no-such-model", "--offline", "--dry-run", *words]) in {2, 3}
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_brackets_in_a_name_are_no_markup(tmp_path, capsys):
    source = save_tiny("llama", tmp_path / "m[")
    (tmp_path / "a[").mkdir()
    (tmp_path / "a[" / "red].txt").touch()
    words = ["quantize", str(source), "--group-size", "32", "--calibration", "a[/red].txt", "--device", "cpu"]
    assert main([*words, "--offline", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "m[: 3 blocks" in captured.err
    assert "a[/red].txt" in captured.err


def test_every_option_of_a_request_can_be_typed():
    assert parameters().keys() - NO_REQUEST == QuantizeRequest.model_fields.keys() - {"recipe"}


def test_every_method_can_be_chosen():
    [offered] = [option.offers for name, _, option in options(QuantizeRequest) if name == "method"]
    assert set(offered) == METHODS.keys()


def test_the_short_help_is_one_screen_and_says_where_the_rest_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["quantize", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 50
    assert all(len(line) <= 80 for line in short.splitlines())
    for name in (
        "--method",
        "--bits",
        "--group-size",
        "--preset",
        "--calibration",
        "--output",
        "--device",
        "--dry-run",
    ):
        assert f" {name} " in short
    assert "ulbq quantize [--method NAME] --help-all" in short
    assert "--weight-lr" not in short
    assert main(["quantize", "--help-all"]) == 0
    whole = capsys.readouterr().out
    flags = {flag for one in parameters().values() for flag in (*one.opts, *one.secondary_opts) if flag[0] == "-"}
    assert [flag for flag in flags if flag not in whole] == []


@pytest.mark.parametrize("words", [["--method", "gptq", "--help-all"], ["--help-all", "-m", "gptq"]])
def test_a_methods_help_leaves_out_what_it_does_not_take(words, capsys):
    assert main(["quantize", *words]) == 0
    shown = capsys.readouterr().out
    assert "--damping" in shown
    assert "--output" in shown
    for flag in ("--epochs", "--rank", "--lambda", "--experts", "--allocation", "--end-to-end"):
        assert flag not in shown


def test_any_option_can_be_set_by_its_name(source, capsys):
    words = ["--set", "training.weight_lr=1e-5", "--set", "rank=8", "--set", "targets=[q_proj]", "--method", "apiq"]
    request = planned(capsys, source, *words, "--set", "stages=[{name: mixed, epochs: 2}]", "--set", "refit=null")
    assert (request["weight_lr"], request["rank"], request["targets"]) == (1e-5, 8, ["q_proj"])
    assert request["epochs"] == 2
    assert "no option 'rnk'" in refused(capsys, "--set", "rnk=8")
    assert "Did you mean rank?" in refused(capsys, "--set", "rnk=8")
    assert "given twice" in refused(capsys, "--method", "apiq", "--rank", "4", "--set", "rank=8")
    assert "cannot be read" in refused(capsys, "--set", "rank=[")
    assert "has no value" in refused(capsys, "--set", "rank")
    assert "--seed belongs to one run" in refused(capsys, "--set", "seed=3")


def test_what_is_typed_reaches_the_request(source, capsys):
    request = planned(
        capsys,
        source,
        *("--method", "ulb-sapr", "--bits", "3", "--rank", "8", "--dora", "--targets", "q_proj, v_proj"),
        *("--stage", "wpt:epochs=2,adapter-lr=0.01", "--stage", "opt:epochs=1", "--lambda", "0.25"),
        *("--penalize", "after-adapter", "--saliency", "wanda", "--end-to-end", "kl", "--teacher", "cached"),
    )
    dad = planned(capsys, source, "--end-to-end", "dad", "--dad-gamma", "0.25")
    assert (dad["end_to_end_gamma"], dad["end_to_end_hidden_weight"]) == (0.25, None)
    hidden = planned(capsys, source, "--end-to-end", "kl-hidden", "--hidden-weight", "10")
    assert (hidden["end_to_end_gamma"], hidden["end_to_end_hidden_weight"]) == (None, 10)
    assert request["targets"] == ["q_proj", "v_proj"]
    assert [(stage["name"], stage["epochs"]) for stage in request["stages"]] == [("wpt", 2), ("opt", 1)]
    assert (request["penalty"], request["penalize"], request["saliency"]) == (0.25, "after-adapter", "wanda")
    assert (request["epochs"], request["bits"], request["rank"], request["dora"]) == (3, 3, 8, True)
    assert (request["end_to_end"], request["teacher"], request["teacher_top_k"]) == ("kl", "cached", 64)


def test_the_plan_tells_the_rotation(source, capsys):
    for method in METHODS:
        assert planned(capsys, source, "--method", method)["rotate"] is False
        assert planned(capsys, source, "--method", method, "--rotate", "--seed", "3")["rotate"] is True
    words = ["quantize", str(source), "--method", "rtn", "--group-size", "32", "--device", "cpu", "--dry-run"]
    assert main([*words, "--no-rotate"]) == 0
    assert "rotation" not in capsys.readouterr().err
    assert main([*words, "--rotate", "--seed", "3"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "rotation residual stream (Hadamard 64), values (Hadamard 16 a head), seed 3" in told


def test_a_recipe_fills_in_what_is_not_typed(source, capsys):
    request = planned(capsys, source, "--recipe", "apiq-w2", "--rank", "8", "--samples", "4", "--sequence-length", "32")
    shipped = recipes.load("apiq-w2")
    assert (request["method"], request["bits"], request["epochs"]) == ("apiq", 2, 20)
    assert (request["rank"], request["samples"]) == (8, 4)
    assert request["recipe"] == {"name": "apiq-w2", "sha256": shipped.sha256}
    assert planned(capsys, source)["method"] == "db-llm"


def test_the_plan_tells_the_stages_own_lambda(source, capsys):
    words = ["quantize", str(source), "--group-size", "32", "--calibration", "a.txt", "--device", "cpu", "--offline"]
    words += ["--dry-run", "--method", "ulb-sapr"]
    assert main([*words, "--stage", "mixed:epochs=1,penalty=0.5"]) == 0
    assert "saliency fisher, stage mixed:epochs=1,penalty=0.5" in capsys.readouterr().err
    assert main([*words, "--stage", "wpt:epochs=1", "--stage", "mixed:epochs=1,penalty=0.5"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "saliency fisher, stage wpt:epochs=1, mixed:epochs=1,penalty=0.5, lambda 0.03" in told


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_of_every_method_tells_what_it_does(method, source, capsys):
    trains = method not in {"rtn", "gptq", "trellis"}
    more = ["--rank", "8", "--lambda", "0.5", "--adapter"] if trains and method != "binary-mos" else []
    more += ["--epochs", "1"] if method == "claq" else []
    planned(capsys, source, "--method", method, *more)
    words = ["quantize", str(source), "--method", method, "--device", "cpu", "--offline", "--dry-run", *more]
    words += [] if method == "rtn" else ["--calibration", "a.txt"]
    words += ["--train-weights"] if trains and method != "efficientqat" else []
    words += [] if method in {"binary-mos", "claq", "trellis"} else ["--group-size", "32"]
    assert main(words) == 0
    told = capsys.readouterr().err
    assert f"{method}, " in told
    assert ("training" in told) == trains
    assert ("damping" in told) == (method in {"gptq", "claq", "trellis"})
    assert ("rank 8" in told) == bool(more)
    assert ("lambda 0.5" in told) == bool(more)
    assert "None" not in told


def test_the_plan_tells_what_of_a_block_trains(source, capsys):
    words = ["quantize", str(source), "--method", "efficientqat", "--device", "cpu", "--offline", "--dry-run"]
    more = ["--train", "rounding", "--start", "gptq", "--optimizer", "sign"]
    assert main([*words, "--calibration", "a.txt", "--group-size", "32", *more]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "start gptq" in told
    assert "optimizer sign, train rounding" in told


def test_the_plan_of_a_budget_tells_who_shares_it(source, capsys):
    words = ["quantize", str(source), "--method", "claq", "--device", "cpu", "--offline", "--dry-run", "--calibration"]
    assert main([*words, "a.txt", "--target-bits", "4.3", "--allocation", "global", "--saliency", "fisher"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "4.300 bits per weight" in told
    assert "epochs" not in told  # nothing trains unless it is asked for
    assert "target bits 4.3, allocation global" in told
    assert "saliency fisher" in told
    assert main([*words, "a.txt", "--target-bits", "2.32", "--outlier-bits", "0.12", "--as-published"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "target bits 2.32, allocation outlier, outlier bits 0.12, no-refit, as-published" in told
    assert "token weighting uniform" in told


def test_the_recipes_are_listed_on_standard_output(capsys):
    assert main(["quantize", "--list-recipes"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    for name in recipes.names():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert recipes.load(name).options["method"] in line
        assert recipes.load(name).description in line
    assert captured.err == ""


def test_what_does_not_exist_is_a_sentence_with_a_hint(capsys, tmp_path):
    assert "Did you mean" in refused(capsys, "--recipe", "apiq-w22")
    assert "no recipe file" in refused(capsys, "--recipe", str(tmp_path / "x.yaml"))
    assert "no stage" in refused(capsys, "--method", "ulb-sapr", "--stage", "wtp:epochs=1")
    assert "names no layer" in refused(capsys, "--method", "apiq", "--targets", ",")
    assert "means nothing to --method rtn" in refused(capsys, "--method", "rtn", "--rank", "4")
    assert "means nothing without --adapter" in refused(capsys, "--method", "apiq", "--no-adapter", "--rank", "4")
    assert "is no size" in refused(capsys, "--activation-memory", "much")
    assert "more than any machine" in refused(capsys, "--activation-memory", "9" * 400 + "G")

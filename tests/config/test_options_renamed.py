"""What an option was called before is still read: as a flag, by ``--set``, in recipes, stages and requests on disk."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.told import Ulbq
from ulbq.config.finetune import FinetuneOptions, FinetuneRequest
from ulbq.config.options import Count, Option, Settings, former_names, options, renamed
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.stages import Stage
from ulbq.errors import UsageError
from ulbq.pipeline import recipes, tasks

GOLDEN = Path(__file__).parents[1] / "golden" / "artifacts"


class Toy(Settings):
    """One option that was renamed twice."""

    sweetness: Annotated[Count, Option("How sweet the toy is.", formerly=("sugar", "honey"))] = 3


class Sweeter(Toy):
    """Declares it anew."""

    sweetness: Count = 5


@pytest.mark.parametrize("kind", [Toy, Sweeter])
def test_one_word_on_the_field_is_all(kind: type[Toy]) -> None:
    assert [kind.model_validate({name: 7}).sweetness for name in ("sweetness", "sugar", "honey")] == [7, 7, 7]
    assert renamed(kind, {"honey": 1, "other": 2}) == {"sweetness": 1, "other": 2}
    assert kind.model_validate({"sugar": 7}).model_dump() == {"sweetness": 7}


@pytest.mark.parametrize("names", [("sweetness", "sugar"), ("sugar", "sweetness"), ("sugar", "honey")])
def test_two_names_of_one_option_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="`sweetness` is given twice"):
        Toy.model_validate(dict.fromkeys(names, 1))


def test_other_names_are_refused_as_ever() -> None:
    with pytest.raises(ValidationError, match="salt"):
        Toy.model_validate({"salt": 1})


@pytest.mark.parametrize("request_class", [QuantizeRequest, FinetuneRequest, FinetuneOptions])
def test_names_of_before_are_nobodys_today(request_class: type[BaseModel]) -> None:
    former = former_names(request_class)
    assert {"scale_rate", "adapter_decay"} <= former.keys()
    assert former.keys().isdisjoint(request_class.model_fields)
    declared = [old for _, _, option in options(request_class) for old in option.formerly]
    assert len(declared) == len(set(declared))


@pytest.mark.parametrize("name", ["adapted", "finetuned"])
def test_requests_on_disk_are_read(name: str) -> None:
    stored: dict[str, Any] = json.loads((GOLDEN / name / "manifest.json").read_text())["request"]
    request_class = FinetuneRequest if "task" in stored else QuantizeRequest
    read = request_class.model_validate(stored)
    for old, today in former_names(request_class).items():
        if old in stored:
            assert getattr(read, today) == stored[old]
    assert read.scale_lr == stored["scale_rate"]
    assert "scale_rate" not in read.model_dump()


def test_stages_as_they_were_typed_and_stored() -> None:
    options = {"stages": ["wpt:epochs=1,scale-rate=0.5,adapter-decay=0.25"], "method": "ulb-sapr"}
    (typed,) = QuantizeRequest.model_validate(options).stages
    assert (typed.scale_lr, typed.adapter_weight_decay) == (0.5, 0.25)
    assert str(typed) == "wpt:epochs=1,scale-lr=0.5,adapter-weight-decay=0.25"
    assert Stage.model_validate({"name": "wpt", "epochs": 1, "scale_rate": 0.5, "adapter_decay": 0.25}) == typed
    with pytest.raises(UsageError, match="twice"):
        QuantizeRequest.model_validate({**options, "stages": ["wpt:epochs=1,scale-rate=0.5,scale-lr=0.5"]})


def test_recipes_and_tasks_of_before(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("options: {method: apiq, weight_rate: 0.5, end_to_end: ce, accumulation: 3, end_to_end_rate: 2}\n")
    request = recipes.request_of({"norm_rate": 0.25}, recipes.load(str(file)))
    assert (request.weight_lr, request.gradient_accumulation) == (0.5, 3)
    assert (request.norm_lr, request.end_to_end_lr_factor) == (0.25, 2)
    # What is typed wins, whatever either was called.
    assert recipes.request_of({"weight_lr": 0.75}, recipes.load(str(file))).weight_lr == 0.75
    file.write_text("{name: x, description: x, source: x, options: {heldout: 5, adapter_rate: 0.5, data: a.jsonl}}\n")
    asked = tasks.request_of("q", tasks.load_task(str(file)), {"adapter_decay": 0.5}, adapted=False)
    assert (asked.validation_samples, asked.adapter_lr, asked.adapter_weight_decay) == (5, 0.5, 0.5)


def test_flags_of_before(ulbq: Ulbq) -> None:
    words = [
        "quantize",
        GOLDEN / "dense",
        "--method",
        "apiq",
        "--group-size",
        32,
        "--calibration",
        "self",
        "--device",
        "cpu",
    ]
    words += [
        "--epochs",
        1,
        "--weight-rate",
        0.5,
        "--adapter-decay=0.25",
        "--set",
        "norm_rate=0.75",
        "--dry-run",
        "--json",
    ]
    request = json.loads(ulbq(*words).out)["request"]
    assert (request["weight_lr"], request["adapter_weight_decay"], request["norm_lr"]) == (0.5, 0.25, 0.75)
    assert "--weight-rate" not in ulbq("quantize", "--help-all").out
    twice = ulbq(*words, "--set", "weight_rate=1")
    assert "--weight-lr is given twice" in twice.refused(2)


def test_a_value_that_looks_like_a_flag_of_before_stays(ulbq: Ulbq) -> None:
    words = ["quantize", GOLDEN / "dense", "--method", "rtn", "--output", "--weight-rate", "--dry-run", "--json"]
    assert json.loads(ulbq(*words).out)["request"]["out"] == "--weight-rate"


def test_flags_of_before_of_finetuning(ulbq: Ulbq) -> None:
    words = ["finetune", GOLDEN / "affine", "--task", "end-to-end", "--data", "self", "--samples", 4, "--device", "cpu"]
    words += ["--sequence-length", 16, "--rate", 0.5, "--accumulation", 3, "--scale-rate", 0.25, "--dry-run", "--json"]
    request = json.loads(ulbq(*words).out)["request"]
    assert (request["end_to_end_lr_factor"], request["gradient_accumulation"], request["scale_lr"]) == (0.5, 3, 0.25)
    said = ulbq("finetune", GOLDEN / "affine", "--task", "gsm8k", "--rate", 0.5)
    assert "--lr-factor means nothing to --task gsm8k" in said.refused(2)

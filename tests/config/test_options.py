"""Every setting is declared once: what a field says is all that commands, recipes, plans and manifests know of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from tests.models.tiny import save_tiny
from ulbq.config.convert import ConvertRequest
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.finetune import FinetuneOptions, FinetuneRequest
from ulbq.config.generate import GenerateRequest
from ulbq.config.methods import METHOD_OPTIONS
from ulbq.config.options import SECTIONS, Count, Option, bare, options, read_size, typed, words
from ulbq.config.quantize import QuantizeRequest, default_words
from ulbq.config.saliency import SaliencyRequest
from ulbq.config.training import TrainSettings
from ulbq.errors import UsageError
from ulbq.methods import METHODS

REQUESTS = (QuantizeRequest, SaliencyRequest, EvaluateRequest, GenerateRequest, ConvertRequest, FinetuneRequest)
# What a command names itself.
BY_HAND = {"source", "sources", "recipe", "prompt", "task"}

# A method of one option beside rtn's, registered before a request is put together; then commands, one after the other.
TOY = """
import json
import sys
from typing import Annotated, ClassVar
from ulbq.config import methods
from ulbq.config.options import Count, Option

class ToyOptions(methods.RtnOptions):
    sweetness: Annotated[Count, Option("How sweet the toy is.", "Format", "N")] = 3

methods.METHOD_OPTIONS["toy"] = ToyOptions

from ulbq.methods import METHODS
from ulbq.methods.rtn import Rtn

class Toy(Rtn):
    name: ClassVar[str] = "toy"
    Options: ClassVar[type[methods.MethodOptions]] = ToyOptions

METHODS["toy"] = Toy

from ulbq.commands.app import main

for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.write(chr(12))
        stream.flush()
"""


def toy(*commands: list[str]) -> tuple[list[str], list[str]]:
    """What commands wrote to standard output, and to standard error."""
    words = [sys.executable, "-c", TOY, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.split(chr(12)), done.stderr.split(chr(12))


def test_a_new_option_is_one_field(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "m")
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("options: {method: toy, group_size: 32, sweetness: 5}\n")
    run = ["quantize", str(source), "--recipe", str(recipe)]
    given = {"flag": ["--sweetness", "7"], "set": ["--set", "sweetness=7"]}
    (of_toy, of_rtn, planned, *_), (_, _, told, *_) = toy(
        ["quantize", "--method", "toy", "--help-all"],
        ["quantize", "--method", "rtn", "--help-all"],
        [*run, "--dry-run", "--json"],
        *([*run, *words, "-o", str(tmp_path / name), "-q"] for name, words in given.items()),
    )
    assert "--sweetness N" in of_toy
    assert " ".join(["How", "sweet", "the", "toy", "is.", "[default:", "3]"]) in " ".join(of_toy.split())
    assert "--sweetness" not in of_rtn
    assert "sweetness 5" in told
    assert json.loads(planned)["request"]["sweetness"] == 5
    for name in given:
        assert json.loads((tmp_path / name / "manifest.json").read_text())["request"]["sweetness"] == 7


@pytest.mark.parametrize("request_class", REQUESTS, ids=lambda one: one.__name__)
def test_every_field_says_what_it_is(request_class: type[BaseModel]) -> None:
    found = {name: option for name, _, option in options(request_class)}
    assert request_class.model_fields.keys() - found.keys() <= BY_HAND
    assert all(option.section in SECTIONS for option in found.values())


def test_methods_and_what_they_take_have_the_same_names() -> None:
    assert METHODS.keys() == METHOD_OPTIONS.keys()
    assert all(METHODS[name].Options is taken for name, taken in METHOD_OPTIONS.items())


def test_an_option_that_is_declared_anew_keeps_its_words_and_kind() -> None:
    for taken in METHOD_OPTIONS.values():
        for name, field, _ in options(taken):
            kind = str(bare(field)[0])
            own = str(bare(taken.model_fields[name])[0])
            assert kind == own or own.startswith("typing.Literal"), name


def test_the_defaults_of_all_methods_are_told() -> None:
    declared = {name: option for name, _, option in options(QuantizeRequest)}
    told = {name: default_words(name, option) for name, option in declared.items()}
    assert told["weight_lr"] == "0.015; 0.02 for apiq and ulb-sapr; 0.09 for binary-mos; 0.006 for trellis"
    assert told["adapter"] == "no-adapter; adapter for apiq and ulb-sapr"
    assert told["epochs"] == "preset; 0 for claq and trellis"
    assert told["bits"] == "2; 1 for binary-mos; 4 for gptq and rtn"
    for method, taken in METHOD_OPTIONS.items():
        for name in TrainSettings.model_fields.keys() & taken.taken() - {"epochs", "micro_batch"}:
            general, *others = told[name].split("; ")
            own = [other.partition(" for ")[0] for other in others if method in other.split(" ")]
            assert (own or [general])[0] == words(name, declared[name], taken.model_fields[name].default)


def test_what_is_typed_for_finetuning_is_a_field_of_what_it_asks_for() -> None:
    from ulbq.config.finetune import END_TO_END_NAMES, OF_END_TO_END, OF_TASKS

    names = FinetuneOptions.model_fields.keys()
    assert names - OF_END_TO_END.keys() <= FinetuneRequest.model_fields.keys()
    assert {END_TO_END_NAMES.get(name, name) for name in names - OF_TASKS} <= QuantizeRequest.model_fields.keys()
    assert not OF_TASKS & OF_END_TO_END.keys()


def test_switches_and_several_values_are_shown_as_they_are_typed() -> None:
    declared = {name: option for name, _, option in options(QuantizeRequest)}
    assert words("dora", declared["dora"], True) == "dora"
    assert words("dora", declared["dora"], False) == "lora"
    assert words("refit", declared["refit"], False) == "no-refit"
    assert words("targets", declared["targets"], ("q_proj", "v_proj")) == "q_proj, v_proj"
    assert typed("out", declared["out"], switch=False) == ("--output", "-o")


def test_metadata_is_found_inside_none() -> None:
    class Settings(BaseModel):
        count: Annotated[Count, Option("A count.")] | None = None

    [(name, field, option)] = options(Settings)
    assert (name, bare(field)[0], option.help) == ("count", int, "A count.")


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("4K", 4096), ("512M", 512 << 20), ("1.5GiB", 3 << 29), (7, 7)]
)
def test_sizes_are_read(text: Any, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["much", "-1", "9" * 400 + "G", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        read_size(text)


@pytest.mark.parametrize("name", ["bits", "samples", "damping", "calibration"])
def test_a_switch_is_no_number(name: str) -> None:
    """YAML's ``true``, ``yes`` and ``on`` were taken for 1."""
    with pytest.raises(UsageError, match=f"`{name}` wants a value, not true"):
        QuantizeRequest.model_validate({"method": "gptq", name: True})
    assert QuantizeRequest.model_validate({"method": "gptq", "symmetric": True}).symmetric

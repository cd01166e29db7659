"""Recipes: the shipped ones hold, files are read or refused in a sentence, and what is typed wins."""

import hashlib
from pathlib import Path

import pytest

from ulbq.config.quantize import check_options, resolve
from ulbq.config.stages import Stage
from ulbq.errors import InputError, UlbqError, UsageError
from ulbq.pipeline import recipes
from ulbq.pipeline.quantization_plan import build_method


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_a_request(name: str) -> None:
    recipe = recipes.load(name)
    request = recipes.request_of({}, recipe)
    check_options(request)
    full = resolve(request, "quick").record
    build_method(full)
    # Every value it names is in effect: none is dropped, none is overwritten by a default.
    kept = full.model_dump(mode="json", include=set(recipe.options))
    assert kept == request.model_dump(mode="json", include=set(recipe.options))
    assert recipe.options["bits"] == full.bits
    assert recipe.description
    assert recipe.source
    assert full.recipe is not None
    assert full.recipe.name == name


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_calls_itself_by_its_files_name(name: str) -> None:
    text = Path(recipes.__file__).parents[1].joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"name: {name}\n")


def test_the_published_values_are_in_them() -> None:
    apiq = recipes.request_of({}, recipes.load("apiq-w2"))
    assert (apiq.rank, apiq.alpha, apiq.adapter_lr, apiq.adapter_weight_decay) == (64, 16, 5e-4, 0.1)
    assert (apiq.epochs, apiq.batch_size, apiq.samples, apiq.sequence_length) == (20, 1, 128, 2048)
    assert apiq.train_weights is False
    sapr = recipes.request_of({}, recipes.load("ulb-sapr-w2"))
    assert sapr.penalty == 0.1
    assert sapr.stages == (Stage(name="wpt", epochs=15), Stage(name="opt", epochs=5))
    mixed = recipes.request_of({}, recipes.load("ulb-sapr-mixed"))
    assert mixed.penalty == 1e-3
    assert (sapr.saliency_power, mixed.saliency_power) == (1, 1)
    assert recipes.request_of({}, recipes.load("binary-mos")).end_to_end_hidden_weight == 10


def test_what_is_typed_wins(tmp_path: Path) -> None:
    mine = recipes.load(write(tmp_path, "options: {method: apiq, bits: 3, rank: 8, epochs: 7, samples: 9}"))
    request = recipes.request_of({"bits": 2, "rank": None, "seed": 4}, mine)
    assert (request.bits, request.rank, request.epochs, request.seed) == (2, 8, 7, 4)
    bare = recipes.request_of({"adapter": False}, mine)
    assert bare.rank is None
    check_options(bare)
    best = recipes.request_of({"preset": "best"}, mine)
    assert (best.samples, best.epochs) == (None, None)


def test_typed_stages_and_epochs_win_over_the_recipes(tmp_path: Path) -> None:
    sapr = recipes.load("ulb-sapr-w2")
    stages = [{"name": "mixed", "epochs": 3}]
    request = resolve(recipes.request_of({"stages": stages}, recipes.load("apiq-w2")), "quick").record
    assert (request.epochs, request.stages) == (3, (Stage(name="mixed", epochs=3),))
    request = resolve(recipes.request_of({"epochs": 2}, sapr), "quick").record
    assert (request.epochs, request.stages, request.penalty) == (2, (), 0.1)
    # What they leave without a meaning goes too.
    request = recipes.request_of({"stages": [{"name": "opt", "epochs": 3}]}, sapr)
    assert (request.penalty, request.saliency, request.saliency_power) == (None, None, None)
    check_options(request)
    layers = recipes.request_of({"granularity": "layer"}, sapr)
    assert layers.norm_lr is None
    check_options(layers)
    frozen = recipes.request_of({"train_weights": False}, recipes.load("binary-mos"))
    assert frozen.end_to_end_train is None
    check_options(frozen)


def test_a_slip_in_a_recipe_is_refused_and_not_mended(tmp_path: Path) -> None:
    mine = recipes.load(write(tmp_path, "options: {method: apiq, adapter: false, rank: 8}"))
    with pytest.raises(UsageError, match="`rank` means nothing without `adapter`"):
        check_options(recipes.request_of({"bits": 3}, mine))


def test_the_record_is_the_contents_hash(tmp_path: Path) -> None:
    text = "name: x\noptions:\n  method: rtn\n"
    mine = recipes.load(write(tmp_path, text))
    record = recipes.request_of({}, mine).recipe
    assert record is not None
    assert record.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert record.name == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("options: {method: rtn, bist: 3}", "unknown option 'bist'", "bits"),
        ("optoins: {}\noptions: {method: rtn}", "unknown key 'optoins'", "options"),
        ("options: {method: rtn, seed: 3}", "'seed', which belongs to one run", "command line"),
        ("options: {bits: 3}", "names no method", "method"),
        ("options: {method: rtn, bits: 5}", "bits", "Mend"),
        ("options: {method: ulb-sapr, stages: [{name: wtp, epochs: 1}]}", "stages.0.name", "Mend"),
        ("options: [1, 2]", "is no recipe", "options"),
        ("just words", "is no recipe", "options"),
        ("options: {method: rtn", "is no YAML", "Mend"),
        ("\x00", "is no YAML", "Mend"),
        ("options: !!python/object/apply:os.getcwd []", "is no YAML", "Mend"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_a_sentence(text: str, said: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UlbqError, match=said) as refused:
        recipes.load(write(tmp_path, text))
    assert hint in refused.value.hint
    assert "\n" not in refused.value.message


def test_a_name_that_is_nearly_one_is_put_right() -> None:
    with pytest.raises(UsageError, match="no recipe 'apiq-w22'") as refused:
        recipes.load("apiq-w22")
    assert "apiq-w2" in refused.value.hint


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe file"):
        recipes.load(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="no text"):
        recipes.load(str(tmp_path / "binary.yaml"))


def test_the_recipes_are_shipped() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert "recipes/*.yaml" in project["tool"]["setuptools"]["package-data"]["ulbq"]
    assert len(recipes.shipped()) >= 10

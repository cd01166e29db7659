"""Small files that would keep a command busy without end: one sentence and exit code 3, before the work begins."""

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.strangers.conftest import edit_json, reseal
from tests.told import Ulbq
from ulbq import limits
from ulbq.errors import InputError

RTN = ("--method", "rtn", "--bits", "4", "-q")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    # A tenth of what users grant, for the sake of the tests' time.
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    start = time.process_time()
    yield
    if "slow" not in request.keywords:
        assert time.process_time() - start < 20  # seconds, setting up included


def in_a_gigabyte(work: Any) -> None:
    """Run work whose memory beyond what is held must stay below a gigabyte."""
    before = limits._resident()
    work()
    assert limits._resident() - before < 1 << 30


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "explodes": "{{ 'x' * 10 ** 12 }}",
    "grows": "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "raises": "{{ raise_exception('A system message is required') }}",
    "divides": "{{ 1 / 0 }}",
    "lacks": "{{ messages[7]['content'] }}",
    "is broken": "{% for %}",
    "is deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "is no text": "{{ messages.x.y.z }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_chat_templates(template: str, packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (packed / "chat_template.jinja").write_text(template)
    reseal(packed)
    told = ulbq("generate", packed, "--chat", "-p", "hi", "-n", "1", "-q")
    assert "chat template" in told.refused()
    assert "Leave out --chat" in told.err
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say", "output": "it"}\n' * 4)
    data = ("--data", tmp_path / "rows.jsonl", "--samples", 2, "--sequence-length", 64, "-o", tmp_path / "out")
    assert "chat template" in ulbq("finetune", packed, "--task", "instructions", *data).refused()
    assert not (tmp_path / "out").exists()


CONFIGS: dict[str, Any] = {
    "layers": {"num_hidden_layers": 10**9},
    "negative layers": {"num_hidden_layers": -(10**9)},
    "heads": {"num_attention_heads": 10**9},
    "width": {"hidden_size": 10**12},
    "head width": {"head_dim": 10**10},
    "vocabulary": {"vocab_size": 10**15},
    "digits": {"rms_norm_eps": 10**400},
    "nested": {"text_config": {"num_hidden_layers": 10**9}},
    "experts": {"num_local_experts": 10**8},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations(change: dict[str, Any], dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    edit_json(dense / "config.json", **change)
    in_a_gigabyte(lambda: ulbq("quantize", dense, *RTN, "-o", tmp_path / "q").refused())


def test_configurations_of_any_size_and_depth(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    path = dense / "config.json"
    whole = path.read_text()
    for spoilt in (
        whole[:-2] + ', "x": [' + "1," * (10**7) + "1]}",
        whole[:-2] + ', "x": ' + "[" * 90000 + "]" * 90000 + "}",
        whole[:-2] + ', "x": ' + "[" * 200 + "]" * 200 + "}",
        whole[:-2] + ', "x": ' + "1" * 5000 + "}",
    ):
        path.write_text(spoilt)
        in_a_gigabyte(lambda: ulbq("quantize", dense, *RTN, "-o", tmp_path / "q").refused())


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_settings_of_any_size(name: str, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    with (dense / name).open("ab") as file:
        file.truncate(limits.SETTINGS_SIZE + 1)
    assert "more than" in ulbq("quantize", dense, *RTN, "-o", tmp_path / "q").refused()


def test_what_nobody_reads_may_be_large(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    with (dense / "trainer_state.json").open("ab") as file:
        file.truncate(limits.SETTINGS_SIZE + 1)
    assert ulbq("quantize", dense, *RTN, "-o", tmp_path / "q").code == 0


def test_a_large_manifest_is_not_read(packed: Path, ulbq: Ulbq, tmp_path: Path, monkeypatch: Any) -> None:
    large = tmp_path / "artifacts" / "large"
    large.mkdir(parents=True)
    with (large / "manifest.json").open("wb") as file:
        file.write(b'{"kind": "quantized", "schema_version": 1, "x": "')
        file.truncate(2 << 30)
    assert "more than" in ulbq("inspect", large).refused()
    monkeypatch.chdir(tmp_path / "artifacts")
    start = time.process_time()
    assert "no finished artifact" in ulbq("inspect").refused()
    assert time.process_time() - start < 2
    os.rename(packed, tmp_path / "artifacts" / "small")
    monkeypatch.chdir(tmp_path)
    assert ulbq("inspect", "-q").out == "artifacts/small\n"


def test_the_newest_artifact_is_the_file_systems(packed: Path, ulbq: Ulbq, tmp_path: Path, monkeypatch: Any) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    for name, created, written in (("old", "2999-01-01T00:00:00Z", 1_000), ("new", "1999-01-01T00:00:00Z", 2_000)):
        shutil.copytree(packed, tmp_path / "artifacts" / name)
        reseal(tmp_path / "artifacts" / name, lambda manifest, created=created: manifest.update(created=created))
        os.utime(tmp_path / "artifacts" / name / "manifest.json", (written, written))
    shutil.rmtree(packed)
    assert ulbq("inspect", "-q").out == "artifacts/new\n"


@pytest.mark.parametrize("name", ["manifest.json", "adapter/adapter_config.json", "model.safetensors.index.json"])
def test_pipes_in_artifacts(name: str, adapted: Path, ulbq: Ulbq) -> None:
    (adapted / name).unlink()
    os.mkfifo(adapted / name)
    for words in (("inspect", adapted), ("generate", adapted, "-p", "hi"), ("eval", adapted)):
        ulbq(*words).refused()


PARENT = {"kind": "folder", "name": "x", "path": "/nowhere", "sha256": "0"}
BLOCK = {"index": 0, "start_error": 1, "end_error": 1, "steps": 1, "seconds": 1}
MANIFESTS: dict[str, Any] = {
    "parents": lambda m: m.update(parents=[PARENT] * 100_000),
    "bits": lambda m: m["bits"]["parts"].update(codes=10**400),
    "bits of a layer": lambda m: m["layers"][0]["bits"].update(codes=10**400),
    "negative bits": lambda m: m["bits"]["parts"].update(codes=-1),
    "weights": lambda m: m["bits"].update(weights=0),
    "shape": lambda m: m["layers"][0].update(shape=[0, 64]),
    "large shape": lambda m: m["layers"][0].update(shape=[10**300, 64]),
    "size": lambda m: m["files"]["config.json"].update(size=10**400),
    "block": lambda m: m.update(
        blocks=[{"index": 10**400, "start_error": 1, "end_error": 1, "steps": 1, "seconds": 1}]
    ),
    "depth": lambda m: m["request"].update(x=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_resealed_manifests(change: Any, packed: Path, ulbq: Ulbq) -> None:
    reseal(packed, change)
    for words in (("inspect", packed, "--layers"), ("generate", packed, "-p", "hi")):
        ulbq(*words).refused()


def test_a_number_beyond_all(packed: Path, ulbq: Ulbq) -> None:
    path = packed / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1e999'))
    assert "corrupt" in ulbq("inspect", packed).refused()


def test_ancestors_are_counted(packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    """Every artifact has the one before it for a parent 900 times over: told in full that would have no end."""
    import shutil

    before = packed
    for number in range(4):
        path = shutil.copytree(packed, tmp_path / f"q{number}")
        sha256 = json.loads((before / "manifest.json").read_text())["digest"]
        parent = {"kind": "quantized", "name": "x", "path": str(before), "sha256": sha256}
        before = reseal(Path(path), lambda manifest, parent=parent: manifest.update(parents=[parent] * 900))
    assert ulbq("inspect", before).code == 0


ADAPTERS: dict[str, dict[str, Any]] = {
    "backtracks": {"target_modules": "(([a-z._0-9]+)+)+X"},
    "is no expression": {"target_modules": "(("},
    "is a number": {"target_modules": 7},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "layers_to_transform": {"layers_to_transform": [0]},
    "init": {"init_lora_weights": "pissa"},
    "exclude": {"exclude_modules": "(([a-z._0-9]+)+)+X"},
    "parameters": {"target_parameters": ["x"]},
    "unknown": {"a_feature_of_tomorrow": True},
    "rank": {"r": 10**30},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters(change: dict[str, Any], adapted: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    edit_json(adapted / "adapter" / "adapter_config.json", **change)
    reseal(adapted)
    assert "adapter" in ulbq("generate", adapted, "-p", "hi", "-n", "1", "-q").refused()
    ulbq("convert", adapted, "--to", "dense", "--merge-adapter", "-o", tmp_path / "out", "-q").refused()


def test_an_adapter_that_says_what_peft_says_by_itself_is_read(adapted: Path, ulbq: Ulbq) -> None:
    edit_json(adapted / "adapter" / "adapter_config.json", a_feature_of_tomorrow=None, layers_to_transform=None)
    reseal(adapted)
    told = ulbq("generate", adapted, "-p", "hi", "-n", "1", "-q")
    assert told.code == 0, told.err


def replaces(what: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": what}, "content": content}


NORMALIZERS: dict[str, Any] = {
    "multiplies": {"type": "Sequence", "normalizers": [replaces("x", "x" * 1000)] * 4},
    "multiplies much": {"type": "Sequence", "normalizers": [replaces(".", "x" * 1000)] * 2},
    "is no normalizer": {"type": "Nonsense"},
    "is no expression": replaces("((", ""),
}


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS.keys())
def test_tokenizers(normalizer: Any, packed: Path, ulbq: Ulbq) -> None:
    edit_json(packed / "tokenizer.json", normalizer=normalizer)
    reseal(packed)
    assert "tokenizer" in ulbq("generate", packed, "-p", "hi", "-q").refused()


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": {}}}},
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}},
        {"model": {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "#",
                   "max_input_chars_per_word": 1, "vocab": {}}},
    ],
)  # fmt: skip
def test_tokenizers_that_break_their_library(change: dict[str, Any], packed: Path, ulbq: Ulbq) -> None:
    edit_json(packed / "tokenizer.json", **change)
    reseal(packed)
    assert "tokenizer" in ulbq("generate", packed, "-p", "hi", "-q").refused()


def _chain(line: str) -> str:
    letters = "abcdefghijklmnopqrst"
    return "".join(line.format(name, before) + "\n" for before, name in pairwise(letters))


RECIPES = {
    "depth": "options: " + "[" * 9000 + "]" * 9000,
    "moderate depth": "options: " + "[" * 100 + "]" * 100,
    "integer": "options: {method: rtn, bits: " + "9" * 5000 + "}",
    "hexadecimal": "options: {method: rtn, bits: 0x" + "f" * 19000 + "}",
    "date": "options: {method: rtn, bits: 2024-02-31}",
    "laughs": "a: &a [x,x]\n" + _chain("{0}: &{0} [*{1},*{1}]") + "options: {method: rtn, x: *t}",
    "merges": "a: &a {k: 1}\n" + _chain("{0}: &{0} {{<<: [*{1},*{1}]}}") + "options: {method: rtn}",
    "itself": "options: &a {method: rtn, x: *a}",
    "size": "options: {method: rtn}\n#" + "x" * (1 << 20),
    "no text": "\udcff",
    "no key": "options: {? [1, 2] : 3}",
    "code": "options: !!python/object/apply:os.system [id]",
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_recipes(recipe: str, dense: Path, packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe, errors="surrogateescape")
    assert ulbq("quantize", dense, "--recipe", path, "-o", tmp_path / "q").code in (2, 3)
    assert ulbq("finetune", packed, "--task", path, "-o", tmp_path / "q").code in (2, 3)
    os.remove(path)
    os.mkfifo(path)
    assert ulbq("quantize", dense, "--recipe", path, "-o", tmp_path / "q").code in (2, 3)


def test_a_recipe_may_have_anchors(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    text = "name: r\ndescription: &d text\nsource: *d\noptions: {method: rtn, bits: 4}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert ulbq("quantize", dense, "--recipe", tmp_path / "r.yaml", "-q", "-o", tmp_path / "q").code == 0


CARDS = {
    "date": "license: mit\nlast: 2024-02-31",
    "laughs": "license: mit\na: &a [x,x]\nb: &b [*a,*a]",
    "integer": "license: mit\nn: " + "9" * 5000,
    "another's tag": "license: mit\nx: !!python/object/apply:os.system [id]",
}


@pytest.mark.parametrize("head", CARDS.values(), ids=CARDS.keys())
def test_model_cards_keep_what_can_be_read(head: str, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (dense / "README.md").write_text(f"---\n{head}\n---\n# x\n")
    assert ulbq("quantize", dense, *RTN, "-o", tmp_path / "q").code == 0
    assert "license: mit\n" in (tmp_path / "q" / "README.md").read_text()


HEADS = {
    "depth": "[" * 9000,
    "itself": "license: &a [*a]",
    "map": "license: {a: b}",
    "date": "license: 2024-02-31",
    "numbers": "license: [1]",
    "long": "x" * (1 << 18),
    "long licence": "license: |\n" + " x\n" * 30000,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_model_cards_that_cannot_be_read_stop_nothing(head: str, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (dense / "README.md").write_text(f"---\n{head}\n---\n# x\n")
    told = ulbq("quantize", dense, *RTN, "-o", tmp_path / "q")
    assert told.code == 0, told.err
    assert "license:" not in (tmp_path / "q" / "README.md").read_text().split("---")[1]


def _loops() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:  # what is bounded may catch all it likes
            continue


def _grows() -> None:
    held = []
    while True:
        held.append(bytes(1 << 20) + b"x")


def test_bounds_hold_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    import signal

    former = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    with pytest.raises(InputError, match="It takes more than"), limits.bounded("It", seconds=0.3):
        _loops()
    with pytest.raises(InputError, match="MiB of memory"), limits.bounded("It", address_space=True):
        bytearray(4 << 30)
    monkeypatch.setattr(limits, "MEMORY", 64 << 20)
    with pytest.raises(InputError, match="MiB of memory"), limits.bounded("It", seconds=60):
        _grows()
    with pytest.raises(KeyError), limits.bounded("It"):
        raise KeyError
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == former
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_work_apart(tmp_path: Path) -> None:
    assert limits.apart(lambda: {"a": [1]}, "It") == {"a": [1]}
    with pytest.raises(InputError, match="fails"):
        limits.apart(lambda: 1 / 0, "It")
    with pytest.raises(InputError, match="fails"):
        limits.apart(os.abort, "It")
    with pytest.raises(InputError, match="fails"):
        limits.apart(lambda: len(bytearray(8 << 30)), "It")

    def loop() -> None:
        while True:
            pass

    with pytest.raises(InputError, match="takes more than"):
        limits.apart(loop, "It", seconds=1)


def test_a_gguf_file_of_two_thousand_million_blocks(ulbq: Ulbq, tmp_path: Path) -> None:
    from tests.models.tiny import tiny_config, tiny_model
    from tests.models.tiny_gguf import write_tiny_gguf

    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(tiny_model(tiny_config("llama")), path)
    data = path.read_bytes()
    value = data.index(b"llama.block_count") + len(b"llama.block_count") + 4  # behind the value's type
    path.write_bytes(data[:value] + (2**31).to_bytes(4, "little") + data[value + 4 :])
    in_a_gigabyte(lambda: ulbq("quantize", path, *RTN, "-o", tmp_path / "q").refused())


HOSTILE = [None, -1, 0, 10**400, 1e308, "", "x", "\0\ud800", [], {}, [[]], True, "NaN"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place in a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from leaves(part, (*path, key))


@pytest.mark.slow
def test_every_place_of_a_manifest_with_hostile_values(tmp_path: Path, ulbq: Ulbq) -> None:
    from tests.artifacts.sample import quantized, write_artifact

    parent = {"kind": "quantized", "name": "x", "path": "y", "sha256": "0"}
    end = {"loss": "kl", "start_error": 1.0, "end_error": 0.5, "epochs": 1, "steps": 2, "seconds": 1.0}
    fit = {"factor": 1.0, "vectors": ["a"], "start_error": 1.0, "end_error": 0.5}
    rotation = {"seed": 0, "residual": "a", "values": "b"}
    calibration = {"name": "c4", "samples": 1, "sequence_length": 2}
    learnt = {
        **{"task": "t", "template": "chat", "data": {"samples": 1, "sources": ["x"]}, "train": "adapter"},
        **{"start": "fresh", "parameters": 1, "epochs": 1, "steps": 1, "start_loss": 1.0, "end_loss": 1.0},
        **{"losses": [[1, 1.0]], "evaluations": [[0, 1.0]], "seconds": 1.0},
    }
    manifest = quantized(
        **{"parents": [parent], "end_to_end": end, "temperature": fit, "rotation": rotation, "finetune": learnt},
        **{"calibration": calibration, "phases": [{"name": "p", "seconds": 1.0, "peak_memory": 1}]},
    )
    artifact = write_artifact(tmp_path / "q", manifest)
    whole = json.loads((artifact / "manifest.json").read_text())
    failed: list[Any] = []
    for path in list(leaves(whole)):
        for value in HOSTILE:
            changed = json.loads(json.dumps(whole))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (artifact / "manifest.json").write_text(json.dumps(changed))
            if path[0] != "files":
                reseal(artifact)
            told = ulbq("inspect", artifact, "--layers")
            if told.code not in (0, 3):
                failed.append((path, value, told.err.splitlines()[0]))
    assert failed == []


class _Endless:
    def __del__(self) -> None:
        _for_ever()


def _for_ever() -> None:
    while True:
        pass


def _taken_down_and_on() -> None:
    _Endless()
    _for_ever()


def test_work_whose_end_comes_while_an_object_is_taken_down(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="It takes more than"), limits.bounded("It", seconds=0.2):
        _taken_down_and_on()
    assert not any(capsys.readouterr())

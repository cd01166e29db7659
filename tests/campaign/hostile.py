"""Values that nobody ought to write: in options, settings, headers, data and recipes; and what each command says."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.outcome import clear, modest
from tests.campaign.process import command

Edit = Callable[[Path], None]

_ENDS = {0: "done", 2: "usage (2)", 3: "input (3)", 4: "environment (4)", 5: "numbers (5)"}
_SAID = ("--device", "cpu", "--offline", "-q")
_TEXT = ("--samples", "2", "--sequence-length", "16", "--calibration", "@text.txt")
_MODEL = (
    ("generate", "@it", "-p", "hi", "-n", "2", *_SAID),
    ("quantize", "@it", "--method", "rtn", *_SAID, "-o", "@out"),
)
_ARTIFACT = (("inspect", "@it", "-q"), ("generate", "@it", "-p", "hi", "-n", "2", *_SAID))
_DEEP = "[" * 100_000


class Case:
    """One hostile value.

    Attributes:
        where: what it stands in, for the table.
        value: what it is, in words.
        base: what of the world is spoilt; none for options.
        edit: how, given a copy of that.
        words: the commands that meet it.
    """

    def __init__(
        self, where: str, value: str, base: str | None, edit: Edit | None, words: tuple[tuple[str, ...], ...]
    ) -> None:
        self.where, self.value, self.base, self.edit, self.words = where, value, base, edit, words


def cases() -> list[Case]:
    """All of them, in an order that stays."""
    made = [*_options(), *_configs(), *_small_json(), *_tokenizers(), *_templates(), *_manifests(), *_recipes()]
    return [*made, *_shards(), *_indices(), *_gguf(), *_data(), *_adapters(), *_places()]


def trial(folder: str, world: str, number: int) -> list[str]:
    """Scenario: one of :func:`cases`, by number. Returns how its commands ended."""
    case, place = cases()[number], Path(folder) / "place"
    said = []
    for words in case.words:
        clear(place)
        it = place / "it"
        if case.base is not None:
            source = Path(world) / case.base
            shutil.copytree(source, it) if source.is_dir() else shutil.copyfile(source, it)
        if case.edit is not None:
            case.edit(it)
        spelled = [_spelled(word, it, place / "out", Path(world)) for word in words]
        told = command(spelled, place)
        errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in told.err, f"{words[0]}: {told.err[-2500:]}"
        assert told.code in _ENDS, f"{words[0]}: exit code {told.code}: {told.err[-1500:]}"
        assert len(errors) == (told.code != 0), f"{words[0]}: {len(errors)} sentences: {told.err[-1500:]}"
        modest(told)
        said.append(_ENDS[told.code])
    return said


def _spelled(word: str, it: Path, out: Path, world: Path) -> str:
    if word.startswith("@it"):
        return f"{it}{word[3:]}"
    if word.startswith("@"):
        return str(out) if word == "@out" else str(world / word[1:])
    return word


def _options() -> Iterator[Case]:
    quantize = ("quantize", "@dense", *_SAID, "-o", "@out")
    rtn = (*quantize, "--method", "rtn")
    trained = (*quantize, "--method", "db-llm", "--epochs", "1", *_TEXT)
    claq = (*quantize, "--method", "claq", *_TEXT)
    coded = (*quantize, "--method", "trellis", *_TEXT)
    tuned = ("finetune", "@affine", "--task", "instructions", "--data", "@rows.jsonl", *_SAID, "-o", "@out")
    score = ("eval", "@affine", "--perplexity", "wikitext2", "--data-dir", "@mirror", "--no-fidelity",
             "--no-parent-scores", "--limit", "1", *_SAID, "-o", "@out")  # fmt: skip
    speak = ("generate", "@affine", *_SAID)
    swept = ("sweep", "@dense", "--method", "rtn", *_SAID, "-o", "@out")
    told = ("recommend", "@dense", *_SAID)
    hopeless = ("nan", "inf", "-inf", "-1", "1e309", "0x10", "", "\uff11")
    for before, option, values in (
        (rtn, "--bits", ("0", "5", "-3", "1e3", "99999999999999999999", "2.5", "two", "")),
        (rtn, "--group-size", ("0", "-2", "7", "99999999999", "64.0", "")),
        (rtn, "--set", ("", "=", "bits", "bits=[", "group_size=&a [*a]", "search={a: 1}", "bits=1e99", "no_such=1")),
        (rtn, "--seed", ("-1", "9223372036854775808", "1e5", "nan")),
        (rtn, "--device", ("cuda:99", "meta", "", "cpu:77", "mps:0", "💥", "xpu")),
        (trained, "--samples", ("0", "-1", "99999999999999")),
        (trained, "--sequence-length", ("1", "0", "99999999999")),
        (trained, "--epochs", ("-1", "1.5", "99999999999999999999999")),
        (trained, "--batch-size", ("0", "-4", "99999999999999999999")),
        (trained, "--weight-lr", (*hopeless, "1e9", "1e8")),
        (trained, "--scale-lr", hopeless),
        (trained, "--warmup", ("2", "-0.1", "nan")),
        (trained, "--final-rate", ("2", "nan", "-1")),
        (trained, "--clip", ("-1", "nan", "inf", "1e308")),
        (trained, "--activation-memory", ("0", "-1G", "1e99G", "G", "nanG", "9" * 400 + "G")),
        (trained, "--stage", ("wpt", "wpt:", "wpt:epochs=nan", "x:epochs=1", "opt:epochs=1,epochs=2", ":=,:=,",
                              "wpt:a=" * 9)),
        (trained, "--lambda", hopeless),
        (trained, "--saliency", ("nothing", "/dev/null", "@affine", "@evaluation")),
        (claq, "--target-bits", ("0", "nan", "inf", "1e300", "-2", "16")),
        (claq, "--outlier-bits", ("nan", "1e300", "-1", "5")),
        (claq, "--damping", ("nan", "2", "-1", "inf")),
        (claq, "--column-block", ("0", "-1", "99999999999999999999")),
        (claq, "--sweeps", ("-1", "1.5", "nan", "99999999999999999999")),
        (coded, "--target-bits", ("0", "2", "nan", "inf", "1e300", "-2", "16")),
        (coded, "--state-bits", ("0", "13", "-12", "1e2", "99999999999999999999", "")),
        (tuned, "--rank", ("0", "-1", "99999999999", "1e2")),
        (tuned, "--targets", ("", ",", "nothing", "q_proj,,", "../x", "*", "(" * 50)),
        (tuned, "--dropout", ("1", "2", "nan", "-0.5")),
        (tuned, "--alpha", ("nan", "0", "inf", "-1")),
        (score, "--context", ("1", "0", "99999999999", "-5")),
        (score, "--batch-size", ("0", "99999999999999")),
        (score, "--tasks", ("", ",", "no_such_task", "../../etc/passwd")),
        ((*speak, "-p", "hi", "-n", "2"), "--temperature", hopeless),
        ((*speak, "-p", "hi", "-n", "2"), "--top-p", ("0", "1.1", "nan", "-1")),
        ((*speak, "-p", "hi"), "-n", ("0", "-1", "99999999999999999999")),
        ((*speak, "-n", "2"), "-p", ("", "\x1b[2J\x07", "\x85\x9b", "a" * 20_000)),
        ((*coded, "--epochs", "1"), "--weight-lr", (*hopeless, "1e9")),
        (("serve", "@affine", *_SAID), "--port", ("-1", "65536", "nan", "80 80", "99999999999999999999", "")),
        (("serve", "@affine", *_SAID), "--host", ("", "\x1b[2J", "no such host", "a" * 300, "256.1.1.1")),
        (trained, "--log-to", ("", "nothing", "tensorboard\n", "tensorboard,nothing", "a" * 300, "../wandb")),
        ((*swept, "--bits", "2"), "--parallel", ("0", "-1", "65", "2.5", "99999999999999999999", "")),
        ((*swept, "--parallel", "2"), "--bits", ("0", "-2", "nan", "inf", "1e300", "9", "2,x", "")),
        (swept, "--seeds", ("-1", "1.5", "99999999999999999999", ",", "")),
        (swept, "--settings", ("/dev/null", "/dev/zero", "@rows.jsonl", "@dense", "@nothing", "")),
        (told, "--fit", ("0", "-1G", "1e300G", "nanG", "GB", "9" * 400, "")),
        (told, "--bits", ("0", "-2", "nan", "inf", "0.1", "two")),
        (told, "--max-time", ("0", "-1h", "nanh", "1e300h", "h", "9" * 400 + "h", "")),
        (told, "--engine", ("", "nothing", "vllm\n", "vllm,mlx")),
        (("push", "@affine"), "--dry-run", ("", "a b/c", "/", "a/b/c", "..", "me/" + "a" * 300, "\x1b[2J/x", "me/x\n")),
        (("push", "@affine", "me/x", "-q"), "--revision", ("", "\x1b[2J", "a" * 300, "../main")),
        (("list",), "--json", ("/dev/null", "/dev/zero", "", "a" * 300, "@affine/config.json", "@nothing")),
        (("convert", "@affine", "-q", "-o", "@out"), "--for", ("", "vllm\n", "nothing", "llama.cpp,vllm")),
        (("convert", "@affine", "-q", "-o", "@out"), "--to", ("", "pickle", "dense\n")),
        (("inspect",), "-q", ("/dev/null", "/dev/zero", "/", "", ".", "~nobody", "a" * 300, "hub/nothing", "@dense")),
        (("quantize", "@dense", "--method", "rtn", *_SAID), "-o",
         ("/dev/null", "/proc/x", "/dev/null/x", "", "/", "@dense", "@dense/inside", "a" * 300, "x\n.partial",
          "x.partial")),
    ):  # fmt: skip
        for value in values:
            yield Case(f"option {before[0]} {option}", _short(value), None, None, ((*before, option, value),))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)")


def _json_edit(name: str, *path: str, value: Any) -> Edit:
    """Put a value at a place in a JSON file."""

    def edit(it: Path) -> None:
        data = json.loads((it / name).read_text())
        inner = data
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
        (it / name).write_text(json.dumps(data))

    return edit


def _written(name: str, data: bytes | str) -> Edit:
    """Put other bytes in the place of a file."""

    def edit(it: Path) -> None:
        (it / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return edit


_ODD: tuple[Any, ...] = (0, -1, 1 << 62, 1.5, "64", None, [], {}, True, float("nan"), float("inf"))


def _configs() -> Iterator[Case]:
    for key, values in (
        ("hidden_size", _ODD),
        ("num_hidden_layers", _ODD),
        ("num_attention_heads", (0, -4, 3, 1 << 40, "4", None)),
        ("num_key_value_heads", (0, 3, -2, "2", [])),
        ("vocab_size", (0, -1, 1 << 62, "256", None)),
        ("intermediate_size", (0, -1, 1 << 62)),
        ("rms_norm_eps", (-1, float("nan"), "1e-5", None, 1e300)),
        ("rope_parameters", (None, [], {"rope_type": "nothing"}, {"rope_type": "yarn", "factor": -1}, 7)),
        ("max_position_embeddings", (0, -1, 1 << 62, "256")),
        ("head_dim", (0, -1, 1 << 40, 17)),
        ("hidden_act", ("nothing", None, 5, "__import__('os')")),
        ("model_type", ("nothing", "", None, 5, "../llama", "bert", "gpt2")),
        ("architectures", ([], ["Nothing"], None, "LlamaForCausalLM", [5])),
        ("dtype", ("float3", 5, None, "torch.float32; import os")),
        ("torch_dtype", ("nothing", [])),
        ("tie_word_embeddings", ("yes", None, 5)),
        ("quantization_config", ({}, {"quant_method": "ulbq"}, {"quant_method": 5}, [], "ulbq")),
        ("auto_map", ({"AutoModelForCausalLM": "evil.Evil"}, "x", 5)),
        ("bos_token_id", (-1, 1 << 40, "x", [0, 1], 1.5)),
        ("attention_bias", ("maybe", 5)),
        ("layer_types", ([], ["nothing"] * 2, "full_attention", 5)),
    ):
        for value in values:
            edit = _json_edit("config.json", key, value=value)
            yield Case(f"config.json {key}", _short(value), "dense", edit, _MODEL)
    for what, data in _BROKEN:
        yield Case("config.json", what, "dense", _written("config.json", data), _MODEL[:1])


_BROKEN: tuple[tuple[str, bytes | str], ...] = (
    ("empty", b""), ("no JSON", b"{"), ("no object", b"[]"), ("null", b"null"), ("nested deeply", _DEEP),
    ("not UTF-8", b"\xff\xfe{}"), ("a huge number", '{"hidden_size": ' + "9" * 5000 + "}"), ("zeros", b"\0" * 100),
)  # fmt: skip


def _small_json() -> Iterator[Case]:
    name = "generation_config.json"
    for key, values in (
        ("eos_token_id", (-1, "x", [], {}, 1 << 62, [[1]], None)),
        ("max_new_tokens", (-1, "x", 1 << 62)),
        ("temperature", (-1, "hot", float("nan"))),
        ("num_beams", (0, -1, 1 << 40)),
        ("cache_implementation", ("nothing", 5)),
        ("stop_strings", (["a"], 5)),
        ("_from_model_config", ("x",)),
    ):
        for value in values:
            yield Case(f"{name} {key}", _short(value), "dense", _json_edit(name, key, value=value), _MODEL[:1])
    for what, data in _BROKEN:
        yield Case(name, what, "dense", _written(name, data), _MODEL[:1])


def _tokenizers() -> Iterator[Case]:
    for path, value in (
        (("model", "vocab"), {}),
        (("model", "vocab"), None),
        (("model", "vocab"), {"a": -1}),
        (("model", "vocab"), {"a": 1 << 40}),
        (("model", "merges"), [["x", "y"]]),
        (("model", "merges"), "x"),
        (("model", "type"), "Nothing"),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                              "invert": False}),
        (("normalizer",), {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 100_000}),
        (("normalizer",), {"type": "Prepend", "prepend": "x" * 1_000_000}),
        (("decoder",), None),
        (("decoder",), 5),
        (("added_tokens",), [{"id": 1 << 40, "content": "x", "special": True}]),
        (("added_tokens",), 5),
        (("post_processor",), {"type": "Nothing"}),
        (("version",), "99"),
        (("truncation",), {"max_length": 0, "stride": 9, "strategy": "LongestFirst", "direction": "Right"}),
        (("padding",), {"strategy": {"Fixed": 1 << 40}, "direction": "Left", "pad_id": 0, "pad_type_id": 0,
                        "pad_token": "x", "pad_to_multiple_of": None}),
    ):  # fmt: skip
        edit = _json_edit("tokenizer.json", *path, value=value)
        yield Case(f"tokenizer.json {'.'.join(path)}", _short(value), "dense", edit, _MODEL[:1])
    for what, data in _BROKEN[:6]:
        yield Case("tokenizer.json", what, "dense", _written("tokenizer.json", data), _MODEL[:1])
    for key, value in (
        ("tokenizer_class", "Nothing"),
        ("tokenizer_class", 5),
        ("tokenizer_class", "../x"),
        ("bos_token", {"content": 5}),
        ("eos_token", []),
        ("model_max_length", -1),
        ("model_max_length", "x"),
        ("chat_template", 5),
        ("added_tokens_decoder", {"x": {"content": "y"}}),
        ("auto_map", {"AutoTokenizer": ["evil.Evil", None]}),
        ("extra_special_tokens", 5),
        ("clean_up_tokenization_spaces", "x"),
    ):
        edit = _json_edit("tokenizer_config.json", key, value=value)
        yield Case(f"tokenizer_config.json {key}", _short(value), "dense", edit, _MODEL[:1])


def _templates() -> Iterator[Case]:
    chat = ("generate", "@it", "--chat", "-p", "hi", "-n", "2", *_SAID)
    for template in (
        "",
        "{{",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ messages[99].content.nothing }}",
        "{{ 1 / 0 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages | map('nothing') }}",
        "{% set x = [0] %}{% for i in range(99999) %}{% set _ = x.extend(x) %}{% endfor %}",
        "\x1b[2J{{ messages[0].content }}",
    ):
        yield Case("chat_template.jinja", _short(template), "dense", _written("chat_template.jinja", template), (chat,))


def _resealed(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Edit a manifest and make its digest fit, as a stranger would."""

    def change(it: Path) -> None:
        from tests.artifacts.sample import digest

        manifest = json.loads((it / "manifest.json").read_text())
        edit(manifest)
        try:
            manifest["digest"] = digest(manifest)
        except (ValueError, TypeError):
            manifest["digest"] = "0" * 64
        (it / "manifest.json").write_text(json.dumps(manifest))

    return change


def _manifests() -> Iterator[Case]:
    for key, values in (
        ("name", ("", "..", "a/b", "x" * 5000, "\x1b[2J", None, 5)),
        ("kind", ("nothing", None, "saliency", "evaluation", "converted")),
        ("schema_version", (0, -1, 99, "2", 1.5, True)),
        ("created", ("yesterday", None, "\x1b]0;x\x07")),
        ("files", ({}, None, {"../x": {"size": 1, "sha256": "0"}}, {"/etc/passwd": {"size": 1, "sha256": "0"}})),
        ("layers", ([], None, [{}])),
        ("scheme", ({}, None, {"kind": "nothing"}, {"kind": "affine", "bits": 99, "group_size": 0})),
        ("bits", ({}, None)),
        ("parents", ([{}] * 3, "x", [None])),
        ("seed", ("x", None, 1 << 200)),
        ("request", ([], None, {"a": float("1e308")})),
        ("phases", ([{"name": "x", "seconds": -1}], 5)),
        ("skipped", (5, ["x" * 100_000])),
        ("temperature", ({"value": "x"}, 5)),
        ("processes", (-1, "x", 1 << 70)),
        ("warnings", (["\x1b[2J" * 10], 5)),
    ):
        for value in values:
            edit = _resealed(lambda manifest, key=key, value=value: manifest.__setitem__(key, value))  # type: ignore[misc]
            yield Case(f"manifest.json {key}", _short(value), "affine", edit, _ARTIFACT)
    for what, data in _BROKEN:
        yield Case("manifest.json", what, "affine", _written("manifest.json", data), _ARTIFACT)


def _recipes() -> Iterator[Case]:
    words = ("quantize", "@dense", "--recipe", "@it", *_SAID, "-o", "@out")
    for text in (
        "", "{", "5", "[]", "options: 5", "options: {}", "options: {nothing: 5}", "options: {bits: .nan, method: rtn}",
        "options: {method: 5}", "options: {method: rtn, bits: [2]}", "options: {method: rtn, out: /etc}",
        "options: !!python/object/apply:os.system [ls]", "a: &a [*a]", "options: {method: rtn, bits: 0o7}",
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]",
        "options: {method: rtn, source: /etc/passwd}", "\x00", "options: {method: rtn, seed: 1e400}", "? [a]\n: b",
        "options: {method: rtn, method: gptq}", "x" * 100_000, "[" * 1000,
    ):  # fmt: skip

        def edit(it: Path, text: str = text) -> None:
            it.with_suffix(".yaml").write_text(text)

        spelled = tuple("@it.yaml" if word == "@it" else word for word in words)
        yield Case("recipe", _short(text), None, edit, (spelled,))


def _header(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change the JSON header of a safetensors file."""

    def edit(it: Path) -> None:
        path = it / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return edit


def _shards() -> Iterator[Case]:
    name = "model.norm.weight"
    for what, change in (
        ("a negative shape", lambda header: header[name].update(shape=[-1])),
        ("a huge shape", lambda header: header[name].update(shape=[1 << 62])),
        ("no shape", lambda header: header[name].pop("shape")),
        ("a scalar", lambda header: header[name].update(shape=[])),
        ("another dtype", lambda header: header[name].update(dtype="F3")),
        ("integers", lambda header: header[name].update(dtype="I32")),
        ("eight-bit floats", lambda header: header[name].update(dtype="F8_E5M2")),
        ("offsets beyond the end", lambda header: header[name].update(data_offsets=[0, 1 << 60])),
        ("offsets backwards", lambda header: header[name].update(data_offsets=[256, 0])),
        ("a tensor too many", lambda header: header.update({"evil": header[name]})),
        ("a tensor too few", lambda header: header.pop(name)),
        ("metadata of numbers", lambda header: header.update(__metadata__={"a": 5})),
        ("control characters", lambda header: header.update({"\x1b[2J": header.pop(name)})),
    ):
        yield Case("safetensors header", what, "dense", _header(change), _MODEL)
    for what, data in (
        ("empty", b""), ("a size of all memory", b"\xff" * 8), ("no JSON", struct.pack("<Q", 4) + b"{{{{"),
        ("a header of 100 GB", struct.pack("<Q", 10**11) + b"{}"), ("zeros", b"\0" * 4096),
        ("a pickle", b"\x80\x04K\x01."),
    ):  # fmt: skip
        yield Case("safetensors file", what, "dense", _written("model.safetensors", data), _MODEL)


def _indices() -> Iterator[Case]:
    def moved(text: str) -> Edit:
        def edit(it: Path) -> None:
            (it / "model.safetensors").rename(it / "model-00001-of-00001.safetensors")
            (it / "model.safetensors.index.json").write_text(text)

        return edit

    for what, text in (
        ("outside", '{"weight_map": {"a": "../x.safetensors"}}'), ("nothing", "{}"), ("a list", "[]"), ("no JSON", "{"),
        ("a missing shard", '{"weight_map": {"a": "b.safetensors"}}'), ("numbers", '{"weight_map": {"a": 5}}'),
        ("a pickle", '{"weight_map": {"a": "pytorch_model.bin"}}'), ("nested deeply", _DEEP),
    ):  # fmt: skip
        yield Case("model.safetensors.index.json", what, "dense", moved(text), _MODEL[:1])


def _gguf() -> Iterator[Case]:
    words = (("generate", "@it", "-p", "hi", "-n", "2", *_SAID),)

    def patched(where: int, data: bytes) -> Edit:
        def edit(it: Path) -> None:
            found = bytearray(it.read_bytes())
            found[where : where + len(data)] = data
            it.write_bytes(found)

        return edit

    def cut(size: int) -> Edit:
        return lambda it: it.write_bytes(it.read_bytes()[:size]) and None

    def replaced(old: bytes, new: bytes) -> Edit:
        return lambda it: it.write_bytes(it.read_bytes().replace(old, new, 1)) and None

    for what, edit in (
        ("version 0", patched(4, struct.pack("<I", 0))), ("version 99", patched(4, struct.pack("<I", 99))),
        ("other byte order", patched(4, struct.pack(">I", 3))), ("tensors without end", patched(8, b"\xff" * 8)),
        ("no tensors", patched(8, bytes(8))), ("values without end", patched(16, b"\xff" * 8)),
        ("no values", patched(16, bytes(8))), ("a key without end", patched(24, b"\xff" * 8)),
        *((f"cut after {size}", cut(size)) for size in (0, 4, 8, 24, 100, 1000, 5000)),
        ("another architecture", replaced(b"llama", b"evil!")),
        ("no width", replaced(b"embedding_length", b"embedding_lengtH")),
        ("no heads", replaced(b"attention.head_count\x04", b"attention.head_counT\x04")),
        ("no vocabulary", replaced(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenZ")),
        ("no norm", replaced(b"output_norm.weight", b"output_nOrm.weight")),
    ):  # fmt: skip
        yield Case("GGUF", what, "gguf/model.gguf", edit, words)


def _data() -> Iterator[Case]:
    tuned = ("finetune", "@affine", "--task", "instructions", "--data", "@it.jsonl", "--samples", "2",
             "--validation-samples", "1", "--sequence-length", "64", "--epochs", "1", "--rank", "2", *_SAID, "-o",
             "@out")  # fmt: skip
    drawn = ("quantize", "@dense", "--method", "gptq", "--samples", "2", "--sequence-length", "16", "--calibration",
             "@it.jsonl", *_SAID, "-o", "@out")  # fmt: skip
    good = '{"instruction": "a", "output": "b"}\n' * 8
    for text in (
        "", "\n\n\n", "{", "5\n" * 9, "[]\n" * 9, "null\n" * 9, '{"instruction": 5, "output": 6}\n' * 9,
        '{"instruction": "a"}\n' * 9, '{"output": ""}\n' * 9, '{"text": null}\n' * 9, '{"messages": []}\n' * 9,
        '{"messages": [{"role": "evil", "content": 5}]}\n' * 9, '{"messages": "x"}\n' * 9, good + "{", good + _DEEP,
        good + '{"instruction": "' + "x" * 3_000_000 + '", "output": "b"}\n',
        good + '{"instruction": NaN, "output": 1e999}',
        '{"instruction": "a", "output": "\\ud800"}\n' * 9, '{"prompt": [1], "completion": {}}\n' * 9, "\x00" * 1000,
        '{"text": "' + "a " * 400 + '"}\n', "plain words, and no JSON\n" * 50,
    ):  # fmt: skip

        def edit(it: Path, text: str = text) -> None:
            it.with_suffix(".jsonl").write_text(text)

        yield Case("JSONL data", _short(text), None, edit, (tuned, drawn))


def _adapters() -> Iterator[Case]:
    def spoilt(key: str, value: Any) -> Edit:
        inner = _json_edit("adapter/adapter_config.json", key, value=value)

        def edit(it: Path) -> None:
            inner(it)
            data = (it / "adapter" / "adapter_config.json").read_bytes()
            entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _resealed(lambda manifest: manifest["files"].update({"adapter/adapter_config.json": entry}))(it)

        return edit

    for key, values in (
        ("r", (0, -1, 1 << 40, "2", None)),
        ("lora_alpha", (float("nan"), "x", -1)),
        ("target_modules", ([], "(a+)+$", 5, ["nothing"])),
        ("peft_type", ("PROMPT_TUNING", "nothing", None)),
        ("use_dora", ("x", True)),
        ("bias", ("all", 5)),
        ("modules_to_save", (["lm_head"], 5)),
        ("rank_pattern", ({"(a+)+$": 5}, 5)),
        ("auto_mapping", ({"parent_library": "os", "base_model_class": "system"},)),
    ):
        for value in values:
            yield Case(f"adapter_config.json {key}", _short(value), "adapted", spoilt(key, value), _ARTIFACT[1:])


def _places() -> Iterator[Case]:
    def linked(name: str, target: str) -> Edit:
        def edit(it: Path) -> None:
            (it / name).unlink(missing_ok=True)
            (it / name).symlink_to(target)

        return edit

    def pipe(name: str) -> Edit:
        def edit(it: Path) -> None:
            import os

            (it / name).unlink(missing_ok=True)
            os.mkfifo(it / name)

        return edit

    def folder(name: str) -> Edit:
        def edit(it: Path) -> None:
            (it / name).unlink(missing_ok=True)
            (it / name).mkdir()

        return edit

    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        for target in ("/etc/passwd", "/dev/zero", name, "/nowhere"):
            yield Case(f"link {name}", f"to {target}", "dense", linked(name, target), _MODEL)
        yield Case(f"pipe {name}", "that nobody writes", "dense", pipe(name), _MODEL)
        yield Case(f"folder {name}", "in the place of a file", "dense", folder(name), _MODEL)

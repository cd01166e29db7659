"""Strings of strangers in pages and model cards: every one is text there, wherever it stood."""

import json
import math
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from pydantic import ValidationError

from tests.artifacts.sample import quantized
from tests.evaluation.sample import model_scores, results
from tests.strangers.conftest import reseal
from tests.told import Ulbq
from ulbq.artifacts import QuantizedManifest, SaliencyLayer, SaliencyManifest
from ulbq.artifacts.records import Coverage, FinetuneRecord
from ulbq.evaluation.report import report
from ulbq.evaluation.results import Results
from ulbq.evaluation.svg import element
from ulbq.export.card import converted_card, quantized_card
from ulbq.export.fit import Candidate
from ulbq.export.markdown import code, plain
from ulbq.export.targets import target
from ulbq.models.source import resolve
from ulbq.pipeline import finetune_page, quantize_page, saliency_page

EVIL = "\"><img src=x onerror=alert(1)><script>alert(2)</script>` | [a](javascript:alert(3)) '\n\n# <b onclick=x>"


class Active(HTMLParser):
    """Collects what a hostile string would have to make: elements that no page of ours has, handlers, script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        links = [value for name, value in attributes if name in ("href", "src") and "javascript:" in (value or "")]
        bad = [name for name, _ in attributes if name.startswith("on")] + links
        if tag in ("img", "script", "b", "iframe") or bad:
            self.found.append((tag, attributes))


def rendered(card: str) -> str:
    """A model card as HTML, as generously as Markdown can be read: raw HTML and all links stay."""
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    reader.validateLink = lambda link: True  # type: ignore[method-assign]
    return str(reader.render(card.split("\n---\n", 1)[1]))


def spoilt(value: Any) -> Iterator[Any]:
    """A JSON value with each of its strings replaced in turn, keys of objects too."""
    if isinstance(value, str):
        yield EVIL
    elif isinstance(value, dict):
        for name, part in value.items():
            for changed in spoilt(part):
                yield {**value, name: changed}
            yield {EVIL if key == name else key: held for key, held in value.items()}
            yield {**value, EVIL: part}
    elif isinstance(value, list):
        for index, part in enumerate(value):
            for changed in spoilt(part):
                yield [*value[:index], changed, *value[index + 1 :]]


def every(model: Any, show: Callable[[Any], str], least: int) -> None:
    """Walk every string of a record through a page; ``least`` of them must have reached it."""
    shown = 0
    for changed in spoilt(json.loads(model.model_dump_json())):
        try:
            page = show(type(model).model_validate(changed))
        except (ValidationError, KeyError):
            continue  # refused, or a key that the page needs
        assert Active(page).found == [], changed
        shown += "onerror" in page
    assert shown >= least


def test_the_report() -> None:
    scores = results(
        model_scores("full", perplexity=24.19, tasks={"piqa": {"acc": 0.7}}),
        model_scores("good", parent="full", bits_per_weight=2.5, method="rtn", scheme="w2", perplexity=71, kl=0.5,
                     tasks={"piqa": {"acc": 0.6}}),
    )  # fmt: skip
    manifest = quantized()
    every(manifest, lambda one: report("t", scores, {"good": one}, created="now"), 3)

    def page(found: Results) -> str:
        return report(EVIL, found, {found.models[-1].subject.name: manifest}, created=EVIL)

    every(scores, page, 10)


def test_the_saliency_page() -> None:
    layer = SaliencyLayer(
        **{"name": "model.layers.0.a", "block": 0, "projection": "a", "shape": (4, 4), "total": 1.0, "largest": 0.5},
        **{"top": {"0.1": 0.1, "1": 0.2, "10": 0.5}, "columns": (0.5, 0.5), "top_columns": ((1, 0.5),)},
        **{"rounding": 0.0, "vanished": 0.0},
    )
    manifest = SaliencyManifest(
        **{"name": "s", "request": {}, "seed": 0, "device": "cpu", "score": "fisher", "dtype": "fp16", "rounding": 0.0},
        **{"layers": (layer,), "top": {"0.1": 0.1, "1": 0.2, "10": 0.5}, "loss": 1.0},
        calibration={"name": "c4", "samples": 2, "sequence_length": 3},
    )
    every(manifest, saliency_page.page, 6)


def test_the_quantize_page() -> None:
    whole = Coverage(quantized=4096, in_blocks=4096, embeddings=0, total=5000, bits=3.88)
    parent = {"kind": "folder", "name": "base", "path": "p", "sha256": "0"}
    request = {"method": "rtn", "bits": 2, "skip": ["lm_head"], "calibration": "c4"}
    made = {"coverage": whole, "parents": [parent], "request": request, "warnings": ("w",)}
    data = {"name": "c4", "samples": 1, "sequence_length": 2}
    every(quantized(**made, calibration=data), quantize_page.page, 10)


def test_the_finetune_page() -> None:
    record = FinetuneRecord(
        **{"task": "gsm8k", "template": "chat", "train": "adapter", "start": "fresh", "parameters": 9, "epochs": 1},
        **{"steps": 2, "start_loss": 2.0, "end_loss": 1.0, "losses": ((1, 2.0),), "evaluations": ((0, 2.0), (2, 1.0))},
        data={"samples": 1, "sources": ["x"], "taught_tokens": 2, "heldout": 1, "sha256": "0" * 64},
        seconds=1.0,
    )
    request = {"adapter_lr": 1e-4, "schedule": "cosine", "warmup": 0.1, "batch_size": 1, "micro_batch": 1}
    parent = {"kind": "quantized", "name": "base", "path": "p", "sha256": "0"}
    manifest = quantized(finetune=record, request=request, parents=[parent])

    def page(one: QuantizedManifest) -> str:
        return finetune_page.page(one, one.finetune or record)

    every(manifest, page, 6)


def test_model_cards(packed: Path) -> None:
    source = resolve(packed)
    assert source.manifest is not None

    def converted(one: QuantizedManifest) -> str:
        spoiled = type(source)(one.name, EVIL, packed, "artifact", source.config, source.tensors, source.stored, one)
        return rendered(converted_card(spoiled, Candidate.of(source), target("dense"), stored=plain(EVIL), bits=16))

    every(source.manifest, converted, 2)
    counts = Coverage(quantized=1, in_blocks=1, embeddings=0, total=1, bits=2)
    hostile = quantized_card(
        source, Candidate.of(source), method=EVIL, recipe=EVIL, bits_per_weight=2, counted=[EVIL], covered=counts
    )
    assert Active(rendered(hostile)).found == []
    assert "onerror" in rendered(hostile)


def test_the_card_of_a_hostile_base_and_of_hostile_scores(packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (packed / "README.md").write_text(f"---\nlicense: {json.dumps(EVIL)}\nlanguage: [{json.dumps(EVIL)}]\n---\n# x\n")
    reseal(packed, lambda manifest: manifest["parents"][0].update(name=EVIL))
    told = ulbq("convert", packed, "--to", "dense", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    assert Active(rendered((tmp_path / "out" / "README.md").read_text())).found == []


def test_escaping() -> None:
    assert str(element("i", "<&>", element("b", '"'), class_='"x')) == '<i class="&#34;x">&lt;&amp;&gt;<b>&#34;</b></i>'
    assert plain("a\n|b|  <c> `d` [e](f)") == r"a \|b\| &lt;c&gt; \`d\` \[e\](f)"
    assert code("a`b\n<c>") == "`a'b <c>`"
    assert code("") == "` `"


@pytest.mark.parametrize("value", ["x", None, 3, [], {}, math.pi])
def test_a_recipe_of_any_shape_in_a_manifest(value: Any, packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    reseal(packed, lambda manifest: manifest["request"].update(recipe=value))
    assert ulbq("convert", packed, "--to", "dense", "-o", tmp_path / "out").code == 0

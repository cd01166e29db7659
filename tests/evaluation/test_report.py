"""The page: whole, self-contained, and about the numbers it was given."""

import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from tests.artifacts.sample import SCHEME, quantized
from tests.evaluation.sample import continuation, model_scores, results
from ulbq.artifacts import BitsReport, BlockRecord, LayerRecord
from ulbq.evaluation import figures
from ulbq.evaluation.page import render
from ulbq.evaluation.report import report
from ulbq.evaluation.results import WeightSize
from ulbq.evaluation.svg import Scale, number

VOID = {"meta", "br"}

PARENT = model_scores("full", perplexity=24.19, tasks={"piqa": {"acc": 0.7, "acc_norm": 0.71}})
GOOD = model_scores("good", parent="full", bits_per_weight=2.5, perplexity=71, kl=0.5, tasks={"piqa": {"acc": 0.6}})


class Page(HTMLParser):
    """Fails on a tag that is not closed, or closed by another; collects text and the tags' names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def layers(error=0.1):
    return tuple(
        LayerRecord(name=f"model.layers.{block}.{kind}", shape=(64, 64), scheme=SCHEME, bits={"codes": 1}, error=error)
        for block in range(3)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    )


def blocks(*errors):
    return tuple(
        BlockRecord(index=index, start_error=start, end_error=end, steps=8, seconds=1)
        for index, (start, end) in enumerate(errors)
    )


def page_of(*models, manifests=None):
    return report("a <title> & more", results(*models), manifests or {}, created="2026-11-22 04:23 UTC")


def test_shows_scores_and_figures():
    manifest = quantized(layers=layers(), blocks=blocks((2, 1), (3, 1.5)))
    page = Page(page_of(PARENT, GOOD, manifests={"good": manifest}))
    for text in ("24.19", "71.00", "0.5000", "Error by block", "Error by layer", "Bits by part", "2026-11-22"):
        assert text in page.text
    assert page.tags.count("svg") == 5


def test_size_and_speed_have_tiles_beside_the_parents():
    said = [continuation("Once", " upon")]
    parent = model_scores("full", weights=WeightSize(on_disk=96_600_000, in_memory=269_060_000), continuations=said)
    child = model_scores(
        "good",
        parent="full",
        weights=WeightSize(on_disk=89_900_000, in_memory=90_100_000),
        continuations=[continuation("Once", " more", 62.0)],
    )
    text = page_of(parent, child)
    Page(text)
    tiles = re.findall(r'class="value">(.*?)</div><div class="label">(.*?)</div>', text)
    assert tiles == [
        ("89.9 MB", "on disk; parent 96.6 MB"),
        ("90.1 MB", "weights in memory; parent 269.1 MB"),
        ("62.0", "tokens per second; parent 40.0"),
    ]
    assert text.index("In their own words") < text.index("<h2>Scores</h2>")


def test_several_models_are_drawn_by_what_they_cost():
    other = model_scores("other", parent="full", bits_per_weight=3.5, perplexity=40)
    page = page_of(PARENT, GOOD, other)
    assert "What it costs" in page
    assert "bits per weight" in page
    assert "other: 40.00 at 3.500 bits per weight" in page
    # The parent has no bits, and is a line.
    assert "full: 24.19" in page
    assert "What it costs" not in page_of(PARENT, GOOD)
    sized = [
        model_scores(name, perplexity=20, weights=WeightSize(on_disk=size, in_memory=size))
        for name, size in (("a", 10**6), ("b", 2 * 10**6))
    ]
    assert "b: 20.00 at 2.000 MB on disk" in page_of(*sized)
    assert "What it costs" not in page_of(*sized, model_scores("c", perplexity=20))


def test_needs_nothing_but_itself():
    manifest = quantized(layers=layers(), blocks=blocks((2, 1)))
    text = page_of(PARENT, GOOD, manifests={"good": manifest})
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", text)


def test_templates_are_in_the_wheel():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "evaluation/pages/*" in project["tool"]["setuptools"]["package-data"]["ulbq"]


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'told' is undefined"):
        render("report", title="t", created="now")


def test_names_are_escaped():
    name = "<b>bold</b> & 'co'"
    page = page_of(PARENT, model_scores(name, parent="full", perplexity=3), manifests={name: quantized()})
    assert "<b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &#39;co&#39;" in page
    Page(page)


@pytest.mark.parametrize("model", [model_scores("one", perplexity=10), model_scores("one", tasks={"t": {"acc": 0.0}})])
def test_leaves_out_what_was_not_measured(model):
    page = Page(page_of(model))
    assert "Error by" not in page.text
    assert "Bits by part" not in page.text


def test_a_comparison_has_no_headline_numbers():
    other = model_scores("bad", parent="full", perplexity=99)
    assert 'class="tile"' not in page_of(PARENT, GOOD, other)
    assert "2 models compared" in page_of(PARENT, GOOD, other)


def test_errors_that_a_logarithmic_axis_cannot_show_are_left_out():
    found = figures.block_figure({"good": blocks((1.0, 0.0), (2.0, 1.0), (math.inf, 1.0))}, {"good": "s0"})
    assert found is not None
    assert found.count("<circle") == 1
    assert "nan" not in found
    assert figures.block_figure({"good": blocks((0.0, 0.0))}, {"good": "s0"}) is None


def test_equal_errors_do_not_divide_by_zero():
    drawn = figures.layer_figure(layers(0.1), (0.1, 0.1))
    assert drawn is not None
    # Every layer is the worst: in the fullest colour, which is no opacity at all.
    assert re.findall(r'<rect [^>]*class="heat"([^>]*)><title>[^<]*: 0\.1000</title>', drawn) == [""] * 6
    one = figures.block_figure({"good": blocks((1.0, 1.0))}, {"good": "s0"})
    assert one is not None
    [height] = re.findall(r'<circle [^>]*cy="([\d.]+)"', one)
    assert 0 < float(height) < 260
    assert "nan" not in drawn + one


def test_layers_outside_of_blocks_have_no_place_on_the_map():
    outside = LayerRecord(name="lm_head", shape=(64, 64), scheme=SCHEME, bits={"codes": 1}, error=0.1)
    assert figures.layer_figure([outside], (0.1, 0.1)) is None


def test_unbounded_metrics_are_kept_out_of_the_task_figure():
    scores = model_scores("one", tasks={"piqa": {"acc": 0.5}, "wikitext": {"word_perplexity": 40.0}})
    found = figures.task_figure(results(scores))
    assert found is not None
    assert "piqa" in found
    assert "wikitext" not in found


def test_bits_outside_of_the_weights_are_not_in_the_bar():
    report_ = BitsReport(parts={"codes": 200, "scales": 25, "embeddings": 900}, weights=100)
    found = figures.bits_figure({"good": report_})
    assert found is not None
    assert "2.250" in found
    assert "embeddings" not in found


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0.3, 0.31, False), (24, 71, True), (24, 4e5, True), (1e-9, 1e12, True)]
)
def test_axes_have_a_few_round_ticks_inside(low, high, log):
    scale = Scale(low, high, (0, 100), log=log)
    assert 1 <= len(scale.ticks) <= 7
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in scale.ticks)
    assert scale.ticks == sorted(set(scale.ticks))


def test_an_axis_of_one_value_puts_it_inside():
    assert 0 < Scale(3, 3, (0, 100))(3) < 100
    assert 0 < Scale(3, 3, (0, 100), log=True)(3) < 100


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.5, "0.5"), (2.0, "2"), (0.0437, "0.0437"), (97.01, "97"), (356593.2, "356,593")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text

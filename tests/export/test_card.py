"""Model cards, read back as the Hub reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard

from tests.evaluation.sample import model_scores, results
from tests.models.stored import common, write_quantized
from ulbq.artifacts import ArtifactWriter, EvaluationManifest, Parent
from ulbq.export.card import Card, Score, converted_card, front_of, scores
from ulbq.export.fit import Candidate
from ulbq.export.targets import target
from ulbq.formats import AffineScheme
from ulbq.models.source import resolve


def read(text: str) -> ModelCard:
    assert text.startswith("---\nlibrary_name: ")
    return ModelCard(text)


def card(**changes: Any) -> Card:
    return Card(**({"name": "tiny", "base": "full", "front": {}, "made": ["x"], "loads": ["so"]} | changes))


def test_the_head_is_what_the_hub_reads() -> None:
    front = {"license": "mit", "language": ["en", "no"], "base_model": "a/b", "license_link": "LICENSE"}
    head = read(card(front=front, tags=["rtn", "rtn"], library="gguf").markdown()).data
    assert {name: head[name] for name in front} == front
    assert (head.library_name, head.pipeline_tag, head.tags) == ("gguf", "text-generation", ["ulbq", "rtn"])
    assert "model-index" not in head.to_dict()
    assert "model_name" not in head.to_dict()


def test_scores_are_in_the_head_and_in_a_table() -> None:
    found = {
        "perplexity, a|b": Score("3.50 (1 window)", EvalResult("text-generation", "a|b", "a|b", "perplexity", 3.5))
    }
    text = card(scores=found).markdown()
    [result] = read(text).data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("a|b", "perplexity", 3.5)
    assert read(text).data.model_name == "tiny"
    assert r"| perplexity, a\|b | 3.50 (1 window) |" in text


@pytest.mark.parametrize(
    ("licence", "shown"), [("mit", "mit"), (["mit", "apache-2.0"], "mit, apache-2.0"), (7, "not stated by the base")]
)
def test_a_licence_of_any_shape(licence: Any, shown: str, tiny_llama: Path, tmp_path: Path) -> None:
    out = write_quantized(resolve(tiny_llama), tmp_path / "q", AffineScheme(bits=4, group_size=32))
    (out / "README.md").write_text(f"---\nlicense: {json.dumps(licence)}\n---\n# x\n")
    source = resolve(out)
    text = converted_card(source, Candidate.of(source), target("dense"), stored="bfloat16", bits=16)
    assert f"- Licence: {shown}" in text
    assert read(text).data.license == front_of(source).get("license")


def test_the_newest_evaluation_of_this_very_model_counts(tiny_llama: Path, tmp_path: Path) -> None:
    out = write_quantized(resolve(tiny_llama), tmp_path / "q", AffineScheme(bits=4, group_size=32))
    source = resolve(out)

    def evaluated(name: str, perplexity: float, created: str, digest: str | None) -> None:
        measured = results(model_scores(source.name, perplexity=perplexity, tasks={"piqa": {"acc": 0.5}}))
        parent = Parent(kind="quantized", name=source.name, path=str(out), sha256=digest)
        with ArtifactWriter(tmp_path / "e" / name, "f") as writer:
            (writer.path / "results.json").write_text("{}")
            writer.plan("results.json")
            fields = common(created=created, parents=(parent,), results=measured.model_dump(mode="json"))
            writer.finish(EvaluationManifest(**fields))

    evaluated("old", 9.0, "2026-01-01 00:00 UTC", source.content_hash)
    evaluated("new", 8.0, "2026-01-02 00:00 UTC", source.content_hash)
    evaluated("other", 7.0, "2026-01-03 00:00 UTC", "0" * 64)
    found = scores(source, [tmp_path / "e"])
    assert found["perplexity, wikitext2"].shown == "8.00 (4 windows of 1,024 tokens)"
    assert found["perplexity, wikitext2"].result.metric_value == 8.0
    assert found["piqa, acc"].shown == "0.5000 ± 0.0100 (100 documents)"

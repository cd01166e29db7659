"""Model cards: the ``README.md`` of what is handed on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData
from pydantic import ValidationError

from ulbq import limits
from ulbq.artifacts.manifest import EvaluationManifest, read_manifest
from ulbq.artifacts.names import leads_out
from ulbq.artifacts.records import Coverage
from ulbq.artifacts.small_files import read_small
from ulbq.artifacts.yaml_files import parse_yaml
from ulbq.errors import InputError
from ulbq.evaluation.metrics import METRICS
from ulbq.evaluation.results import Results
from ulbq.export import loading
from ulbq.export.fit import Candidate, describe
from ulbq.export.markdown import code, plain
from ulbq.export.targets.base import Target
from ulbq.models.gguf import open_gguf
from ulbq.models.source import FULL_PRECISION, ModelSource

NAME = "README.md"

_FRONT = "---"
# What a checkpoint's card may say that stays true of what is made from it.
_KEPT = ("license", "license_name", "license_link", "language", "base_model")


class Score(NamedTuple):
    """One score: as the table shows it, plain text, and as the Hub wants it."""

    shown: str
    result: EvalResult


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        name: of the model.
        base: the full-precision model that it was made from, for people.
        front: fields for the Hub: ``license``, ``base_model``, ``language``.
        made: how, one line of Markdown for each fact; what they quote went through :mod:`ulbq.export.markdown`.
        loads: how to load it, paragraphs of Markdown.
        scores: by what was measured, plain text.
        tags: for the Hub.
        library: for the Hub.
    """

    name: str
    base: str
    front: Mapping[str, Any]
    made: Sequence[str]
    loads: Sequence[str]
    scores: Mapping[str, Score] = field(default_factory=dict)
    tags: Sequence[str] = ()
    library: str = "ulbq"

    def markdown(self) -> str:
        """The whole file."""
        front = ModelCardData(
            library_name=self.library,
            pipeline_tag="text-generation",
            tags=["ulbq", *self.tags],
            model_name=self.name if self.scores else None,
            eval_results=[score.result for score in self.scores.values()] or None,
            **self.front,
        )
        licence = self.front.get("license") or "not stated by the base model; look there"
        told = licence if isinstance(licence, str) else ", ".join(licence)
        facts = [f"- Base model: {plain(self.base)}", f"- Licence: {plain(told)}", *(f"- {line}" for line in self.made)]
        parts = [
            f"{_FRONT}\n{front.to_yaml(original_order=['library_name', 'pipeline_tag', 'tags'])}\n{_FRONT}",
            f"# {plain(self.name)}",
            "\n".join(facts),
        ]
        if self.scores:
            rows = [f"| {plain(what)} | {plain(score.shown)} |" for what, score in self.scores.items()]
            parts.append("\n".join(["## Scores", "", "| measured | value |", "| --- | --- |", *rows]))
        parts.append("\n\n".join(["## How to load it", *self.loads]))
        return "\n\n".join(parts) + "\n"


def front_of(source: ModelSource) -> dict[str, Any]:
    """Licence, languages and base model, as far as a source says them: its card's head, or its GGUF file's fields."""
    found: dict[str, Any] = {}
    if source.path.is_file():
        values = open_gguf(source.path).values
        for key, field_name in (("license", "general.license"), ("language", "general.languages")):
            if _is_plain(values.get(field_name)):
                found[key] = values[field_name]
    else:
        head = {} if leads_out(source.path / NAME, source.path) else _head(source.path / NAME)
        found = {key: head[key] for key in _KEPT if head.get(key)}
    if source.kind == "hub":
        found["base_model"] = source.given
    return found


def base_of(source: ModelSource) -> str:
    """The name of the full-precision model behind a source."""
    manifest = source.manifest
    parents = manifest.parents if manifest is not None else ()
    return next((parent.name for parent in parents if parent.kind in FULL_PRECISION), source.name)


def quantized_card(
    source: ModelSource,
    candidate: Candidate,
    *,
    method: str,
    recipe: str | None,
    bits_per_weight: float,
    counted: Sequence[str],
    covered: Coverage,
    warned: Sequence[str] = (),
) -> str:
    """The card of a packed artifact.

    Args:
        source: the full-precision model.
        candidate: the artifact.
        method: that made it; ``recipe`` is the one that set its options, if one did.
        bits_per_weight: true bits of the linear weights.
        counted: what they count.
        covered: how much of the model is quantized.
        warned: what the run warned of.
    """
    made = [
        f"Quantized with {code(f'ulbq quantize --method {method}')}" + (f", recipe {code(recipe)}" if recipe else ""),
        f"Weights: {describe(candidate)}; {bits_per_weight:.3f} true bits per linear weight "
        f"({plain(', '.join(counted))}; "
        f"{'embeddings stay in half precision' if covered.embedding_bits is None else 'embeddings by themselves'})",
        plain(covered.words),
        *(f"Warning: {plain(text)}" for text in warned),
        "`manifest.json` records how it was made",
    ]
    formats = list(dict.fromkeys(scheme.format for scheme in candidate.schemes))
    card = Card(
        name=f"{source.name}, {bits_per_weight:.2f} bits",
        base=base_of(source),
        front=front_of(source),
        made=made,
        loads=loading.of_artifact(candidate),
        tags=[method, *formats],
    )
    return card.markdown()


def converted_card(
    source: ModelSource,
    candidate: Candidate,
    target: Target,
    *,
    stored: str,
    bits: float,
    merged: bool = False,
    scores_in: Sequence[Path] = (),
) -> str:
    """The card of a converted model.

    Args:
        source: what was converted.
        candidate: the same.
        target: what it became.
        stored: how the weights are stored now, for people; ``bits`` is what one of a packed layer takes.
        merged: its adapter is a part of the weights.
        scores_in: folders that may hold evaluations of the source.
    """
    manifest = source.quantized
    made = [f"Stored as {target.name}: {stored}"]
    tags = [target.name]
    if manifest is not None:
        told = manifest.request.get("recipe")
        recipe = told.get("name") if isinstance(told, dict) else None
        if manifest.finetune is not None:  # then the request, and its recipe, are the fine-tuning's
            made.insert(0, f"Fine-tuned with {code(f'ulbq finetune --task {manifest.finetune.task}')}")
            recipe = None
        named = f", recipe {code(recipe)}" if recipe else ""
        made.insert(0, f"Quantized with ulbq, method {code(manifest.method)}{named}")
        made += [f"Warning: {plain(text)}" for text in manifest.warnings]
        made.append(
            f"Weights: {describe(candidate)}; {manifest.bits.bits_per_weight:.3f} true bits in ulbq's own format"
        )
        tags.append(manifest.method)
    if candidate.adapter:
        place = "is a part of the weights" if merged else f"lies beside the weights, {target.adapter_place}"
        made.append(f"Its {candidate.adapter} adapter {place}")
    card = Card(
        name=f"{base_of(source)}, {target.name}",
        base=base_of(source),
        front=front_of(source),
        made=made,
        loads=loading.of_converted(candidate, target, bits, merged=merged),
        scores=scores(source, scores_in),
        tags=tags,
        library=target.library,
    )
    return card.markdown()


def scores(source: ModelSource, folders: Sequence[Path]) -> dict[str, Score]:
    """What the evaluations of a model measured, each with how much it was measured on; the newest counts.

    Args:
        source: the model; only evaluations that name its very content count.
        folders: whose sub-folders may be evaluations.
    """
    manifests: list[EvaluationManifest] = []
    for path in sorted({file.parent for folder in folders for file in folder.glob("*/results.json")}):
        try:
            manifest = read_manifest(path)
        except InputError:
            continue
        if isinstance(manifest, EvaluationManifest) and any(
            parent.sha256 == source.content_hash for parent in manifest.parents
        ):
            manifests.append(manifest)
    found: dict[str, Score] = {}
    for manifest in sorted(manifests, key=lambda one: one.created):
        found |= _scores(manifest, source.name)
    return found


def _scores(manifest: EvaluationManifest, name: str) -> dict[str, Score]:
    """Scores of the model of this name; none from results that another version wrote."""
    try:
        results = Results.model_validate(manifest.results)
    except ValidationError:
        return {}
    found: dict[str, Score] = {}
    for model in results.models:
        if model.subject.name != name:
            continue
        for metric in METRICS.values():
            for one in metric.numbers(model):
                if (told := one.published) is not None:
                    result = EvalResult(
                        "text-generation",
                        dataset_type=told.data,
                        dataset_name=told.data,
                        metric_type=told.metric,
                        metric_value=one.value,
                    )
                    found[told.name] = Score(f"{one.text} ({told.extent})", result)
    return found


def _head(path: Path) -> dict[str, Any]:
    """What the YAML at the head of a card says of licence, language and base; empty where it cannot be read."""
    try:
        text = read_small(path, limits.CARD_SIZE).decode("utf-8")
    except (OSError, ValueError):
        return {}
    if not text.startswith(_FRONT):
        return {}
    head = text.removeprefix(_FRONT).partition(f"\n{_FRONT}")[0]
    if len(head) > limits.CARD_HEAD_SIZE:
        return {}
    try:
        found = parse_yaml(head, frozenset(_KEPT))
    except (yaml.YAMLError, ValueError):
        return {}
    return {key: value for key, value in found.items() if _is_plain(value)} if isinstance(found, dict) else {}


def _is_plain(value: object) -> bool:
    """Whether a value of a card's head is a text or a list of texts, as the Hub has them."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))

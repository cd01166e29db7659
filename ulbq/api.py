"""The commands as functions: ``ulbq.quantize("model", method="efficientqat", bits=2, output="q")``.

Options have the names and defaults of the command line, ``group_size`` for ``--group-size``. None leaves one open.
Every function raises :class:`~ulbq.errors.UlbqError`: UsageError for values that do not go together, InputError for
a source that cannot be used, ResourceError for what the machine lacks, NumericsError where the numbers went wrong.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ulbq.artifacts.manifest import (
        ConvertedManifest,
        EvaluationManifest,
        QuantizedManifest,
        SaliencyManifest,
        SweepManifest,
    )
    from ulbq.config.run import PrecisionName
    from ulbq.evaluation.results import Results
    from ulbq.pipeline.recommend import Recommendation
    from ulbq.progress import Progress

Source = str | os.PathLike[str]
"""Hub id, model folder, GGUF file, artifact or smollm2-135m."""
Written = TypeVar("Written")


class Artifact(NamedTuple, Generic[Written]):
    """What a function wrote.

    Attributes:
        path: its folder.
        manifest: what it is, how it was made and what that took.
    """

    path: Path
    manifest: Written


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        path: folder with the report.
        manifest: of that folder.
        results: the scores of every model.
    """

    path: Path
    manifest: "EvaluationManifest"
    results: "Results"


class Loaded(NamedTuple):
    """A model in memory, and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def quantize(
    model: Source | None = None,
    *,
    method: str | None = None,
    recipe: str | None = None,
    output: Source | None = None,
    progress: "Progress | None" = None,
    **options: Any,
) -> "Artifact[QuantizedManifest]":
    """Quantize a model to 1 to 4 bits, as ``ulbq quantize`` does. A stopped run goes on where it was.

    Args:
        model: None for the default model.
        method: None for the recipe's, or ``db-llm``.
        recipe: name of a shipped recipe or a YAML file; what is given here wins.
        output: folder for the artifact; None for a telling name under ``./artifacts``.
        progress: told how it goes; None for silence.
        options: fields of :class:`~ulbq.config.quantize.QuantizeRequest`.
    """
    from ulbq.pipeline.quantize import quantize as run
    from ulbq.pipeline.recipes import load, request_of

    given = _given("quantize", options, source=model, method=method, out=output)
    if recipe is None:
        given.setdefault("method", "db-llm")
    with _checked():
        request = request_of(given, None if recipe is None else load(recipe))
    return Artifact(*run(request, progress))


def saliency(
    model: Source | None = None, *, output: Source | None = None, progress: "Progress | None" = None, **options: Any
) -> "Artifact[SaliencyManifest]":
    """Score every weight of a model by how much the model depends on it, as ``ulbq saliency`` does.

    Args:
        model: None for the default model.
        output: folder for the scores; None for a telling name under ``./artifacts``.
        progress: told how it goes; None for silence.
        options: fields of :class:`~ulbq.config.saliency.SaliencyRequest`.
    """
    from ulbq.config.saliency import SaliencyRequest
    from ulbq.pipeline.saliency import saliency as run

    with _checked():
        request = SaliencyRequest.model_validate(_given("saliency", options, source=model, out=output))
    return Artifact(*run(request, progress))


def sweep(
    model: Source | None = None, *, output: Source | None = None, progress: "Progress | None" = None, **options: Any
) -> "Artifact[SweepManifest]":
    """Quantize a model by many settings and compare them, as ``ulbq sweep`` does. A stopped one goes on where it was.

    Args:
        model: None for the default model.
        output: folder for the sweep; None for a telling name under ``./artifacts``.
        progress: told how it goes; None for silence.
        options: fields of :class:`~ulbq.config.sweep.SweepRequest`; ``options`` are those of every run.
    """
    from ulbq.config.sweep import SweepRequest
    from ulbq.pipeline.sweep import sweep as run

    with _checked():
        request = SweepRequest.model_validate(_given("sweep", options, source=model, out=output))
    return Artifact(*run(request, progress))


def recommend(model: Source | None = None, *, progress: "Progress | None" = None, **options: Any) -> "Recommendation":
    """Find the setting that is expected to lose least within limits, as ``ulbq recommend`` does.

    Args:
        model: None for the default model.
        progress: told how it goes; None for silence.
        options: fields of :class:`~ulbq.config.recommend.RecommendRequest`.

    Returns:
        What to do: ``quantize(model, **found.best.options)``.
    """
    from ulbq.config.recommend import RecommendRequest
    from ulbq.pipeline.recommend import recommend as run

    with _checked():
        request = RecommendRequest.model_validate(_given("recommend", options, source=model))
    return run(request, progress)[0]


def evaluate(
    *models: Source, output: Source | None = None, progress: "Progress | None" = None, **options: Any
) -> Evaluation:
    """Measure one model, or compare several, as ``ulbq eval`` does.

    Args:
        models: at least one.
        output: folder for the report; None for a telling name under ``./artifacts``.
        progress: told how it goes; None for silence.
        options: fields of :class:`~ulbq.config.evaluate.EvaluateRequest`.
    """
    from ulbq.config.evaluate import EvaluateRequest
    from ulbq.evaluation.results import Results
    from ulbq.pipeline.evaluate import evaluate as run

    sources = tuple(os.fspath(model) for model in models)
    with _checked():
        request = EvaluateRequest.model_validate(_given("evaluate", options, out=output) | {"sources": sources})
    path, manifest = run(request, progress)
    return Evaluation(path, manifest, Results.model_validate(manifest.results))


def convert(
    artifact: Source, *, output: Source | None = None, progress: "Progress | None" = None, **options: Any
) -> "Artifact[ConvertedManifest | QuantizedManifest]":
    """Write a model in a layout that other tools load, as ``ulbq convert`` does.

    Args:
        artifact: what is converted.
        output: folder for the result; None for a telling name under ``./artifacts``.
        progress: told how it goes; None for silence.
        options: fields of :class:`~ulbq.config.convert.ConvertRequest`.
    """
    from ulbq.config.convert import ConvertRequest
    from ulbq.pipeline.convert import convert as run

    with _checked():
        request = ConvertRequest.model_validate(_given("convert", options, source=artifact, out=output))
    return Artifact(*run(request, progress))


def finetune(
    artifact: Source, *, task: str, output: Source | None = None, progress: "Progress | None" = None, **options: Any
) -> "Artifact[QuantizedManifest]":
    """Teach a quantized artifact, packed as it is, as ``ulbq finetune`` does. A stopped run goes on where it was.

    Args:
        artifact: what learns.
        task: name of a shipped task or a YAML file; ``end-to-end`` trains the whole model.
        output: folder for the result; None for a telling name under ``./artifacts``.
        progress: told how it goes; None for silence.
        options: fields of :data:`~ulbq.config.finetune.FinetuneOptions`.
    """
    from ulbq.config.finetune import FinetuneOptions
    from ulbq.config.options import renamed
    from ulbq.pipeline.finetune import finetune as run
    from ulbq.pipeline.finetune import prepare
    from ulbq.progress import Silent

    with _checked():
        given = renamed(FinetuneOptions, _given("finetune", options, out=output))
        read = FinetuneOptions.model_validate(given)
    asked = {name: getattr(read, name) for name in given}
    job = prepare(os.fspath(artifact), task, asked, progress or Silent())
    return Artifact(*run(job, progress or Silent()))


def push(
    artifact: Source,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    progress: "Progress | None" = None,
) -> str:
    """Upload an artifact with its model card to the Hugging Face Hub, as ``ulbq push`` does.

    Args:
        artifact: its folder.
        repo: ``owner/name``; a new one is made.
        private: whether a new one is private.
        revision: branch; None for ``main``.
        progress: told how it goes; None for silence.

    Returns:
        The repository's address.
    """
    from ulbq.config.push import PushRequest
    from ulbq.pipeline.push import push as run

    with _checked():
        request = PushRequest(source=os.fspath(artifact), repo=repo, private=private, revision=revision)
    return run(request, progress)


def load(model: Source, *, device: str = "auto", precision: "PrecisionName" = "auto", offline: bool = False) -> Loaded:
    """A model ready to run, its quantized layers packed as they are.

    Args:
        model: an artifact, or a full-precision model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; or several with commas, for a model that one has no room for.
        precision: ``auto``, ``fp32`` or ``bf16``; dtype of parameters and products.
        offline: never touch the network.
    """
    from ulbq import runtime
    from ulbq.config.run import PrecisionName
    from ulbq.errors import UsageError
    from ulbq.models.source import resolve
    from ulbq.models.spread import load_spread
    from ulbq.training.precision import Precision

    if precision not in get_args(PrecisionName):
        raise UsageError(f"There is no `precision={precision}`.", hint=f"Known: {', '.join(get_args(PrecisionName))}.")
    where = runtime.resolve_devices(device)
    source = resolve(os.fspath(model), offline=offline)
    dtype = Precision.choose(where[0], precision).dtype
    return Loaded(load_spread(source, where, dtype=dtype), source.tokenizer())


def _given(function: str, options: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """What was asked for, under the names of a request's fields; paths are text where a field reads them."""
    from ulbq.errors import UsageError

    if "out" in options or "source" in options:
        raise UsageError(f"ulbq.{function}() takes `output`, and the model first.")
    paths = {name: os.fspath(value) for name, value in named.items() if value is not None}
    return {name: value for name, value in {**options, **paths}.items() if value is not None}


@contextmanager
def _checked() -> Iterator[None]:
    """Turn what pydantic says of a request into one sentence. Raises UsageError."""
    from pydantic import ValidationError

    from ulbq.errors import UsageError

    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"])) or "options"
        if problem["type"] == "extra_forbidden":
            raise UsageError(
                f"There is no option `{name}`.", hint="See docs/reference/cli.md for all of them."
            ) from None
        raise UsageError(f"`{name}={problem['input']}`: {problem['msg']}.") from error

"""What ``eval`` is asked to do."""

from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationInfo

from ulbq.config.options import HOW, MEASURE, Option, Settings
from ulbq.config.run import (
    CudaGraphs,
    DataDir,
    Devices,
    DtypeName,
    Force,
    Offline,
    Out,
    PrefillCache,
    Seed,
    Template,
    Verify,
)
from ulbq.errors import UsageError

_TASKS = (
    *("piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "social_iqa", "arithmetic-cot", "commonsense"),
    *("gsm8k-cot", "svamp", "mawps", "aqua", "boolq-instruct", "piqa-instruct", "siqa-instruct", "hellaswag-instruct"),
    *("winogrande-instruct", "arc_easy-instruct", "arc_challenge-instruct", "openbookqa-instruct"),
)

# Beyond any text there is: a slip of the finger, and better said than tried.
_MOST = 2**31 - 1


def _read_names(given: object, info: ValidationInfo) -> object:
    """Words of ``a,b``; an option that is given must name something."""
    if isinstance(given, int | float):
        return (given,)
    if not isinstance(given, str):
        return given
    names = tuple(name.strip() for name in given.split(",") if name.strip())
    if not names:
        raise UsageError(f"`{info.field_name}` names nothing.", hint=f"As in: `{info.field_name}=a,b`")
    return names


Listed = BeforeValidator(_read_names)
"""Reads ``a,b`` as several values."""
Names = Annotated[tuple[str, ...], Listed]


class ScoreOptions(Settings):
    """What is measured of a model, how, and on how much."""

    perplexity: Annotated[
        Names,
        Option(
            "Text sets: wikitext2, c4, ptb.",
            MEASURE,
            "NAME,…",
            default="wikitext2 if nothing else is asked",
            primary=True,
            offers=("wikitext2", "c4", "ptb"),
        ),
    ] = ()
    tasks: Annotated[
        Names,
        Option(
            "lm-eval tasks, as in piqa,arc_easy,'mmlu_*', and tasks with written answers: "
            "gsm8k-cot, svamp, mawps, aqua, commonsense.",
            MEASURE,
            "NAME,…",
            primary=True,
            offers=_TASKS,
        ),
    ] = ()
    context: Annotated[
        Annotated[int, Field(ge=2, le=_MOST)] | None,
        Option("Tokens a window of text.", HOW, "N", default="1024, or the longest that every model takes"),
    ] = None
    limit: Annotated[
        Annotated[int, Field(ge=0, le=_MOST)] | None,
        Option(
            "Windows a text and documents a task; 0 for all.",
            HOW,
            "N",
            default="all; 32 on a CPU if nothing is asked",
            primary=True,
        ),
    ] = None
    fewshot: Annotated[
        Annotated[int, Field(ge=0, le=_MOST)] | None,
        Option("Examples in a task's prompt.", HOW, "N", default="as the task says"),
    ] = None
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=_MOST)] | None,
        Option("Sequences at once.", HOW, "N", default="as many as memory takes"),
    ] = None
    dtype: Annotated[DtypeName, Option("What the models compute in.", HOW)] = "bf16"


class EvaluateRequest(ScoreOptions):
    """An evaluation of one or more models.

    Attributes:
        sources: models; also finished evaluations, whose scores are taken over where the protocol is the same.
        seed: of text that a parent writes itself.
    """

    sources: tuple[str, ...] = Field(min_length=1)
    prompts: Annotated[
        tuple[str, ...],
        Option(
            "Let every model and its full-precision parent go on from this text, beside the scores, and time it; can "
            "be given more than once.",
            MEASURE,
            "TEXT",
            flag="--prompt -p",
            primary=True,
            repeated=True,
            default="'The capital of France is' if nothing else is asked",
        ),
    ] = ()
    template: Annotated[
        Template | None,
        Option(
            "How questions that want a written answer, and prompts, are laid out.",
            HOW,
            default="questions as the model was fine-tuned, else alpaca; prompts as bare text",
        ),
    ] = None
    max_new_tokens: Annotated[
        Annotated[int, Field(ge=1, le=_MOST)] | None,
        Option("Longest written answer, or text after a prompt.", HOW, "N", default="256, commonsense and --prompt 32"),
    ] = None
    fidelity: Annotated[
        bool | None,
        Option(
            "Compare predictions with the full-precision parent's.",
            MEASURE,
            default="if nothing else is asked",
            primary=True,
        ),
    ] = None
    adapter: Annotated[
        bool, Option("Score an artifact with the adapter that it has, or its base alone.", MEASURE, primary=True)
    ] = True
    parent: Annotated[
        str | None, Option("The full-precision parent.", MEASURE, "SOURCE", default="the one on record", primary=True)
    ] = None
    parent_scores: Annotated[bool, Option("Score the parent too.", MEASURE)] = True
    score_cache: Annotated[
        bool, Option("Keep scores of full-precision models for later runs, and take those that are kept.", HOW)
    ] = True
    prefill_cache: PrefillCache = False
    cuda_graphs: CudaGraphs = True
    stream: Annotated[
        bool | None,
        Option("Read a model block by block as it runs, or load it.", HOW, default="by what memory has room for"),
    ] = None
    seed: Seed = 0
    device: Devices = "auto"
    data_dir: DataDir = None
    offline: Offline = False
    verify: Verify = True
    out: Out = None
    force: Force = False

    @property
    def asks(self) -> bool:
        """Whether it names any score to take. A prompt is none."""
        return bool(self.perplexity or self.tasks or self.fidelity)

"""What an evaluation is asked to do, and what that means in full: settled before the first model is loaded."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ulbq import runtime
from ulbq.config.evaluate import EvaluateRequest
from ulbq.data.mirror import data_root
from ulbq.data.prompts import choose_template
from ulbq.data.registry import available, text_set
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation.continuations import NEW_TOKENS, opening
from ulbq.evaluation.evaluated import EvaluatedModel, open_candidates
from ulbq.evaluation.generative_tasks import GENERATIVE_NAMES, GenerativeTasks, load_generative
from ulbq.evaluation.harness import Tasks, check_tasks, load_tasks
from ulbq.evaluation.measurer import Measures
from ulbq.evaluation.results import Protocol
from ulbq.models.decoding import check_prompt, check_room
from ulbq.models.load import DTYPES
from ulbq.pipeline.recorded import Recorded, read_recorded
from ulbq.progress import Progress

DEFAULT_TEXT = "wikitext2"
DEFAULT_CONTEXT = 1024
DEFAULT_PROMPT = "The capital of France is"
"""What models and their parents go on from where nothing was asked for."""
CPU_WINDOWS = 32
"""Windows of text where nothing was asked for and there is no GPU: minutes instead of a quarter of an hour."""


@dataclass(frozen=True)
class EvaluationJob:
    """Everything that is settled before the first model is loaded.

    Attributes:
        candidates: the models to be measured; empty where all sources are finished evaluations.
        measures: None where there is nothing to measure.
    """

    request: EvaluateRequest
    candidates: list[EvaluatedModel]
    recorded: list[Recorded]
    measures: Measures | None
    protocol: Protocol
    device: torch.device

    @property
    def parents(self) -> list[EvaluatedModel]:
        """The full-precision parents, each once."""
        return list(
            {candidate.parent.name: candidate.parent for candidate in self.candidates if candidate.parent}.values()
        )


def prepare(request: EvaluateRequest, progress: Progress) -> EvaluationJob:
    """Check a request, open its models and load its tasks' data.

    Raises:
        UsageError: options, tasks or text sets that do not exist, or do not go together.
        InputError: a source that cannot be evaluated.
        ResourceError: data or lm-eval are missing; nothing can be measured here.
    """
    for name in request.perplexity:
        text_set(name)
    data_root(request.data_dir)
    for prompt in request.prompts:
        check_prompt(prompt)
    _check_generative(request)
    device = runtime.resolve_devices(request.device)[0]
    # A finished evaluation alone is no model to evaluate, and resolving it will say so.
    recorded, sources = read_recorded(request.sources) if len(request.sources) > 1 else ([], list(request.sources))
    candidates = open_candidates(
        sources,
        parent=request.parent,
        adapter=request.adapter,
        offline=request.offline,
        verify=request.verify,
        progress=progress,
    )
    if candidates:
        measures = measures_of(request, candidates, device, progress)
        protocol = protocol_of(request, measures)
    elif request.asks or request.prompts:
        raise UsageError(
            "Finished evaluations are put side by side as they are: nothing is measured.",
            hint="Leave out `perplexity`, `tasks`, `fidelity` and `prompts`, or name the models.",
        )
    else:
        measures, protocol = None, recorded[0].results.protocol
    for one in recorded:
        one.check(protocol)
    return EvaluationJob(request, candidates, recorded, measures, protocol, device)


def measures_of(
    request: EvaluateRequest, candidates: Sequence[EvaluatedModel], device: torch.device, progress: Progress
) -> Measures:
    """What a request comes to for these models. Raises as :func:`prepare`."""
    perplexity, fidelity = _texts(request, candidates, progress)
    limit = request.limit or None
    if request.limit is None and not request.asks and perplexity and device.type == "cpu":
        limit = CPU_WINDOWS
        progress.note(f"On a CPU, nothing asked: the first {limit} windows of the text (`limit=0` reads all).")
    # What is ours to read comes first: it is quick, and lm-eval need not be there for it.
    prompts = _prompts(request, candidates)
    generative = _generative(request, candidates, limit, progress)
    return Measures(
        perplexity=perplexity,
        tasks=_tasks(request, progress) if _of_lm_eval(request) else None,
        generative=generative,
        prompts=prompts,
        fidelity=fidelity,
        context=_context(request, candidates),
        limit=limit,
        dtype=DTYPES[request.dtype],
        device=device,
    )


def _texts(
    request: EvaluateRequest, candidates: Sequence[EvaluatedModel], progress: Progress
) -> tuple[tuple[str, ...], str | None]:
    """The text sets to take perplexity on, and the text to compare with the parent on (None: no comparison)."""
    comparable = any(candidate.parent for candidate in candidates)
    wanted = not request.asks if request.fidelity is None else request.fidelity
    if request.fidelity and not comparable:
        raise InputError(
            "There is no full-precision model to compare with.", hint="Name the one it was made from with `parent`."
        )
    perplexity, fidelity = request.perplexity, None
    if not request.asks or (wanted and comparable):
        at_hand = available(DEFAULT_TEXT, "test", data_dir=request.data_dir, offline=request.offline)
        if wanted and comparable:
            fidelity = DEFAULT_TEXT if at_hand else "self"
        if not request.asks and at_hand:
            perplexity = (DEFAULT_TEXT,)
        if not at_hand:
            instead = "the parent writes its own text for the comparison" if fidelity else "no perplexity"
            progress.note(f"WikiText-2 cannot be had here: {instead}.")
    if not (perplexity or fidelity or request.asks or request.prompts):
        raise ResourceError(
            "Nothing can be measured: WikiText-2 cannot be had, and there is no full-precision model to compare with.",
            hint="Give a mirror of WikiText-2 with `data_dir`, a `parent`, `tasks` or `prompts`.",
        )
    return perplexity, fidelity


def _check_generative(request: EvaluateRequest) -> None:
    given = {"`template`": request.template, "`max_new_tokens`": request.max_new_tokens}
    for option, value in given.items():
        if value is not None and not (request.prompts or set(request.tasks) & set(GENERATIVE_NAMES)):
            raise UsageError(
                f"{option} means nothing to tasks of lm-eval, which lay out their own prompts."
                if request.tasks
                else f"{option} means nothing without `tasks` or `prompts`.",
                hint=f"It is for `prompts`, and tasks {', '.join(GENERATIVE_NAMES)}.",
            )


def _prompts(request: EvaluateRequest, candidates: Sequence[EvaluatedModel]) -> tuple[str, ...]:
    """What models go on from, each once: what was asked, else one prompt beside the scores that nobody chose.

    Raises:
        UsageError, InputError: a model does not hold a prompt that was asked for, and what is written on from it.
    """
    if request.prompts:
        return _held(tuple(dict.fromkeys(request.prompts)), request, candidates)
    with suppress(UsageError):  # of a model that is too short for it
        if not request.asks and request.fidelity is None and request.parent_scores:
            return _held((DEFAULT_PROMPT,), request, candidates)
    return ()


def _held(prompts: tuple[str, ...], request: EvaluateRequest, candidates: Sequence[EvaluatedModel]) -> tuple[str, ...]:
    """The prompts, where every model holds them and what is written on from them."""
    models = [one for candidate in candidates for one in (candidate.parent, candidate) if one is not None]
    for prompt in prompts:
        for one in models:
            tokens = opening(prompt, one.source.tokenizer(), request.template)
            check_room(one.source, len(tokens), request.max_new_tokens or NEW_TOKENS)
    return prompts


def _of_lm_eval(request: EvaluateRequest) -> tuple[str, ...]:
    return tuple(name for name in request.tasks if name not in GENERATIVE_NAMES)


def _generative(
    request: EvaluateRequest, candidates: Sequence[EvaluatedModel], limit: int | None, progress: Progress
) -> GenerativeTasks | None:
    names = [name for name in request.tasks if name in GENERATIVE_NAMES]
    if not names:
        return None
    if request.template == "chat":
        for candidate in candidates:
            choose_template("chat", candidate.source.tokenizer())
    found = load_generative(names, limit=limit, data_dir=request.data_dir)
    for group in found.groups:
        if group.missing:
            progress.note(
                f"'{group.name}' goes without {', '.join(group.missing)}, which the mirror does not have: "
                f"the mean is that of {len(group.members)} sets."
            )
    return found


def _tasks(request: EvaluateRequest, progress: Progress) -> Tasks:
    with progress.phase("Reading lm-eval's list of tasks"):
        names = check_tasks(_of_lm_eval(request), others=GENERATIVE_NAMES)
    with progress.phase("Loading the data of tasks"):
        return load_tasks(names, fewshot=request.fewshot, data_dir=request.data_dir, offline=request.offline)


def _context(request: EvaluateRequest, candidates: Sequence[EvaluatedModel]) -> int:
    """Tokens a window: as asked, if every model takes it, else the usual or what every model takes."""
    longest = {
        candidate.name: getattr(candidate.source.config.get_text_config(), "max_position_embeddings", None)
        for candidate in candidates
    }
    known = {name: length for name, length in longest.items() if length}
    most = min(known.values(), default=DEFAULT_CONTEXT)
    if request.context is None:
        return min(DEFAULT_CONTEXT, most)
    if known and request.context > most:
        name = min(known, key=lambda name: known[name])
        raise UsageError(
            f"'{name}' takes {most:,} tokens, fewer than `context={request.context}`.",
            hint=f"At most `context={most}`.",
        )
    return request.context


def protocol_of(request: EvaluateRequest, measures: Measures) -> Protocol:
    """How the scores are taken, for whoever compares them with others."""
    return Protocol(
        context=measures.context,
        limit=measures.limit,
        fewshot=request.fewshot,
        dtype=str(measures.dtype).removeprefix("torch."),
        seed=request.seed,
        template=request.template,
        max_new_tokens=request.max_new_tokens,
    )

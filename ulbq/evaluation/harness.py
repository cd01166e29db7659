"""Benchmark tasks, through lm-eval: its tasks, prompts, metrics and standard errors, our model interface."""

import difflib
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation.adapter import lm_eval_model
from ulbq.evaluation.lm import LanguageModel
from ulbq.evaluation.results import Measured, TaskScore
from ulbq.evaluation.task_data import member_tasks, mirrored
from ulbq.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ulbq.blockwise.streamed import AnyModel

_FEWSHOT_SEED = 1234  # lm-eval's own: another would give other prompts, and scores that compare with nobody's


class Tasks:
    """Loaded tasks, ready to be run on any number of models; made by :func:`load_tasks`.

    Attributes:
        loaded: what lm-eval's task manager returned.
    """

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded


def check_tasks(names: Sequence[str], *, others: Sequence[str] = ()) -> list[str]:
    """Expand patterns such as ``mmlu_*`` and check every name.

    Args:
        names: tasks, tags, groups or patterns.
        others: names of tasks that are not lm-eval's, for the hint alone.

    Raises:
        UsageError: no such task, tag or group; the hint gives those that come close.
        ResourceError: lm-eval is not installed.
    """
    known: list[str] = _manager().all_tasks
    found: list[str] = []
    for name in names:
        matching = _manager().match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, [*others, *known], n=5)
            hint = f"Did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them all."
            raise UsageError(f"lm-eval has no task '{name}'.", hint=hint)
        found += matching
    return list(dict.fromkeys(found))


def load_tasks(
    names: Sequence[str], *, fewshot: int | None = None, data_dir: Path | None = None, offline: bool = False
) -> Tasks:
    """Load tasks with their data, from the mirror where it has the set, else the local Hub cache, else the Hub.

    Args:
        names: tasks, tags or groups that :func:`check_tasks` passed.
        fewshot: examples in each prompt; None: as the task says. A task that says 0 keeps it, as in lm-eval.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.

    Raises:
        UsageError: two of the names contain the same task.
        InputError: the mirror's data do not fit a task.
        ResourceError: data that cannot be had here, or a task that needs a package which is not installed.
    """
    manager = _manager()
    members = {name: member_tasks(manager.task_index, name) for name in names}
    _check_overlap(members)
    every = set().union(*members.values())
    with tempfile.TemporaryDirectory() as folder, mirrored(manager.task_index, every, data_dir, Path(folder)):
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            for part, found in _load(name, offline).items():
                loaded[part].update(found)
    for task in loaded["tasks"].values():
        _set_fewshot(task, fewshot)
    return Tasks(loaded)


def run_tasks(
    model: "AnyModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "the model",
) -> dict[str, TaskScore]:
    """Score a model on tasks.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        tasks: from :func:`load_tasks`.
        limit: documents a task, the first ones; None: all.
        batch_size: sequences a batch; None: as many as the device's memory takes.
        progress: told about every request.
        label: what the progress calls the model.

    Returns:
        Scores by the name of task or group; groups first.

    Raises:
        InputError: a document does not fit its task, or a prompt lacks the examples it should have.
        ResourceError: not even one prompt fits into the device's memory.
    """
    from lm_eval.evaluator import evaluate

    lm = lm_eval_model(LanguageModel(model, tokenizer, batch_size=batch_size, progress=progress, label=label))
    with _quiet():
        try:
            found = evaluate(lm, task_dict=tasks.loaded, limit=limit, log_samples=False)
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(
                f"A task could not be run ({type(error).__name__}: {error}).",
                hint="Its data may lack a split or a column; `debug` shows where.",
            ) from error
    return _scores(found, {name: _chance(task, limit) for name, task in tasks.loaded["tasks"].items()})


def told_apart(tasks: Tasks, limit: int | None) -> dict[str, Any]:
    """What scores follow from besides the model: of each task its version, examples and a hash over its documents."""
    return {
        name: [str(task.VERSION), task.get_config("num_fewshot"), _digest(task, limit)]
        for name, task in tasks.loaded["tasks"].items()
    } | {"groups": sorted(tasks.loaded["groups"])}


def _digest(task: Any, limit: int | None) -> str:
    digest = hashlib.sha256()
    for _, document in task.doc_iterator(limit=limit):
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _chance(task: Any, limit: int | None) -> float | None:
    """Share of right answers that guessing gives: the mean of one over the number of choices; None without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return fmean(1 / len(task.doc_to_choice(document)) for _, document in task.doc_iterator(limit=limit))


@cache
def _manager() -> Any:
    """lm-eval's task manager; it reads some ten thousand YAML files, which takes seconds."""
    if find_spec("lm_eval") is None:
        raise ResourceError("Tasks need lm-eval, which is not installed.", hint='pip install "ulbq[eval]"')
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager()


def _or_go_online(offline: bool) -> str:
    """What else would help, depending on who keeps the run from the network."""
    if offline:
        return ", or leave out `offline`"
    named = next((name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)), None)
    return f", or unset {named}" if named else ", or check the network"


def _load(name: str, offline: bool) -> Mapping[str, Any]:
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        with _quiet(), _offline(offline):
            loaded: Mapping[str, Any] = _manager().load([name])
    except (OSError, DatasetsError) as error:
        raise ResourceError(
            f"The data of task '{name}' cannot be had here ({error}).",
            hint=f"Give a mirror of it with `data_dir` or ULBQ_DATA_DIR{_or_go_online(offline)}.",
        ) from error
    except ImportError as error:
        raise ResourceError(f"Task '{name}' needs a package: {error}.", hint='pip install "lm-eval[all]"') from error
    except (ValueError, KeyError, IndexError, TemplateError) as error:
        raise InputError(
            f"The data of task '{name}' do not fit it ({type(error).__name__}: {error}).",
            hint="Check the splits and columns of its folder in the mirror.",
        ) from error
    return loaded


def _check_overlap(members: Mapping[str, set[str]]) -> None:
    owner: dict[str, str] = {}
    for name, tasks in members.items():
        for task in tasks:
            if owner.setdefault(task, name) != name:
                raise UsageError(
                    f"'{owner[task]}' and '{name}' both contain the task '{task}'.", hint="Leave one of them out."
                )


def _set_fewshot(task: Any, fewshot: int | None) -> None:
    """lm-eval's own rule, which it applies in ``simple_evaluate``."""
    default = task.get_config("num_fewshot")
    if default != 0 and (fewshot is not None or default is None):
        task.set_config(key="num_fewshot", value=fewshot or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _scores(found: Mapping[str, Any], chances: Mapping[str, float | None]) -> dict[str, TaskScore]:
    children: dict[str, list[str]] = found.get("group_subtasks", {})
    rows = {**found.get("groups", {}), **found["results"]}
    aggregated = {name for name in rows if name in children and _metrics(rows[name], {}, None)}
    member_of = {child: group for group in children if group in aggregated for child in children[group]}
    scores = {}
    for name, row in rows.items():
        guessed = _chance_of(name, found["n-samples"], children, chances)
        metrics = _metrics(row, found["higher_is_better"].get(name, {}), guessed)
        if metrics:
            scores[name] = TaskScore(
                metrics=metrics,
                samples=_samples(name, found["n-samples"], children),
                fewshot=int(found["n-shot"].get(name, 0)),
                version=str(found["versions"].get(name, "")),
                member_of=member_of.get(name),
            )
    return scores


def _samples(name: str, counts: Mapping[str, Mapping[str, int]], children: Mapping[str, Sequence[str]]) -> int:
    if name in counts:
        return counts[name]["effective"]
    return sum(_samples(child, counts, children) for child in children.get(name, ()))


def _chance_of(
    name: str,
    counts: Mapping[str, Mapping[str, int]],
    children: Mapping[str, Sequence[str]],
    chances: Mapping[str, float | None],
) -> float | None:
    """Of a task, or of a group the mean over all documents of its members; None where one of them has none."""
    if name in chances:
        return chances[name]
    members = {child: _chance_of(child, counts, children, chances) for child in children.get(name, ())}
    known = {child: chance for child, chance in members.items() if chance is not None}
    sizes = {child: _samples(child, counts, children) for child in known}
    if not known or len(known) < len(members):
        return None
    return sum(known[child] * sizes[child] for child in known) / sum(sizes.values())


def _metrics(
    row: Mapping[str, Any], higher_is_better: Mapping[str, bool | None], chance: float | None
) -> dict[str, Measured]:
    """Metrics of one row of lm-eval's results, whose keys read ``acc,none`` and ``acc_stderr,none``."""
    metrics = {}
    for key, value in row.items():
        metric, comma, made_by = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{made_by}")
        metrics[metric if made_by == "none" else f"{metric},{made_by}"] = Measured(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            chance=chance if metric.startswith("acc") else None,
            higher_is_better=higher_is_better.get(metric) is not False,
        )
    return metrics


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval and ``datasets`` from printing and drawing bars: the caller alone talks to the terminal."""
    import datasets
    from lm_eval.api import task as task_module

    logger = logging.getLogger("lm_eval")
    level, bar, drawn = logger.level, task_module.tqdm, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda documents, **_: documents  # its one bar without a switch
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
        if not drawn:
            datasets.enable_progress_bars()


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Keep ``datasets`` and the Hub client off the network within the body."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before[0] or offline, before[1] or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before

"""What a fine-tuning run is asked for, and the recipes that fill in what is left open."""

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ulbq.artifacts.names import local_path
from ulbq.config.finetune import FinetuneRequest
from ulbq.config.run import RecipeRecord
from ulbq.errors import InputError, UsageError
from ulbq.pipeline.recipe_files import read_recipe_file, read_yaml
from ulbq.training.tuner import TunerSettings

_SUFFIXES = (".yaml", ".yml")
_KEYS = ("name", "description", "source", "options")


class Task(BaseModel):
    """A recipe of ``ulbq finetune``.

    Attributes:
        name: what it is asked for by; of a file, what is in it.
        description: one line.
        source: where its values come from.
        options: fields of a request.
        sha256: of the file's bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    source: str
    options: dict[str, Any]
    sha256: str


_OF_ONE_RUN = frozenset({"source", "task", "recipe", "out", "force", "device", "data_dir", "offline", "seed"})
# Of a new adapter: a recipe's are for artifacts that have none.
_FORM = ("rank", "alpha", "dora", "targets")


def task_names() -> list[str]:
    """Names of the shipped tasks."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(_SUFFIXES))


def load_task(given: str) -> Task:
    """Read a task's recipe.

    Args:
        given: a shipped task's name, or a YAML file.

    Raises:
        UsageError: neither, or options that no request has.
        InputError: a file that cannot be read or is no recipe.
    """
    path = local_path(given)
    if given in task_names():
        raw = (_folder() / f"{given}.yaml").read_bytes()
    elif path.suffix in _SUFFIXES and path.is_file():
        raw = read_recipe_file("Task", path)
    elif path.suffix in _SUFFIXES:
        raise InputError(f"There is no task file '{given}'.", hint=f"Shipped tasks: {', '.join(task_names())}.")
    else:
        raise UsageError(
            f"There is no task '{given}'.",
            hint=f"Tasks: end-to-end, {', '.join(task_names())}; a .yaml file of options; "
            "or `task=instructions` with `data=FILE`.",
        )
    content = read_yaml("Task", given, raw)
    if not isinstance(content, dict) or set(content) != set(_KEYS) or not isinstance(content["options"], dict):
        raise InputError(f"'{given}' is no task.", hint="It has the keys name, description, source and options.")
    unknown = sorted(map(str, content["options"].keys() - (FinetuneRequest.model_fields.keys() - _OF_ONE_RUN)))
    if unknown:
        raise UsageError(f"Task '{given}' has an unknown option '{unknown[0]}'.", hint="Mend the file.")
    texts = {key: str(content[key] or "") for key in ("name", "description", "source")}
    return Task(**texts, options=content["options"], sha256=hashlib.sha256(raw).hexdigest())


def request_of(source: str, task: Task, given: Mapping[str, Any], *, adapted: bool) -> FinetuneRequest:
    """The request of a command line: what was given wins over the recipe.

    Args:
        source: path of the artifact.
        task: the recipe.
        given: fields of the request; None for what was not given.
        adapted: whether the artifact has an adapter.

    Raises:
        UsageError: values that do not go together, or the form of an adapter that is there already.
    """
    explicit = {name: value for name, value in given.items() if value is not None}
    fresh = bool(explicit.get("fresh"))
    if fresh and not adapted:
        raise UsageError("`fresh`: the artifact has no adapter to leave behind.", hint="Leave it out.")
    goes_on = adapted and not fresh
    typed = sorted(set(_FORM) & explicit.keys())
    if goes_on and typed:
        raise UsageError(
            f"`{typed[0]}`: the artifact has a trained adapter, and that goes on as it is.",
            hint="Leave it out; or begin anew with `fresh`, which loses what that adapter has learnt.",
        )
    options = dict(task.options)
    if goes_on:
        options = {name: value for name, value in options.items() if name not in (*_FORM, "dropout")}
    record = RecipeRecord(name=task.name, sha256=task.sha256)
    values = {**options, **explicit, "source": source, "task": task.name, "recipe": record}
    try:
        request = FinetuneRequest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UsageError(f"'{where}' of task '{task.name}': {problem['msg']}.", hint="See --help.") from error
    if request.data is None:
        raise UsageError(f"Task '{task.name}' has no data of its own.", hint="Name it with `data=FILE` or a Hub id.")
    idle = sorted({"scale_rate", "scale_decay"} & explicit.keys())
    if request.train != "adapter-scales" and idle:
        raise UsageError(f"`{idle[0]}` means nothing where no scales train.", hint="Add `train=adapter-scales`.")
    if request.batch_size % request.micro_batch:
        if "micro_batch" in explicit:
            raise UsageError(
                f"`micro_batch={request.micro_batch}` does not divide `batch_size={request.batch_size}`.",
                hint="A step adds up whole micro-batches.",
            )
        fitting = max(n for n in range(1, request.micro_batch + 1) if request.batch_size % n == 0)
        request = request.model_copy(update={"micro_batch": fitting})
    return request


def settings_of(request: FinetuneRequest, samples: int) -> TunerSettings:
    """How to train on so many samples."""
    steps_an_epoch = -(-samples // request.batch_size)
    names = TunerSettings.model_fields.keys() - {"eval_every", "save_every"}
    return TunerSettings(
        **{name: getattr(request, name) for name in names},
        eval_every=steps_an_epoch if request.eval_every is None else request.eval_every,
        save_every=request.save_every or max(1, request.epochs * steps_an_epoch // 10),
    )


def _folder() -> Any:
    return resources.files("ulbq") / "recipes" / "finetune"

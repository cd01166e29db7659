"""What a fine-tuning run is asked for, and the recipes that fill in what is left open."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

from pydantic import ValidationError

from ulbq.config.finetune import FinetuneRequest
from ulbq.config.finetuning import FinetuneForm, FinetuneSettings
from ulbq.config.options import renamed
from ulbq.config.run import RecipeRecord
from ulbq.errors import InputError, UsageError
from ulbq.pipeline.recipe_files import Recipe, read_recipe, shipped_names

_OF_ONE_RUN = frozenset({"source", "task", "recipe", "out", "force", "device", "data_dir", "offline", "seed"})
# Of a new adapter: a recipe's are for artifacts that have none.
_FORM = ("rank", "alpha", "dora", "targets")


def task_names() -> list[str]:
    """Names of the shipped tasks."""
    return shipped_names(_folder())


def load_task(given: str) -> Recipe:
    """Read a task's recipe.

    Args:
        given: a shipped task's name, or a YAML file.

    Raises:
        UsageError: neither, or options that no request has.
        InputError: a file that cannot be read or is no recipe.
    """
    hint = (
        f"Tasks: end-to-end, {', '.join(task_names())}; a .yaml file of options; "
        "or `task=instructions` with `data=FILE`."
    )
    required = frozenset({"name", "description", "source", "options"})
    content, sha256 = read_recipe("task", given, _folder(), required=required, hint=hint)
    content["options"] = renamed(FinetuneRequest, content["options"])
    unknown = sorted(map(str, content["options"].keys() - (FinetuneRequest.model_fields.keys() - _OF_ONE_RUN)))
    if unknown:
        raise UsageError(f"Task '{given}' has an unknown option '{unknown[0]}'.", hint="Mend the file.")
    if content.keys() - required:
        raise InputError(f"'{given}' is no task.", hint="It has the keys name, description, source and options.")
    return Recipe.model_validate({**content, "sha256": sha256})


def request_of(source: str, task: Recipe, given: Mapping[str, Any], *, adapted: bool) -> FinetuneRequest:
    """The request of a command line: what was given wins over the recipe.

    Args:
        source: path of the artifact.
        task: the recipe.
        given: fields of the request; None for what was not given.
        adapted: whether the artifact has an adapter.

    Raises:
        UsageError: values that do not go together, or the form of an adapter that is there already.
    """
    explicit = renamed(FinetuneRequest, {name: value for name, value in given.items() if value is not None})
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
        raise UsageError(
            f"'{where}' of task '{task.name}': {problem['msg']}.", hint="See 'ulbq finetune --help-all'."
        ) from error
    if request.data is None:
        raise UsageError(f"Task '{task.name}' has no data of its own.", hint="Name it with `data=FILE` or a Hub id.")
    idle = sorted({"scale_lr", "scale_weight_decay"} & explicit.keys())
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


def settings_of(request: FinetuneRequest, examples: int) -> FinetuneSettings:
    """How to train on so many examples."""
    names = FinetuneForm.model_fields.keys() | {"train", "eval_every", "save_every"}
    settings = FinetuneSettings.model_validate({name: getattr(request, name) for name in names})
    every = request.save_every or max(1, settings.steps(examples) // 10)
    return settings.model_copy(update={"save_every": every})


def _folder() -> Any:
    return resources.files("ulbq") / "recipes" / "finetune"

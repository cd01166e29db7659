"""What a fine-tuning run is asked for, and the recipes that fill in what is left open."""

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ulbq import limits
from ulbq.artifacts.names import local_path
from ulbq.data.prompts import Template
from ulbq.errors import InputError, UsageError
from ulbq.nn.adapter import AdapterConfig
from ulbq.pipeline.recipe_files import read_recipe_file, read_yaml
from ulbq.pipeline.request import RecipeRecord
from ulbq.training.precision import PrecisionName
from ulbq.training.tuner import TunerSettings

_SUFFIXES = (".yaml", ".yml")
_KEYS = ("name", "description", "source", "options")
HELDOUT = 64
"""Lessons that are held out where nobody says how many; fewer where few are asked for."""

NOT_IN_FINGERPRINT = frozenset({"source", "out", "force", "offline", "data_dir", "device", "recipe", "save_every"})
"""Fields that do not decide what a run makes."""


class FinetuneRequest(BaseModel):
    """A fine-tuning run of a packed model on a task.

    Attributes:
        source: path of the artifact.
        task: the recipe's name, for people and the manifest.
        recipe: what filled in the options, with its hash.
        data: instruction sets or files, or one plain text; None where nobody says.
        template: how questions are laid out; None for the chat template where there is one, else Alpaca's prompt.
        samples: how many train; None for all.
        heldout: how many are held out; None for 64, or an eighth of the samples where that is less.
        train: the adapter alone, or the scales of the packed weights too.
        fresh: begin with a new adapter though the artifact has one.
        rank, alpha, dora, targets: of a new adapter.
        dropout: of the adapter; None for a trained adapter's own.
        eval_every: steps between two looks at what is held out; 0 for none on the way, None for once an epoch.
        save_every: steps between two checkpoints; None for ten a run.

    The other fields are those of :class:`~ulbq.training.tuner.TunerSettings`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str
    task: str
    recipe: RecipeRecord | None = None
    data: tuple[str, ...] | None = None
    template: Template | None = None
    samples: int | None = Field(default=None, ge=1)
    heldout: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    train: Literal["adapter", "adapter-scales"] = "adapter"
    fresh: bool = False
    rank: int | None = Field(default=None, ge=1)
    alpha: float | None = Field(default=None, gt=0, le=limits.OPTION)
    dora: bool | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=16, ge=1)
    micro_batch: int = Field(default=4, ge=1)
    adapter_rate: float = Field(default=3e-4, gt=0, le=limits.OPTION)
    adapter_decay: float = Field(default=0, ge=0, le=limits.OPTION)
    scale_rate: float = Field(default=1e-3, gt=0, le=limits.OPTION)
    scale_decay: float = Field(default=0, ge=0, le=limits.OPTION)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    clip: float = Field(default=1, ge=0, le=limits.OPTION)
    checkpointing: bool = True
    eval_every: int | None = Field(default=None, ge=0)
    save_every: int | None = Field(default=None, ge=1)
    precision: PrecisionName = "auto"
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    data_dir: Path | None = None
    offline: bool = False
    out: Path | None = None
    force: bool = False

    @property
    def held_out(self) -> int:
        """How many lessons are held out."""
        if self.heldout is not None:
            return self.heldout
        return HELDOUT if self.samples is None else min(HELDOUT, max(2, self.samples // 8))

    def settings(self, samples: int) -> TunerSettings:
        """How to train on so many samples."""
        steps_an_epoch = -(-samples // self.batch_size)
        names = TunerSettings.model_fields.keys() - {"eval_every", "save_every"}
        return TunerSettings(
            **{name: getattr(self, name) for name in names},
            eval_every=steps_an_epoch if self.eval_every is None else self.eval_every,
            save_every=self.save_every or max(1, self.epochs * steps_an_epoch // 10),
        )

    def new_adapter(self) -> AdapterConfig:
        """Form of a new adapter."""
        given = {name: getattr(self, name) for name in ("rank", "alpha", "dora", "dropout", "targets")}
        return AdapterConfig(**{name: value for name, value in given.items() if value is not None})


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
            "or '--task instructions --data FILE'.",
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
        raise UsageError("--fresh: the artifact has no adapter to leave behind.", hint="Leave it out.")
    goes_on = adapted and not fresh
    typed = sorted(set(_FORM) & explicit.keys())
    if goes_on and typed:
        raise UsageError(
            f"--{typed[0]}: the artifact has a trained adapter, and that goes on as it is.",
            hint="Leave it out; or begin anew with --fresh, which loses what that adapter has learnt.",
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
        raise UsageError(f"Task '{task.name}' has no data of its own.", hint="Name it with --data FILE or a Hub id.")
    if request.batch_size % request.micro_batch:
        if "micro_batch" in explicit:
            raise UsageError(
                f"--micro-batch {request.micro_batch} does not divide --batch-size {request.batch_size}.",
                hint="A step adds up whole micro-batches.",
            )
        fitting = max(n for n in range(1, request.micro_batch + 1) if request.batch_size % n == 0)
        request = request.model_copy(update={"micro_batch": fitting})
    return request


def _folder() -> Any:
    return resources.files("ulbq") / "recipes" / "finetune"

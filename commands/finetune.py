"""``ulbq finetune``: a quantized artifact in, one that has learnt more out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ulbq.errors import UlbqError, UsageError

from . import console
from . import finetune_options as f
from . import quantize_options as o
from . import training_options as t
from .options import (
    DataDir,
    Debug,
    Device,
    DryRun,
    Force,
    Json,
    Offline,
    Out,
    Quiet,
    Seed,
    Source,
    check_out,
    read_size,
    read_source,
)
from .plan_table import show_finetune_plan, show_plan
from .streams import write

_END_TO_END = "end-to-end"
_NOT_OF_A_REQUEST = frozenset({"source", "task", "list_tasks", "dry_run", "json", "quiet", "debug"})

# Options of --task end-to-end that are called otherwise in 'ulbq quantize', by the field of its request.
_FIELDS = {
    "loss": "end_to_end",
    "data": "end_to_end_data",
    "template": "end_to_end_template",
    "epochs": "end_to_end_epochs",
    "rate": "end_to_end_rate",
    "train": "end_to_end_train",
    "zero_rate": "end_to_end_zero_rate",
    "dad_gamma": "end_to_end_gamma",
    "hidden_weight": "end_to_end_hidden_weight",
}
# What means nothing to the one, and to the other.
_OF_END_TO_END = (
    *("loss", "preset", "accumulation", "final_rate", "base_share", "teacher", "teacher_top_k", "dad_gamma"),
    *("hidden_weight", "rate", "zero_rate", "weight_rate", "norm_rate", "router_rate", "activation_memory"),
)
_OF_TASKS = (
    *("heldout", "batch_size", "micro_batch", "eval_every", "save_every"),
    *("fresh", "rank", "alpha", "dora", "targets"),
)
_INSTEAD = {"rate": "--adapter-rate", "accumulation": "--batch-size", "loss": "the answers' cross-entropy"}


def finetune(
    source: Source = None,
    *,
    task: f.Task,
    list_tasks: f.ListTasks = False,
    data: f.Data = None,
    template: f.Template = None,
    samples: f.Samples = None,
    heldout: f.Heldout = None,
    sequence_length: f.SequenceLength = None,
    train: f.Train = None,
    epochs: f.Epochs = None,
    batch_size: f.BatchSize = None,
    micro_batch: f.MicroBatch = None,
    eval_every: f.EvalEvery = None,
    save_every: f.SaveEvery = None,
    checkpointing: f.Checkpointing = None,
    clip: f.Clip = None,
    precision: t.Precision = None,
    adapter_rate: f.AdapterRate = None,
    adapter_decay: f.AdapterDecay = None,
    scale_rate: f.ScaleRate = None,
    scale_decay: f.ScaleDecay = None,
    schedule: f.Schedule = None,
    warmup: f.Warmup = None,
    fresh: f.Fresh = None,
    rank: f.Rank = None,
    alpha: f.Alpha = None,
    dora: f.Dora = None,
    dropout: f.Dropout = None,
    targets: f.Targets = None,
    loss: f.Loss = None,
    preset: o.Preset = None,
    accumulation: t.Accumulation = None,
    final_rate: t.FinalRate = None,
    base_share: t.BaseShare = None,
    teacher: t.Teacher = None,
    teacher_top_k: t.TeacherTopK = None,
    dad_gamma: t.EndToEndGamma = None,
    hidden_weight: t.EndToEndHiddenWeight = None,
    rate: f.Rate = None,
    zero_rate: t.EndToEndZeroRate = None,
    weight_rate: t.WeightRate = None,
    norm_rate: t.NormRate = None,
    router_rate: t.RouterRate = None,
    activation_memory: t.ActivationMemory = None,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    offline: Offline = False,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Teach a quantized artifact, packed as it is. A stopped run goes on where it was.

    Without SOURCE, the newest quantized artifact under ./artifacts. Tasks train its adapter, or a new one, on answers.
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_OF_A_REQUEST}
    _refuse(task, given, _OF_TASKS if task == _END_TO_END else _OF_END_TO_END)
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(out, force=force)
    chosen = str(read_source(source, "newest", progress))
    if task == _END_TO_END:
        result = _end_to_end(chosen, given, progress, dry_run=dry_run, json=json, quiet=quiet)
    else:
        result = _task(chosen, task, given, progress, dry_run=dry_run, json=json, quiet=quiet)
    if result is not None:
        emit(*result)


def _refuse(task: str, given: Mapping[str, Any], meaningless: tuple[str, ...]) -> None:
    """Raises UsageError for an option that means nothing to a task."""
    typed = next((name for name in meaningless if given[name] is not None), None)
    if typed is None:
        return
    option = "--dora" if typed == "dora" else f"--{typed.replace('_', '-')}"
    hint = f"It takes {_INSTEAD[typed]}." if task != _END_TO_END and typed in _INSTEAD else "Leave it out."
    raise UsageError(f"{option} means nothing to --task {task}.", hint=hint)


def _task(chosen: str, task: str, given: Mapping[str, Any], progress: Any, **how: bool) -> Any:
    """Train an adapter on a task; None after a dry run."""
    from ulbq.pipeline.finetune_plan import prepare
    from ulbq.pipeline.finetune_request import load_task

    if given["train"] not in (None, "adapter", "adapter-scales"):
        raise UsageError(f"--train {given['train']} is for --task end-to-end.", hint="Take adapter or adapter-scales.")
    options = {name: value for name, value in given.items() if name not in _OF_END_TO_END}
    options["data"] = None if given["data"] is None else (given["data"],)
    options["targets"] = _names(given["targets"])
    recipe = load_task(task)
    if (given["train"] or recipe.options.get("train")) != "adapter-scales":
        typed = next((name for name in ("scale_rate", "scale_decay") if given[name] is not None), None)
        if typed is not None:
            raise UsageError(
                f"--{typed.replace('_', '-')} means nothing where no scales train.", hint="Add --train adapter-scales."
            )
    with _in_own_words(_TO_TASKS):
        job = prepare(chosen, recipe, options, progress)
    if not how["quiet"] or how["dry_run"]:
        show_finetune_plan(job.plan)
    if how["dry_run"]:
        if how["json"]:
            write(job.plan.model_dump_json(indent=2))
        return None
    from ulbq.pipeline.finetune_run import finetune as run

    return run(job, progress)


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError(f"--targets '{text}' names no layer.", hint="Write --targets q_proj,v_proj.")
    return names


def _end_to_end(chosen: str, given: Mapping[str, Any], progress: Any, **how: bool) -> Any:
    """Train the whole model further; None after a dry run."""
    from ulbq.pipeline.finetune import end_to_end_request, telling_name
    from ulbq.pipeline.quantize import plan, quantize

    if given["train"] in ("adapter", "adapter-scales"):
        raise UsageError(f"--train {given['train']} is not for --task end-to-end.", hint="Take scales, say.")
    if given["schedule"] == "linear":
        raise UsageError("--schedule linear is not for --task end-to-end.", hint="Take cosine or constant.")
    options = {_FIELDS.get(name, name): value for name, value in given.items() if name not in _OF_TASKS}
    options["end_to_end"] = given["loss"] or "ce"
    size = given["activation_memory"]
    options["activation_memory"] = read_size(size) if size else None
    with _in_own_words(_TO_END_TO_END):
        request = end_to_end_request(chosen, options)
        if how["dry_run"]:
            planned = plan(request, progress)
            show_plan(planned)
            if how["json"]:
                write(planned.model_dump_json(indent=2))
            return None
        on_plan: Any = (lambda planned: None) if how["quiet"] else show_plan
        return quantize(request, progress, on_plan=on_plan, name=telling_name(chosen))


# Options of other commands that messages name, and what they are here.
_TO_END_TO_END = (
    (r"--end-to-end-(?=[a-z])", "--"),
    (r"--end-to-end\b(?!-)", "--loss"),
    (r"--calibration\b", "--data"),
    (r"ulbq quantize --help", "ulbq finetune --help"),
)
_TO_TASKS = (
    (r"--no-adapter leaves the adapter out", "--fresh begins with a new adapter"),
    (r", a text file, or --calibration self", ", or a file with --data"),
)


@contextmanager
def _in_own_words(words: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Errors that name options of other commands name those of this one instead."""
    try:
        yield
    except UlbqError as error:
        for theirs, ours in words:
            error.message, error.hint = re.sub(theirs, ours, error.message), re.sub(theirs, ours, error.hint)
        raise

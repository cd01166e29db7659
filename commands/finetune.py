"""``ulbq finetune``: a quantized artifact in, one that has learnt more out."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ulbq.config.finetune import END_TO_END_NAMES, OF_END_TO_END, OF_TASKS, FinetuneOptions, FinetuneRequest
from ulbq.config.options import Option, words
from ulbq.config.quantize import default_words
from ulbq.errors import UsageError

from . import console
from .fields import asked, from_fields
from .options import Debug, DryRun, Json, Quiet, Source, check_out, read_source
from .plan_table import show_finetune_plan, show_plan
from .recipe_list import complete_task, show_tasks
from .sections import HelpAll
from .streams import write

_END_TO_END = "end-to-end"
_INSTEAD = {"rate": "`adapter_rate`", "accumulation": "`batch_size`", "loss": "the answers' cross-entropy"}

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK|FILE.yaml",
        help="What the adapter learns: gsm8k, arithmetic, commonsense, wikitext2; instructions, with --data; or a "
        "file of options. end-to-end: scales, norms and adapter of the whole model learn together.",
        autocompletion=complete_task,
    ),
]
ListTasks = Annotated[
    bool, typer.Option("--list-tasks", help="Show the tasks, then stop.", is_eager=True, callback=show_tasks)
]


def _default(name: str, option: Option) -> str:
    """What an option is where nobody says: the task's, or that of a quantization run."""
    if option.default or name not in FinetuneRequest.model_fields:
        return option.default or default_words(OF_END_TO_END[name], option)
    return words(name, option, FinetuneRequest.model_fields[name].default)


@from_fields(
    FinetuneOptions,
    default=_default,
    names={field: name for name, field in END_TO_END_NAMES.items()} | {"calibration": "data", "adapter": "fresh"},
)
def finetune(
    source: Source = None,
    *,
    task: Task,
    list_tasks: ListTasks = False,
    help_all: HelpAll = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Teach a quantized artifact, packed as it is. A stopped run goes on where it was.

    Without SOURCE, the newest quantized artifact under ./artifacts. Tasks train its adapter, or a new one, on answers.
    """
    _refuse(task, given, OF_TASKS if task == _END_TO_END else frozenset(OF_END_TO_END))
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=bool(given["force"]))
    chosen = str(read_source(source, "newest", progress))
    if task == _END_TO_END:
        result = _end_to_end(chosen, given, progress, dry_run=dry_run, json=json, quiet=quiet)
    else:
        result = _task(chosen, task, given, progress, dry_run=dry_run, json=json, quiet=quiet)
    if result is not None:
        emit(*result)


def _refuse(task: str, given: Mapping[str, Any], meaningless: frozenset[str]) -> None:
    """Raises UsageError for an option that means nothing to a task."""
    typed = next((name for name in given if name in meaningless and given[name] is not None), None)
    if typed is not None:
        hint = f"It takes {_INSTEAD[typed]}." if task != _END_TO_END and typed in _INSTEAD else "Leave it out."
        raise UsageError(f"`{typed}` means nothing to `task={task}`.", hint=hint)


def _task(chosen: str, task: str, given: Mapping[str, Any], progress: Any, **how: bool) -> Any:
    """Train an adapter on a task; None after a dry run."""
    from ulbq.pipeline.finetune_plan import prepare
    from ulbq.pipeline.tasks import load_task

    if given["train"] not in (None, "adapter", "adapter-scales"):
        raise UsageError(f"`train={given['train']}` is for `task=end-to-end`.", hint="Take adapter or adapter-scales.")
    options = {name: value for name, value in asked(given).items() if name not in OF_END_TO_END}
    job = prepare(chosen, load_task(task), options, progress)
    if not how["quiet"] or how["dry_run"]:
        show_finetune_plan(job.plan)
    if how["dry_run"]:
        if how["json"]:
            write(job.plan.model_dump_json(indent=2))
        return None
    from ulbq.pipeline.finetune_run import finetune as run

    return run(job, progress)


def _end_to_end(chosen: str, given: Mapping[str, Any], progress: Any, **how: bool) -> Any:
    """Train the whole model further; None after a dry run."""
    from ulbq.pipeline.finetune import end_to_end_request, telling_name
    from ulbq.pipeline.quantize import plan, quantize

    if given["train"] in ("adapter", "adapter-scales"):
        raise UsageError(f"`train={given['train']}` is not for `task=end-to-end`.", hint="Take scales, say.")
    if given["schedule"] == "linear":
        raise UsageError("`schedule=linear` is not for `task=end-to-end`.", hint="Take cosine or constant.")
    options = {END_TO_END_NAMES.get(name, name): value for name, value in given.items()}
    request = end_to_end_request(chosen, {"end_to_end": "ce", **asked(options)})
    if how["dry_run"]:
        planned = plan(request, progress)
        show_plan(planned)
        if how["json"]:
            write(planned.model_dump_json(indent=2))
        return None
    on_plan: Any = (lambda planned: None) if how["quiet"] else show_plan
    return quantize(request, progress, on_plan=on_plan, name=telling_name(chosen))

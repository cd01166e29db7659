"""``ulbq finetune``: a quantized artifact in, one that has learnt more out."""

from typing import Annotated, Any

import typer

from ulbq.config.finetune import END_TO_END_NAMES, OF_END_TO_END, FinetuneOptions, FinetuneRequest
from ulbq.config.options import Option, words
from ulbq.config.quantize import QuantizeRequest, default_words

from . import console
from .fields import asked, from_fields
from .options import Debug, DryRun, Json, Quiet, Source, check_out, read_source
from .plan_table import show_finetune_plan, show_plan
from .recipe_list import complete_task, show_tasks
from .sections import HelpAll
from .streams import write

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

    Without SOURCE, the newest quantized artifact below this folder. Tasks train its adapter, or a new one, on answers.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=bool(given["force"]))
    chosen = str(read_source(source, "newest", progress))

    from ulbq.pipeline.finetune import finetune, plan, prepare

    job = prepare(chosen, task, asked(given), progress)
    show: Any = show_plan if isinstance(job, QuantizeRequest) else show_finetune_plan
    if dry_run:
        planned = plan(job, progress)
        show(planned)
        if json:
            write(planned.model_dump_json(indent=2))
        return
    path, manifest = finetune(job, progress, on_plan=(lambda planned: None) if quiet else show)
    if not quiet:
        from .results import show_finetuned

        show_finetuned(manifest)
    emit(path, manifest)

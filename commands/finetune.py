"""``ulbq finetune``: a quantized artifact in, one that has learnt more out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from ulbq.errors import UlbqError, UsageError

from . import console
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
    read_size,
    read_source,
)
from .plan_table import show_plan

_TASKS = ("end-to-end",)
_WHAT, _HOW, _RATES = "What to learn", "How", "Rates"

# Options that are called otherwise here than in 'ulbq quantize', by the field of the request.
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
_NOT_OF_A_REQUEST = frozenset({"source", "task", "dry_run", "json", "quiet", "debug"})

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        help="end-to-end: scales, norms and adapter of the whole packed model learn together, codes stay.",
        autocompletion=lambda: list(_TASKS),
        rich_help_panel=_WHAT,
    ),
]
Loss = Annotated[
    Literal["ce", "kl", "ce-kl", "kl-hidden", "dad"],
    typer.Option(
        "--loss",
        help="Cross-entropy of the text, the full-precision parent's predictions, both, with hidden states too, or "
        "deviation-aware.",
        rich_help_panel=_WHAT,
    ),
]
Data = Annotated[
    str | None,
    o.option(
        "--data",
        "Text as 'quantize --calibration' takes it, or an instruction set, whose answers alone are learnt: alpaca, a "
        "Hub id, or a file of instruction and output, prompt and completion, or chats.",
        _WHAT,
        default="wikitext2, else self",
        metavar="NAME|FILE",
        autocompletion=lambda: t.DATA_SETS,
    ),
]
Epochs = Annotated[int | None, o.option("--epochs", "Passes over the samples.", _HOW, default="1", min=1, metavar="N")]
Train = Annotated[
    Literal["scales", "scales-zeros", "all"] | None,
    o.option(
        "--train",
        "What trains: scales; the zero points of an asymmetric affine format too; or weights too.",
        _HOW,
        default="scales",
    ),
]
Rate = Annotated[
    float | None,
    o.option("--rate", "Factor of all rates.", _RATES, default="0.4; 0.1 for binary-mos", metavar="X"),
]


def finetune(
    source: Source = None,
    *,
    task: Task,
    loss: Loss = "ce",
    data: Data = None,
    template: t.EndToEndTemplate = None,
    preset: o.Preset = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    epochs: Epochs = None,
    train: Train = None,
    accumulation: t.Accumulation = None,
    checkpointing: t.Checkpointing = None,
    clip: t.Clip = None,
    schedule: t.Schedule = None,
    warmup: t.Warmup = None,
    final_rate: t.FinalRate = None,
    dropout: t.Dropout = None,
    base_share: t.BaseShare = None,
    teacher: t.Teacher = None,
    teacher_top_k: t.TeacherTopK = None,
    dad_gamma: t.EndToEndGamma = None,
    hidden_weight: t.EndToEndHiddenWeight = None,
    rate: Rate = None,
    scale_rate: t.ScaleRate = None,
    zero_rate: t.EndToEndZeroRate = None,
    weight_rate: t.WeightRate = None,
    norm_rate: t.NormRate = None,
    router_rate: t.RouterRate = None,
    adapter_rate: t.AdapterRate = None,
    scale_decay: t.ScaleDecay = None,
    adapter_decay: t.AdapterDecay = None,
    activation_memory: t.ActivationMemory = None,
    precision: t.Precision = None,
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
    """Train a quantized artifact further, packed as it is. A stopped run goes on where it was.

    Without SOURCE, the newest quantized artifact under ./artifacts. Its method and format are read from its manifest.
    """
    given = {_FIELDS.get(name, name): value for name, value in locals().items() if name not in _NOT_OF_A_REQUEST}
    given["activation_memory"] = read_size(activation_memory) if activation_memory else None
    if task not in _TASKS:
        raise UsageError(f"There is no task '{task}'.", hint=f"Tasks: {', '.join(_TASKS)}.")
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    chosen = str(read_source(source, "newest", progress))

    from ulbq.pipeline.finetune import end_to_end_request, telling_name
    from ulbq.pipeline.quantize import plan, quantize

    with _in_own_words():
        request = end_to_end_request(chosen, given)
        if dry_run:
            planned = plan(request, progress)
            show_plan(planned)
            if json:
                print(planned.model_dump_json(indent=2))
            return
        on_plan: Any = (lambda planned: None) if quiet else show_plan
        result = quantize(request, progress, on_plan=on_plan, name=telling_name(chosen))
    emit(*result)


@contextmanager
def _in_own_words() -> Iterator[None]:
    """Errors that name options of 'ulbq quantize' name those of this command instead."""
    try:
        yield
    except UlbqError as error:
        error.message, error.hint = _reworded(error.message), _reworded(error.hint)
        raise


def _reworded(text: str) -> str:
    for theirs, ours in (
        (r"--end-to-end-(?=[a-z])", "--"),
        (r"--end-to-end\b(?!-)", "--loss"),
        (r"--calibration\b", "--data"),
        (r"ulbq quantize --help", "ulbq finetune --help"),
    ):
        text = re.sub(theirs, ours, text)
    return text

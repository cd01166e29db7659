"""``ulbq quantize``: a model in, a packed artifact out."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ulbq.errors import UsageError

from . import console
from .options import DataDir, Debug, Device, DryRun, Force, Json, Offline, Out, Quiet, Seed, Source, read_source

if TYPE_CHECKING:
    from ulbq.pipeline.quantize import QuantizePlan

_CALIBRATION = "Calibration"
_TRAINING = "Training"
_FORMAT = "Format"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def quantize(
    source: Source = None,
    method: Annotated[
        Literal["db-llm", "rtn"],
        typer.Option("--method", "-m", help="db-llm: dual-binary 2 bits, trained; rtn: affine rounding, in seconds."),
    ] = "db-llm",
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            metavar="N",
            help="1, 2, 3, 4 or 8.",
            show_default="2 for db-llm, 4 for rtn",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size", metavar="N", help="Columns that share a scale; -1 for rows.", rich_help_panel=_FORMAT
        ),
    ] = 64,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Fixed zero point, or one a group (rtn).",
            show_default="asymmetric",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Shrink each group's range where that lowers its error (rtn).",
            show_default="search",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    preset: Annotated[
        Literal["quick", "balanced", "best"] | None,
        typer.Option(
            "--preset",
            help="Samples, length and epochs at once.",
            show_default="quick on a CPU, balanced on a GPU",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="NAME|FILE",
            help="wikitext2, c4, ptb, pile, redpajama, alpaca, mix, self, "
            "or a file: text, JSONL, Parquet or safetensors.",
            show_default="wikitext2, else self",
            autocompletion=lambda: ["wikitext2", "c4", "ptb", "pile", "redpajama", "alpaca", "mix", "self"],
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            metavar="N",
            help="Training samples.",
            show_default="preset",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=2,
            metavar="N",
            help="Tokens a sample.",
            show_default="preset",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=0,
            metavar="N",
            help="Passes over the samples, for every block; 0 stores the closed-form start.",
            show_default="preset",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, metavar="N", help="Samples a step.", show_default="4", rich_help_panel=_TRAINING
        ),
    ] = None,
    train_weights: Annotated[
        bool | None,
        typer.Option(
            "--train-weights/--freeze-weights",
            help="Let the weights move, or train scales and norms only.",
            show_default="train",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    weight_rate: Annotated[
        float | None,
        typer.Option(
            "--weight-rate",
            metavar="X",
            help="Learning rate of the weights, in grid steps.",
            show_default="0.015",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    scale_rate: Annotated[
        float | None,
        typer.Option(
            "--scale-rate",
            metavar="X",
            help="Learning rate of the scales, relative to the grid step.",
            show_default="0.005",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    norm_rate: Annotated[
        float | None,
        typer.Option(
            "--norm-rate",
            metavar="X",
            help="Learning rate of the norm weights; 0 freezes them.",
            show_default="0.002",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    token_weighting: Annotated[
        Literal["energy", "uniform"] | None,
        typer.Option(
            "--token-weighting",
            help="Count each token by its relative error, or all by plain squared error.",
            show_default="energy",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    augmented_loss: Annotated[
        bool | None,
        typer.Option(
            "--augmented-loss/--no-augmented-loss",
            help="Also match the full-precision block on the quantized stream.",
            show_default="no",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(
            "--clip",
            metavar="X",
            help="Largest gradient norm; 0 for none.",
            show_default="1",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            min=1,
            metavar="N",
            help="Epochs without a better held-out loss before a block stops.",
            show_default="4",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    activation_memory: Annotated[
        str | None,
        typer.Option(
            "--activation-memory",
            metavar="SIZE",
            help="Activations beyond this lie on disk (512M, 4G, …).",
            show_default="4G",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"] | None,
        typer.Option(
            "--precision",
            help="Dtype of the matrix products; auto is bf16 where the hardware has it.",
            show_default="auto",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
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
    """Quantize a model to 1 to 4 bits, one block at a time. A stopped run goes on where it was."""
    given = {
        name: value
        for name, value in locals().items()
        if name not in {"source", "activation_memory", "dry_run", "json", "quiet", "debug"}
    }
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    source = read_source(source, "model", progress)

    from ulbq.pipeline.quantize import plan, quantize
    from ulbq.pipeline.request import QuantizeRequest

    request = QuantizeRequest.model_validate(
        {**given, "source": source, "activation_memory": activation_memory and _size(activation_memory)}
    )
    if dry_run:
        planned = plan(request, progress)
        _show(planned)
        if json:
            print(planned.model_dump_json(indent=2))
        return
    emit(*quantize(request, progress, on_plan=(lambda planned: None) if quiet else _show))


def _size(text: str) -> int:
    """Bytes of ``512M``, ``4G``, ``4GiB``, ``1000``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise UsageError(f"'{text}' is no size.", hint="Write a number of bytes, or 512M, 4G and the like.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _show(plan: "QuantizePlan") -> None:
    from rich.table import Table
    from rich.text import Text

    request, cost = plan.request, plan.cost
    rows = {
        "model": f"{plan.model}: {plan.blocks} blocks, {plan.layers} layers, {plan.weights / 1e6:,.1f} M weights",
        "method": f"{request.method}, {plan.scheme}, {plan.bits_per_weight:.3f} bits per weight",
    }
    if request.samples is not None:
        rows["calibration"] = (
            f"{request.calibration}, {request.samples} × {request.sequence_length} tokens, seed {request.seed}"
        )
        preset = f" (preset {request.preset})" if request.preset else ""
        rows["training"] = f"{request.epochs} epochs, batches of {request.batch_size}{preset}"
    rows["compute"] = f"{plan.device}, {plan.precision}"
    rows["predicted"] = (
        f"peak memory {cost.peak_memory / 2**30:.2f} GiB, disk {cost.disk / 2**20:,.0f} MiB, "
        f"artifact {cost.artifact / 2**20:,.0f} MiB"
    )
    if plan.skipped:
        rows["full precision"] = ", ".join(plan.skipped)
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        # As Text, not as markup: a file may be called text[a].
        table.add_row(Text(name, style="bold"), Text(text))
    console.terminal().print(table)

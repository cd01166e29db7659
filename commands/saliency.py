"""``ulbq saliency``: a model in, a score for each of its weights out."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

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
    check_out,
    read_size,
    read_source,
)
from .plan_table import show_rows
from .streams import write

if TYPE_CHECKING:
    from ulbq.pipeline.saliency import SaliencyPlan


def saliency(
    source: Source = None,
    kind: Annotated[
        Literal["fisher", "gradient", "hessian", "wanda", "magnitude"],
        typer.Option("--kind", "-k", help="Squared or mean absolute gradients, squared inputs, |W|·‖x‖, or |W| alone."),
    ] = "fisher",
    dtype: Annotated[
        Literal["bf16", "fp16"],
        typer.Option("--dtype", help="Of the stored scores: the wider range, or the finer steps."),
    ] = "bf16",
    calibration: o.Calibration = None,
    samples: Annotated[
        int | None,
        o.option(
            "--samples",
            "Sequences to score on.",
            o.CALIBRATION,
            default="32 on a CPU, 128 on a GPU",
            min=1,
            metavar="N",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        o.option("--sequence-length", "Tokens a sequence.", o.CALIBRATION, default="512", min=2, metavar="N"),
    ] = None,
    batch_size: Annotated[
        int | None,
        o.option(
            "--batch-size",
            "Sequences at once on the way forward; each goes back by itself.",
            t.COMPUTE,
            default="4",
            min=1,
            metavar="N",
        ),
    ] = None,
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
    """Score every weight of a model by how much the model depends on it. A stopped run goes on where it was.

    Quantize uses the scores as weights of its penalty: ulbq saliency | ulbq quantize --method ulb-sapr
    """
    given = {
        name: value
        for name, value in locals().items()
        if name not in {"source", "activation_memory", "dry_run", "json", "quiet", "debug"}
    }
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(out, force=force)
    source = read_source(source, "model", progress)

    from ulbq.pipeline.saliency import SaliencyRequest, plan, saliency

    request = SaliencyRequest.model_validate(
        {**given, "source": source, "activation_memory": activation_memory and read_size(activation_memory)}
    )
    if dry_run:
        planned = plan(request, progress)
        _show(planned)
        if json:
            write(planned.model_dump_json(indent=2))
        return
    path, manifest = saliency(request, progress, on_plan=(lambda planned: None) if quiet else _show)
    if not quiet:
        from .saliency_table import summary

        console.terminal().print(summary(manifest))
    emit(path, manifest)


def _show(plan: "SaliencyPlan") -> None:
    request = plan.request
    rows = {
        "model": f"{plan.model}: {plan.blocks} blocks, {plan.layers} layers, {plan.weights / 1e6:,.1f} M weights",
        "scores": f"{request.kind}, stored as {request.dtype}",
    }
    if request.samples is not None:
        rows["calibration"] = (
            f"{request.calibration}, {request.samples} × {request.sequence_length} tokens, seed {request.seed}"
        )
    rows["compute"] = f"{plan.device}, {plan.precision}"
    rows["predicted"] = (
        f"peak memory {plan.peak_memory / 2**30:.2f} GiB, disk {plan.disk / 2**20:,.0f} MiB, "
        f"artifact {plan.artifact / 2**20:,.0f} MiB"
    )
    show_rows(rows)

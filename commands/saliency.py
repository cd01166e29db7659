"""``ulbq saliency``: a model in, a score for each of its weights out."""

from typing import TYPE_CHECKING, Any

from ulbq.config.saliency import SaliencyRequest

from . import console
from .fields import asked, from_fields
from .options import Debug, DryRun, Json, Quiet, Source, check_out, read_source
from .plan_table import predicted, read_by_block, show_rows
from .streams import write

if TYPE_CHECKING:
    from ulbq.pipeline.saliency import SaliencyPlan


@from_fields(SaliencyRequest)
def saliency(
    source: Source = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Score every weight of a model by how much the model depends on it. A stopped run goes on where it was.

    Quantize uses the scores as weights of its penalty: ulbq saliency | ulbq quantize --method ulb-sapr
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=given["force"])
    chosen = read_source(source, "model", progress)
    request = SaliencyRequest(source=chosen, **asked(given))

    from ulbq.pipeline.saliency import plan, saliency

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
    rows["compute"] = f"{plan.device}, {plan.precision}{read_by_block(plan.reads)}"
    rows["predicted"] = predicted(plan.peak_memory, plan.disk, plan.artifact)
    show_rows(rows)

"""The plan of a run as a table for people."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import console

if TYPE_CHECKING:
    from ulbq.pipeline.finetune_plan import FinetunePlan
    from ulbq.pipeline.quantize import QuantizePlan
    from ulbq.pipeline.request import QuantizeRequest


def show_plan(plan: "QuantizePlan") -> None:
    """Say on standard error what a quantization run does and costs."""
    cost = plan.cost
    stored = "" if plan.stored_as is None else ", stored as GGUF {} ({:.1f} bits a value)".format(*plan.stored_as)
    counts = f"{plan.blocks} blocks, {plan.layers} layers, {plan.weights / 1e6:,.1f} M weights"
    rows = {
        "model": f"{plan.model}: {counts}{stored}",
        "method": f"{plan.request.method}, {plan.scheme}, {plan.bits_per_weight:.3f} bits per weight",
        **({"rotation": plan.rotation.label} if plan.rotation is not None else {}),
        **_what_is_done(plan.request),
        "compute": f"{plan.device}, {plan.precision}",
        "predicted": f"peak memory {cost.peak_memory / 2**30:.2f} GiB, disk {cost.disk / 2**20:,.0f} MiB, "
        f"artifact {cost.artifact / 2**20:,.0f} MiB",
    }
    if plan.skipped:
        rows["full precision"] = ", ".join(plan.skipped)
    show_rows(rows)


def show_finetune_plan(plan: "FinetunePlan") -> None:
    """Say on standard error what a fine-tuning run does and costs."""
    request, data, cost = plan.request, plan.data, plan.cost
    form = f"{'DoRA' if plan.adapter.dora else 'LoRA'}, rank {plan.adapter.rank}, alpha {plan.adapter.alpha:g}"
    dropout = f", dropout {plan.adapter.dropout:g}" if plan.adapter.dropout else ""
    start = "goes on from the artifact's own" if plan.start == "trained" else "new"
    scales = f", scales {request.scale_rate:g}" if request.train == "adapter-scales" else ""
    show_rows(
        {
            "model": f"{plan.model}, {plan.method}, {plan.bits_per_weight:.3f} bits per weight",
            "task": f"{request.task}, layout {plan.template or 'plain text'}",
            "data": f"{', '.join(data['sources'])}: {data['samples']:,} samples, {data['taught_tokens']:,} of "
            f"{data['tokens']:,} tokens learnt; {data['heldout']} held out",
            "adapter": f"{form}{dropout}, on {plan.linears} layers, {start}",
            "training": f"{plan.parameters:,} parameters ({request.train}), epochs: {request.epochs}, "
            f"{plan.steps:,} steps of {request.batch_size} samples, {request.micro_batch} at once",
            "rates": f"adapter {request.adapter_rate:g}{scales}, {request.schedule}, warm-up {request.warmup:g}, "
            f"decay {request.adapter_decay:g}, clip {request.clip:g}",
            "compute": f"{plan.device}, {plan.precision}",
            "predicted": f"peak memory {cost.peak_memory / 2**30:.2f} GiB (base {cost.base / 2**20:,.0f} MiB, what "
            f"trains {cost.training / 2**20:,.0f} MiB, activations {cost.activations / 2**20:,.0f} MiB)",
        }
    )


def show_rows(rows: Mapping[str, str]) -> None:
    """Print a plan's rows on standard error."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        # As Text, not as markup: a file may be called text[a].
        table.add_row(Text(name, style="bold"), Text(text))
    console.terminal().print(table)


def _what_is_done(request: "QuantizeRequest") -> dict[str, str]:
    """Rows of a completed request; what has no value there has no meaning to its method."""
    rows = {}
    if request.recipe is not None:
        rows["recipe"] = f"{request.recipe.name} (SHA-256 {request.recipe.sha256[:12]})"
    if request.calibration is not None and request.samples is not None:
        size = f"{request.samples} × {request.sequence_length} tokens"
        rows["calibration"] = f"{request.calibration}, {size}, seed {request.seed}"
    if request.epochs is not None:
        rows["training"] = _training(request)
    if request.damping is not None:
        rows["columns"] = _columns(request)
    if request.refit is not None:
        rows["codebooks"] = _codebooks(request)
    if request.experts is not None:
        zeros = "" if request.zeros == "none" else f", zero points by {request.zeros}"
        rows["mixture"] = f"{request.experts} experts{zeros}"
    if request.adapter:
        rows["adapter"] = _adapter(request)
    if request.penalize is not None or request.block_multiplier is not None:
        rows["preserved"] = _preserved(request)
    if request.fit_temperature:
        rows["temperature"] = "fitted on the held-out samples"
    if request.end_to_end not in (None, "none"):
        rows["end to end"] = _end_to_end(request)
    return rows


_TRAINED: dict[str | None, str] = {
    "clipping": "clip ends alone",
    "grid": "scales and zero points alone",
    "rounding": "weights within half a step",
    "weights": "weights alone",
}


def _training(request: "QuantizeRequest") -> str:
    if not request.epochs:
        return "none"
    if request.stages:
        epochs = " + ".join(f"{stage.name} {stage.epochs}" for stage in request.stages) + " epochs"
    else:
        epochs = f"{request.epochs} epochs"
    parts = [epochs, f"batches of {request.batch_size}"]
    if request.train_weights is False:
        parts.append("weights frozen")
    if request.train in _TRAINED:
        parts.append(_TRAINED[request.train])
    if request.start not in (None, "search"):
        parts.append(f"start {request.start}")
    if request.optimizer == "sign":
        parts.append("sign descent")
    if request.granularity == "layer":
        parts.append("layer by layer")
    return ", ".join(parts) + (f" (preset {request.preset})" if request.preset else "")


def _columns(request: "QuantizeRequest") -> str:
    order = "largest inputs first" if request.act_order else "from left to right"
    layers = "layer after layer" if request.true_sequential else "all layers from one pass"
    preset = f" (preset {request.preset})" if request.preset else ""
    tokens = ", plain squares" if request.token_weighting == "uniform" else ""
    return f"{order}, damping {request.damping:g}, {layers}{tokens}{preset}"


def _codebooks(request: "QuantizeRequest") -> str:
    parts = [f"{request.bits} bits a column"]
    if request.target_bits is not None:
        nominal = "nominal" if request.as_published else "true"
        parts = [f"{request.bits} bits a column and more, to {request.target_bits:g} {nominal} bits"]
    if request.allocation is not None:
        parts.append(f"{request.allocation} allocation")
    if request.outlier_bits:
        parts.append(f"{request.outlier_bits:g} bits for outliers")
    if request.refit:
        parts.append("fitted together")
    if request.as_published:
        parts.append("as published")
    if not request.penalty and request.saliency not in (None, "none"):
        parts.append(f"layers weighed by {request.saliency}")
    return ", ".join(parts)


def _adapter(request: "QuantizeRequest") -> str:
    kind = "DoRA" if request.dora else "LoRA"
    dropout = f", dropout {request.dropout:g}" if request.dropout else ""
    return f"{kind}, rank {request.rank}, alpha {request.alpha:g}{dropout}, on {', '.join(request.targets or ['all'])}"


def _preserved(request: "QuantizeRequest") -> str:
    amounts = [] if request.penalty is None else [f"{request.penalty:g}"]
    amounts += [f"{stage.penalty:g} in {stage.name}" for stage in request.stages or () if stage.penalty is not None]
    growth = "" if request.block_multiplier == 1 else f" × {request.block_multiplier:g} a block"
    where = f", {request.penalize}" if request.penalize else ""
    return f"lambda {', '.join(amounts)}{growth}{where}, saliency {request.saliency}"


def _end_to_end(request: "QuantizeRequest") -> str:
    teacher = f", {request.teacher} teacher" if request.teacher else ""
    top = f" (top {request.teacher_top_k})" if request.teacher_top_k else ""
    loss = str(request.end_to_end)
    if request.end_to_end_gamma is not None:
        loss = f"{loss} with gamma {request.end_to_end_gamma:g}"
    if request.end_to_end_hidden_weight is not None:
        loss = f"{loss} × {request.end_to_end_hidden_weight:g}"
    text = ""
    if request.end_to_end_data is not None:
        samples = request.end_to_end_samples or request.samples
        text = f" on {request.end_to_end_data}, {samples} × {request.sequence_length} tokens"
    return (
        f"{loss}{text}, {request.end_to_end_epochs} epochs, {request.accumulation} samples a step, "
        f"trains {request.end_to_end_train}{teacher}{top}"
    )

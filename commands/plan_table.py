"""The plan of a run as a table for people."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ulbq.config.methods import method_options
from ulbq.config.options import CALIBRATION, COMPUTE, RUN, SECTIONS, Option, options, typed, words
from ulbq.config.quantize import QuantizeRequest, usual
from ulbq.printable import binary

from . import console

if TYPE_CHECKING:
    from ulbq.pipeline.finetune_plan import FinetunePlan
    from ulbq.pipeline.quantize import QuantizePlan


def show_plan(plan: "QuantizePlan") -> None:
    """Say on standard error what a quantization run does and costs."""
    cost = plan.cost
    stored = ", stored as {} ({:.1f} bits a value)".format(*plan.stored_as) if plan.stored_as is not None else ""
    experts = f" of {plan.experts} experts" if plan.experts else ""
    counts = f"{plan.blocks} blocks{experts}, {plan.layers:,} layers, {plan.weights / 1e6:,.1f} M weights"
    rows = {
        "model": f"{plan.model}: {counts}{stored}",
        "method": f"{plan.request.method}, {plan.scheme}, {bits_words(plan.bits_per_weight, plan.adapter_bits)}",
        **({"rotation": plan.rotation.label} if plan.rotation is not None else {}),
        **_what_is_done(plan.request),
        "compute": f"{plan.device}, {plan.precision}{read_by_block(plan.reads)}{in_parts(plan.sharded)}",
        "predicted": predicted(cost.peak_memory, cost.disk, cost.artifact, cost.device_memory),
    }
    rows["weights"] = plan.coverage.words
    if plan.coverage.kept:
        rows["full precision"] = "\n".join(record.words for record in plan.coverage.kept)
    show_rows(rows)


def show_finetune_plan(plan: "FinetunePlan") -> None:
    """Say on standard error what a fine-tuning run does and costs."""
    request, data, cost = plan.request, plan.data, plan.cost
    form = f"{'DoRA' if plan.adapter.dora else 'LoRA'}, rank {plan.adapter.rank}, alpha {plan.adapter.alpha:g}"
    dropout = f", dropout {plan.adapter.dropout:g}" if plan.adapter.dropout else ""
    start = "goes on from the artifact's own" if plan.start == "trained" else "new"
    scales = f", scales {request.scale_lr:g}" if request.train == "adapter-scales" else ""
    show_rows(
        {
            "model": f"{plan.model}, {plan.method}, {plan.bits_per_weight:.3f} bits per weight",
            "task": f"{request.task}, layout {plan.template or 'plain text'}",
            "data": f"{', '.join(data['sources'])}: {data['samples']:,} samples, {data['taught_tokens']:,} of "
            f"{data['tokens']:,} tokens learnt; {data['heldout']} held out",
            "adapter": f"{form}{dropout}, on {plan.linears} layers, {start}",
            "training": f"{plan.parameters:,} parameters ({request.train}), epochs: {request.epochs}, "
            f"{plan.steps:,} steps of {request.batch_size} samples, {request.micro_batch} at once",
            "rates": f"adapter {request.adapter_lr:g}{scales}, {request.schedule}, warm-up {request.warmup:g}, "
            f"decay {request.adapter_weight_decay:g}, clip {request.clip:g}",
            "compute": f"{plan.device}, {plan.precision}{in_parts(plan.sharded)}",
            "predicted": f"peak memory {binary(cost.peak_memory)} (base {binary(cost.base)}, what trains "
            f"{binary(cost.training)}, activations {binary(cost.activations)}; Python and its libraries the rest)",
        }
    )


def bits_words(bits: float, adapter: float) -> str:
    """True bits a weight, and those that are left without the adapter's."""
    return f"{bits:.3f} bits per weight" + (f" ({bits - adapter:.3f} without its adapter)" if adapter else "")


def predicted(peak_memory: int, disk: int, artifact: int, device_memory: int = 0) -> str:
    """What a run will take, in words; Python and its libraries are part of the memory, what is on a GPU is not."""
    gpu = f" and {binary(device_memory)} on the GPU" if device_memory else ""
    return f"peak memory {binary(peak_memory)} in all{gpu}, disk {binary(disk)}, artifact {binary(artifact)}"


def read_by_block(times: int) -> str:
    """What is said of a full-precision model that is not loaded."""
    often = f"{times:,} times" if times > 1 else "once"
    return f"; all of the full-precision model is read {often}, block by block" if times else ""


def in_parts(sharded: bool) -> str:
    """What is said of training of which each process holds a part."""
    return "; each process holds a part of what trains" if sharded else ""


def show_rows(rows: Mapping[str, str]) -> None:
    """Print a plan's rows on standard error."""
    from .tables import grid

    console.terminal().print(grid(rows))


def _what_is_done(request: QuantizeRequest) -> dict[str, str]:
    """Rows of a completed request: what is in effect and tells the run, section by section."""
    rows: dict[str, str] = {}
    if request.recipe is not None:
        rows["recipe"] = f"{request.recipe.name} (SHA-256 {request.recipe.sha256[:12]})"
    if request.calibration is not None and request.samples is not None:
        preset = f" (preset {request.preset})" if request.preset else ""
        size = f"{request.samples} × {request.sequence_length} tokens{preset}"
        rows["calibration"] = f"{request.calibration}, {size}, seed {request.seed}"
    parts: dict[str, list[str]] = {}
    for name, _, option in sorted(options(type(request)), key=lambda one: SECTIONS.index(one[2].section)):
        # Said by other rows already.
        told = option.section in ("", CALIBRATION, COMPUTE, RUN) or name in ("bits", "group_size", "rotate")
        value = getattr(request, name)
        told = told or (name == "epochs" and not value and not method_options(request.method).preset_epochs)
        if not told and value is not None and (option.planned or value != usual(name)):
            parts.setdefault(option.section.partition(" (")[0].lower(), []).append(_said(name, option, value))
    return rows | {section: ", ".join(said) for section, said in parts.items()}


def _said(name: str, option: Option, value: Any) -> str:
    """``rank 8``, ``no-refit``; names within a section without what the section says."""
    if isinstance(value, bool):
        return words(name, option, value)
    flag = typed(name, option, switch=False)[0].removeprefix("--")
    label = flag.removeprefix(option.section.lower().replace(" ", "-")).strip("-").replace("-", " ")
    return f"{label} {words(name, option, value)}".strip()

"""``finetune``: a quantized artifact learns a task beside its packed weights, or goes on learning as a whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.config.finetune import END_TO_END_NAMES, OF_END_TO_END, OF_TASKS, FinetuneOptions
from ulbq.config.options import renamed
from ulbq.config.quantize import QuantizeRequest, takes
from ulbq.errors import UsageError
from ulbq.methods import METHODS
from ulbq.models.adapter_files import adapter_folder, read_adapter
from ulbq.models.source import ModelSource
from ulbq.pipeline import finetune_plan, finetune_run, quantize
from ulbq.pipeline.finetune_plan import FinetuneJob, FinetunePlan, open_quantized
from ulbq.pipeline.quantization_plan import QuantizePlan
from ulbq.pipeline.tasks import load_task
from ulbq.progress import Progress
from ulbq.quantizers.trainable import TRAINABLE

END_TO_END = "end-to-end"
_INSTEAD = {"lr_factor": "`adapter_lr`", "gradient_accumulation": "`batch_size`", "loss": "the answers' cross-entropy"}


def prepare(source: str, task: str, options: Mapping[str, Any], progress: Progress) -> FinetuneJob | QuantizeRequest:
    """Settle a run: of a task, or of the whole model, which is a quantization run that leaves the codes as they are.

    Args:
        source: path of the artifact.
        task: name of a shipped task, a file of one, or ``end-to-end``.
        options: fields of :data:`~ulbq.config.finetune.FinetuneOptions` that were asked for.
        progress: told what is left out of the data.

    Raises:
        UsageError, InputError, ResourceError: as :func:`~ulbq.pipeline.finetune_plan.prepare`.
    """
    options, whole = renamed(FinetuneOptions, options), task == END_TO_END
    idle = next((name for name in options if name in (OF_TASKS if whole else OF_END_TO_END)), None)
    if idle is not None:
        hint = f"It takes {_INSTEAD[idle]}." if not whole and idle in _INSTEAD else "Leave it out."
        raise UsageError(f"`{idle}` means nothing to `task={task}`.", hint=hint)
    adapter = options.get("train") in ("adapter", "adapter-scales")
    if not whole:
        if "train" in options and not adapter:
            raise UsageError(
                f"`train={options['train']}` is for `task={END_TO_END}`.", hint="Take adapter or adapter-scales."
            )
        return finetune_plan.prepare(source, load_task(task), options, progress)
    if adapter:
        raise UsageError(f"`train={options['train']}` is not for `task={END_TO_END}`.", hint="Take scales, say.")
    if options.get("schedule") == "linear":
        raise UsageError(f"`schedule=linear` is not for `task={END_TO_END}`.", hint="Take cosine or constant.")
    if {"gradient_accumulation", "batch_size"} <= options.keys():
        raise UsageError(
            f"`gradient_accumulation` and `batch_size` are one setting of `task={END_TO_END}`.", hint="Give one."
        )
    named = {END_TO_END_NAMES.get(name, name): value for name, value in options.items()}
    return end_to_end_request(source, {"end_to_end": "ce", **named})


def plan(job: FinetuneJob | QuantizeRequest, progress: Progress) -> FinetunePlan | QuantizePlan:
    """What the run will do and cost; nothing is written. Raises as :func:`prepare`."""
    return quantize.plan(job, progress) if isinstance(job, QuantizeRequest) else job.plan


def finetune(
    job: FinetuneJob | QuantizeRequest, progress: Progress, on_plan: Callable[[Any], None] = lambda plan: None
) -> tuple[Path, QuantizedManifest]:
    """Train as :func:`prepare` settled it.

    Args:
        job: the run.
        progress: told how it goes.
        on_plan: called with the plan before anything is written.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        InputError, NumericsError, ResourceError: as :func:`~ulbq.pipeline.finetune_run.finetune`.
    """
    if isinstance(job, QuantizeRequest):
        return quantize.quantize(job, progress, on_plan=on_plan, name=telling_name(str(job.source)))
    on_plan(job.plan)
    return finetune_run.finetune(job, progress)


def end_to_end_request(source: str, options: Mapping[str, Any]) -> QuantizeRequest:
    """The quantization run that trains an artifact end to end and leaves its blocks as they are.

    Args:
        source: path of the artifact.
        options: fields of a request that say how; None for what was left open.

    Raises:
        InputError: no quantized artifact, or one that cannot be read.
    """
    found, manifest = open_quantized(source, "fine-tune end to end", offline=bool(options.get("offline")), verify=True)
    own = manifest.method in METHODS and "end_to_end" in takes(manifest.method)
    method = manifest.method if own else TRAINABLE[manifest.scheme["format"]].method
    known = takes(method)
    # What is off is so by default, and may mean nothing beside the others.
    form = {name: value for name, value in manifest.scheme.items() if name in known and value is not False}
    if "tied_scales" in known:
        form["tied_scales"] = manifest.scheme["format"] == "affine"
    if manifest.scheme["format"] == "k_quant":
        form["k_quant"] = True
    given = {name: value for name, value in options.items() if value is not None}
    # Blocks do not train, and what holds salient weights in place has no part in this.
    off = {name: value for name, value in {"epochs": 0, "penalty": 0.0, "adapter": False}.items() if name in known}
    values = {"source": source, "method": method, **off, **form, **_adapter(found), **given}
    if values.get("end_to_end_train") == "all" and "train_weights" in known:
        values["train_weights"] = True
    return QuantizeRequest.model_validate(values)


def telling_name(source: str) -> str:
    """What the artifact is called that such a run makes."""
    return f"{Path(source).resolve().name}-end-to-end"


def _adapter(source: ModelSource) -> dict[str, Any]:
    """Options for the adapter that an artifact has; nothing for none."""
    folder = adapter_folder(source)
    if folder is None:
        return {}
    config, adapters = read_adapter(folder)
    targets = {} if adapters.keys() == source.packed.keys() else {"targets": config.targets}
    return {"adapter": True, "rank": config.rank, "alpha": config.alpha, "dora": config.dora, **targets}

"""``ulbq quantize``: a model in, a packed artifact out."""

from typing import TYPE_CHECKING, Any

from ulbq.errors import UsageError

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
from .plan_table import show_plan
from .stages import read_stages
from .streams import write

if TYPE_CHECKING:
    from ulbq.pipeline.request import QuantizeRequest

_NOT_OF_A_REQUEST = frozenset({"recipe", "list_recipes", "dry_run", "json", "quiet", "debug"})
_DEFAULT_METHOD = "db-llm"


def quantize(
    source: Source = None,
    method: o.Method = None,
    recipe: o.Recipe = None,
    list_recipes: o.ListRecipes = False,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    rotate: o.Rotate = None,
    symmetric: o.Symmetric = None,
    search: o.Search = None,
    start: o.Start = None,
    experts: o.Experts = None,
    zeros: o.Zeros = None,
    damping: o.Damping = None,
    act_order: o.ActOrder = None,
    true_sequential: o.TrueSequential = None,
    column_block: o.ColumnBlock = None,
    target_bits: o.TargetBits = None,
    allocation: o.Allocation = None,
    outlier_bits: o.OutlierBits = None,
    refit: o.Refit = None,
    as_published: o.AsPublished = None,
    preset: o.Preset = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    epochs: t.Epochs = None,
    batch_size: t.BatchSize = None,
    micro_batch: t.MicroBatch = None,
    granularity: t.Granularity = None,
    train_weights: t.TrainWeights = None,
    train: t.Train = None,
    optimizer: t.Optimizer = None,
    rate_unit: t.RateUnit = None,
    weight_rate: t.WeightRate = None,
    scale_rate: t.ScaleRate = None,
    norm_rate: t.NormRate = None,
    router_rate: t.RouterRate = None,
    scale_decay: t.ScaleDecay = None,
    schedule: t.Schedule = None,
    warmup: t.Warmup = None,
    final_rate: t.FinalRate = None,
    token_weighting: t.TokenWeighting = None,
    augmented_loss: t.AugmentedLoss = None,
    sliced_wasserstein: t.SlicedWasserstein = None,
    clip: t.Clip = None,
    patience: t.Patience = None,
    retries: t.Retries = None,
    adapter: t.Adapter = None,
    rank: t.Rank = None,
    alpha: t.Alpha = None,
    dropout: t.Dropout = None,
    dora: t.Dora = None,
    targets: t.Targets = None,
    adapter_rate: t.AdapterRate = None,
    adapter_decay: t.AdapterDecay = None,
    base_share: t.BaseShare = None,
    stages: t.StageTexts = None,
    penalty: t.Penalty = None,
    block_multiplier: t.BlockMultiplier = None,
    penalize: t.Penalize = None,
    saliency: t.Saliency = None,
    saliency_power: t.SaliencyPower = None,
    fit_temperature: t.FitTemperature = None,
    end_to_end: t.EndToEnd = None,
    end_to_end_data: t.EndToEndData = None,
    end_to_end_samples: t.EndToEndSamples = None,
    end_to_end_template: t.EndToEndTemplate = None,
    end_to_end_epochs: t.EndToEndEpochs = None,
    end_to_end_rate: t.EndToEndRate = None,
    end_to_end_train: t.EndToEndTrain = None,
    end_to_end_zero_rate: t.EndToEndZeroRate = None,
    accumulation: t.Accumulation = None,
    checkpointing: t.Checkpointing = None,
    teacher: t.Teacher = None,
    teacher_top_k: t.TeacherTopK = None,
    end_to_end_gamma: t.EndToEndGamma = None,
    end_to_end_hidden_weight: t.EndToEndHiddenWeight = None,
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
    """Quantize a model to 1 to 4 bits, one block at a time. A stopped run goes on where it was."""
    given = {name: value for name, value in locals().items() if name not in _NOT_OF_A_REQUEST}
    given |= {
        "stages": read_stages(stages) if stages else None,
        "targets": _names(targets) if targets else None,
        "activation_memory": read_size(activation_memory) if activation_memory else None,
    }
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(out, force=force)
    given["source"] = read_source(source, "model", progress)

    from ulbq.pipeline.quantize import plan, quantize

    request = _request(given, recipe)
    if dry_run:
        planned = plan(request, progress)
        show_plan(planned)
        if json:
            write(planned.model_dump_json(indent=2))
        return
    emit(*quantize(request, progress, on_plan=(lambda planned: None) if quiet else show_plan))


def _request(given: dict[str, Any], recipe: str | None) -> "QuantizeRequest":
    from ulbq.pipeline.recipes import load, request_of

    if recipe is not None:
        return request_of(given, load(recipe))
    return request_of({**given, "method": given["method"] or _DEFAULT_METHOD}, None)


def _names(text: str) -> tuple[str, ...]:
    """Words of ``q_proj,v_proj``."""
    names = tuple(name for name in (part.strip() for part in text.split(",")) if name)
    if not names:
        raise UsageError(f"--targets '{text}' names no layer.", hint="Write --targets q_proj,v_proj.")
    return names

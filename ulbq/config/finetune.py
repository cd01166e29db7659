"""What ``finetune`` is asked to do."""

from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from ulbq.config.adapter import LAYERS, AdapterConfig
from ulbq.config.finetuning import PHASE_OPTIONS, FinetuneForm, Loss, Trained, TrainedBeside
from ulbq.config.options import (
    ADAPTER,
    HOW,
    LEARN,
    MOST,
    OF_END_TO_END_ALONE,
    Count,
    Layers,
    Option,
    Part,
    Positive,
    Settings,
    Texts,
    left_open,
    options,
)
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.run import (
    DATA_SETS,
    DataDir,
    Deterministic,
    Device,
    Force,
    LogTo,
    Offline,
    Out,
    Precision,
    RecipeRecord,
    Seed,
    Shard,
    Template,
)

VALIDATION = 64
"""Examples that are held out where nobody says how many; fewer where few are asked for."""

NOT_IN_FINGERPRINT = frozenset(
    {
        "source",
        "out",
        "force",
        "offline",
        "data_dir",
        "device",
        "recipe",
        "save_every",
        "log_to",
        "deterministic",
        "shard",
    }
)
"""Fields that do not decide what a run makes."""


_TRAIN = Option(
    "What trains: the adapter; the scales of the packed weights too. Of end-to-end: scales; the zero points of an "
    "asymmetric affine format too; or weights too.",
    HOW,
    default="adapter; of end-to-end scales",
    primary=True,
)


class FinetuneRequest(FinetuneForm):
    """A fine-tuning run of a packed model on a task.

    Attributes:
        source: path of the artifact.
        task: the recipe's name, for people and the manifest.
        recipe: what filled in the options, with its hash.
    """

    source: str
    task: str
    recipe: RecipeRecord | None = None
    data: Annotated[
        Texts | None,
        Option(
            "An instruction set, whose answers alone are learnt: a file of instruction and output, prompt and "
            "completion, or chats; a Hub id; alpaca. Or plain text, as 'quantize --calibration' takes it.",
            LEARN,
            "NAME|FILE",
            default="the task's; for end-to-end wikitext2, else self",
            offers=DATA_SETS,
            primary=True,
        ),
    ] = None
    template: Annotated[
        Template | None,
        Option(
            "How instructions are laid out: by the tokenizer's chat template, as Alpaca's prompt, or as LoftQ's for "
            "GSM8K.",
            LEARN,
            default="the task's, else chat where there is one",
        ),
    ] = None
    samples: Annotated[
        Count | None,
        Option("Training samples.", LEARN, "N", default="all; of end-to-end the preset's", primary=True),
    ] = None
    validation_samples: Annotated[
        Count | None,
        Option("Samples that are held out and measured.", LEARN, "N", default="64, or 1/8", formerly=("heldout",)),
    ] = None
    sequence_length: Annotated[
        int, Field(ge=2, le=MOST), Option("Tokens a sample.", LEARN, "N", default="the task's", primary=True)
    ] = 512
    train: Annotated[TrainedBeside, _TRAIN] = "adapter"
    eval_every: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option(
            "Steps between two looks at the held-out samples; 0: before and after only.",
            HOW,
            "N",
            default="an epoch",
        ),
    ] = None
    save_every: Annotated[
        Count | None,
        Option(
            "Steps between two checkpoints, from which a stopped run goes on.", HOW, "N", default="a tenth of the run"
        ),
    ] = None
    shard: Shard = None
    precision: Precision = "auto"
    deterministic: Deterministic = False
    fresh: Annotated[
        bool,
        Option("Begin with a new adapter, and lose the artifact's own.", ADAPTER, flag="--fresh"),
    ] = False
    rank: Annotated[Count | None, Option("Of a new adapter.", ADAPTER, "N", default="the task's", primary=True)] = None
    alpha: Annotated[
        Positive | None, Option("A new adapter is scaled by alpha / rank.", ADAPTER, "X", default="the task's")
    ] = None
    dora: Annotated[
        bool | None, Option("Learn the rows' magnitudes too, or not.", ADAPTER, flag="--dora/--lora", default="lora")
    ] = None
    dropout: Annotated[
        Part | None,
        Option(
            "Share of the adapter's inputs dropped in training.",
            ADAPTER,
            "X",
            default="the adapter's own, else the task's; of end-to-end 0",
        ),
    ] = None
    targets: Annotated[
        Layers | None,
        Option("Layers with a new adapter, as in q_proj,v_proj.", ADAPTER, "NAME,…", default="all", offers=LAYERS),
    ] = None
    seed: Seed = 0
    device: Device = "auto"
    data_dir: DataDir = None
    offline: Offline = False
    log_to: LogTo = None
    out: Out = None
    force: Force = False

    @property
    def held_out(self) -> int:
        """How many examples are held out."""
        if self.validation_samples is not None:
            return self.validation_samples
        return VALIDATION if self.samples is None else min(VALIDATION, max(2, self.samples // 8))

    def new_adapter(self) -> AdapterConfig:
        """Form of a new adapter."""
        given = {name: getattr(self, name) for name in ("rank", "alpha", "dora", "dropout", "targets")}
        return AdapterConfig(**{name: value for name, value in given.items() if value is not None})


class _EndToEnd(Settings):
    """What end-to-end training calls otherwise than a quantization run, or takes other values for."""

    loss: Annotated[
        Loss | None,
        Option(
            "Cross-entropy of the text, the full-precision parent's predictions, both, with hidden states too, or "
            "deviation-aware.",
            OF_END_TO_END_ALONE,
            default="ce",
            primary=True,
        ),
    ] = None
    train: Annotated[Literal[TrainedBeside, Trained] | None, _TRAIN] = None


OF_END_TO_END = {
    **{name: PHASE_OPTIONS[name] for name in ("loss", "lr_factor", "zero_lr", "dad_gamma", "hidden_weight")},
    **{
        name: name
        for name in ("preset", "gradient_accumulation", "final_lr_factor", "base_share", "teacher", "teacher_top_k")
    },
    **{name: name for name in ("weight_lr", "norm_lr", "router_lr", "activation_memory", "stream")},
}
"""What means nothing to a task: fields of a quantization run, by what they are called here."""
OF_TASKS = frozenset(
    {
        *("validation_samples", "micro_batch", "eval_every", "save_every"),
        *("fresh", "rank", "alpha", "dora", "targets"),
    }
)
"""What means nothing to end-to-end training."""
END_TO_END_NAMES = {
    **{"data": "end_to_end_data", "template": "end_to_end_template"},
    **{name: PHASE_OPTIONS[name] for name in ("epochs", "train", "batch_size")},
    **OF_END_TO_END,
}
"""Fields of a quantization run that are called otherwise here."""


def _asked() -> dict[str, Any]:
    fields = {name: field for name, field, _ in options(FinetuneRequest)}
    fields |= {name: field for name, field, _ in options(_EndToEnd)}
    whole = {name: field for name, field, _ in options(QuantizeRequest)}
    fields |= {name: whole[field] for name, field in OF_END_TO_END.items() if name != "loss"}
    return {name: left_open(field) for name, field in fields.items()}


FinetuneOptions: Any = create_model("FinetuneOptions", __base__=Settings, **_asked())
"""What can be typed, for a task or for end-to-end training; None for what was not."""

"""The options of ``ulbq quantize`` as types: how to train, by the section of the help page that they stand in.

What is not typed is the recipe's, or the method's default: a signature gives None.
"""

from typing import Annotated, Literal

from .quantize_options import TEXTS, option

_TRAINING, _ADAPTER, _STAGES, _END_TO_END, COMPUTE = "Training", "Adapter", "Stages", "End to end", "Compute"

Epochs = Annotated[
    int | None,
    option(
        "--epochs",
        "Passes over the samples, for every block; 0 stores the closed-form start.",
        _TRAINING,
        default="preset; 0 for claq",
        min=0,
        metavar="N",
    ),
]
BatchSize = Annotated[
    int | None,
    option("--batch-size", "Samples a step.", _TRAINING, default="4; 2 for apiq and ulb-sapr", min=1, metavar="N"),
]
MicroBatch = Annotated[
    int | None,
    option(
        "--micro-batch",
        "Samples that run at once; a step adds up several. For less memory.",
        _TRAINING,
        default="the batch",
        min=1,
        metavar="N",
    ),
]
Granularity = Annotated[
    Literal["block", "layer"] | None,
    option("--granularity", "Match each block's output, or each layer's.", _TRAINING, default="block"),
]
TrainWeights = Annotated[
    bool | None,
    option(
        "--train-weights/--freeze-weights",
        "Let the weights move, or train scales, norms and adapter only.",
        _TRAINING,
        default="train; freeze for claq",
    ),
]
Train = Annotated[
    Literal["clipping", "grid", "rounding", "weights", "all"] | None,
    option(
        "--train",
        "Of efficientqat: clip ends; scales and zero points; these and each weight within half a step; weights alone; "
        "or weights and clip ends.",
        _TRAINING,
        default="all",
    ),
]
Optimizer = Annotated[
    Literal["adamw", "sign"] | None,
    option("--optimizer", "AdamW, or descent by the gradients' signs.", _TRAINING, default="adamw"),
]
RateUnit = Annotated[
    Literal["step", "weight"] | None,
    option(
        "--rate-unit",
        "What rates of weights and scales count in: grid steps, or the weight's own unit as published (efficientqat).",
        _TRAINING,
        default="step",
    ),
]
WeightRate = Annotated[
    float | None,
    option(
        "--weight-rate",
        "Learning rate of the weights, in grid steps.",
        _TRAINING,
        default="0.015; 0.02 for apiq and ulb-sapr; 0.09 for binary-mos",
        metavar="X",
    ),
]
ScaleRate = Annotated[
    float | None,
    option(
        "--scale-rate",
        "Learning rate of scales and clip ends, relative to the grid step.",
        _TRAINING,
        default="0.005; 0.03 for binary-mos",
        metavar="X",
    ),
]
NormRate = Annotated[
    float | None,
    option(
        "--norm-rate", "Learning rate of the norm weights; 0 freezes them.", _TRAINING, default="0.002", metavar="X"
    ),
]
RouterRate = Annotated[
    float | None,
    option("--router-rate", "Learning rate of the router (binary-mos).", _TRAINING, default="0.03", metavar="X"),
]
ScaleDecay = Annotated[
    float | None, option("--scale-decay", "Weight decay of scales and clip ends.", _TRAINING, default="0", metavar="X")
]
Schedule = Annotated[
    Literal["cosine", "constant"] | None,
    option("--schedule", "Whether the rates fall.", _TRAINING, default="cosine"),
]
Warmup = Annotated[
    float | None, option("--warmup", "Share of the steps with rising rates.", _TRAINING, default="0.05", metavar="X")
]
FinalRate = Annotated[
    float | None,
    option("--final-rate", "Share of the rates that the cosine leaves.", _TRAINING, default="0.05", metavar="X"),
]
TokenWeighting = Annotated[
    Literal["energy", "uniform"] | None,
    option(
        "--token-weighting",
        "Count each token by its relative error, or all by plain squared error.",
        _TRAINING,
        default="energy",
    ),
]
AugmentedLoss = Annotated[
    bool | None,
    option(
        "--augmented-loss/--no-augmented-loss",
        "Also match the full-precision block on the quantized stream.",
        _TRAINING,
        default="no",
    ),
]
SlicedWasserstein = Annotated[
    float | None,
    option(
        "--sliced-wasserstein",
        "Weight of the sliced-Wasserstein distance of the outputs.",
        _TRAINING,
        default="0",
        metavar="X",
    ),
]
Clip = Annotated[
    float | None, option("--clip", "Largest gradient norm; 0 for none.", _TRAINING, default="1", metavar="X")
]
Patience = Annotated[
    int | None,
    option(
        "--patience",
        "Epochs without a better held-out loss before a block stops.",
        _TRAINING,
        default="4",
        min=1,
        metavar="N",
    ),
]
Retries = Annotated[
    int | None,
    option(
        "--retries",
        "How often a block that got worse starts again at a quarter of the rates.",
        _TRAINING,
        default="2",
        min=0,
        metavar="N",
    ),
]

Adapter = Annotated[
    bool | None,
    option(
        "--adapter/--no-adapter",
        "Train a low-rank adapter beside the weights; it is stored in adapter/.",
        _ADAPTER,
        default="on for apiq and ulb-sapr",
    ),
]
Rank = Annotated[int | None, option("--rank", "Of the adapter.", _ADAPTER, default="64", min=1, metavar="N")]
Alpha = Annotated[
    float | None, option("--alpha", "The adapter is scaled by alpha / rank.", _ADAPTER, default="16", metavar="X")
]
Dropout = Annotated[
    float | None,
    option("--dropout", "Share of the adapter's inputs dropped in training.", _ADAPTER, default="0", metavar="X"),
]
Dora = Annotated[
    bool | None, option("--dora/--lora", "Learn the rows' magnitudes too, or not.", _ADAPTER, default="lora")
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Targets = Annotated[
    str | None,
    option(
        "--targets",
        "Layers with an adapter, as in q_proj,v_proj.",
        _ADAPTER,
        default="all",
        metavar="NAME,…",
        autocompletion=lambda: TARGETS,
    ),
]
AdapterRate = Annotated[
    float | None, option("--adapter-rate", "Learning rate of the adapter.", _ADAPTER, default="0.005", metavar="X")
]
AdapterDecay = Annotated[
    float | None, option("--adapter-decay", "Weight decay of the adapter.", _ADAPTER, default="0", metavar="X")
]
BaseShare = Annotated[
    float | None,
    option(
        "--base-share",
        "Share of the steps without the adapter, so that the base can stand alone.",
        _ADAPTER,
        default="0",
        metavar="X",
    ),
]

StageTexts = Annotated[
    list[str] | None,
    option(
        "--stage",
        "A stage of the training, as in wpt:epochs=5,scale-rate=0.01; repeat for the next: wpt (weights alone), mixed, "
        "opt (outputs alone). Keys: epochs, penalty, weight-rate, scale-rate, norm-rate, adapter-rate, router-rate, "
        "scale-decay, adapter-decay.",
        _STAGES,
        default="one mixed stage of --epochs",
        metavar="STAGE:epochs=N…",
        autocompletion=lambda: ["wpt", "mixed", "opt"],
    ),
]
Penalty = Annotated[
    float | None,
    option(
        "--lambda",
        "Weight of the penalty on moving salient weights, relative to the block's salient energy.",
        _STAGES,
        default="the method's; 0 but for ulb-sapr",
        metavar="X",
    ),
]
BlockMultiplier = Annotated[
    float | None,
    option("--block-multiplier", "Lambda grows by this from block to block.", _STAGES, default="1", metavar="X"),
]
Penalize = Annotated[
    Literal["before-adapter", "after-adapter"] | None,
    option(
        "--penalize",
        "Hold the quantized weight alone, or with its adapter.",
        _STAGES,
        default="before-adapter",
    ),
]
Saliency = Annotated[
    str | None,
    option(
        "--saliency",
        "What weighs the penalty, or the layers that share claq's budget: an artifact, a kind to compute now, or none.",
        _STAGES,
        default="fisher for ulb-sapr",
        metavar="DIR|KIND|none",
        autocompletion=lambda: ["fisher", "gradient", "hessian", "wanda", "magnitude", "none"],
    ),
]
SaliencyPower = Annotated[
    float | None,
    option("--saliency-power", "Exponent of the scores; 1 is as published.", _STAGES, default="0.5", metavar="X"),
]

FitTemperature = Annotated[
    bool | None,
    option(
        "--fit-temperature/--no-fit-temperature",
        "Fit how sure the model is to its full-precision self, on the held-out samples; goes into the last norm.",
        _END_TO_END,
        default="no-fit-temperature",
    ),
]
EndToEnd = Annotated[
    Literal["none", "ce", "kl", "ce-kl", "kl-hidden", "dad"] | None,
    option(
        "--end-to-end",
        "Train the whole model after its blocks: on the text, to the teacher's predictions, both, with hidden states "
        "too, or deviation-aware.",
        _END_TO_END,
        default="none",
    ),
]
DATA_SETS = [*TEXTS, "llm-adapters/math"]
EndToEndData = Annotated[
    str | None,
    option(
        "--end-to-end-data",
        "What it trains on: text as --calibration takes it, or an instruction set, whose answers alone are learnt: "
        "alpaca, a Hub id, or a file of instruction and output, prompt and completion, or chats.",
        _END_TO_END,
        default="the calibration samples",
        metavar="NAME|FILE",
        autocompletion=lambda: DATA_SETS,
    ),
]
EndToEndSamples = Annotated[
    int | None,
    option(
        "--end-to-end-samples",
        "How many of these train; more or fewer than the blocks' --samples.",
        _END_TO_END,
        default="as --samples",
        min=1,
        metavar="N",
    ),
]
EndToEndTemplate = Annotated[
    Literal["chat", "alpaca", "gsm8k"] | None,
    option(
        "--template",
        "How instructions are laid out: by the tokenizer's chat template, as Alpaca's prompt, or as LoftQ's for GSM8K.",
        _END_TO_END,
        default="chat where there is one",
    ),
]
EndToEndEpochs = Annotated[
    int | None,
    option("--end-to-end-epochs", "Passes over the samples.", _END_TO_END, default="1", min=1, metavar="N"),
]
EndToEndRate = Annotated[
    float | None,
    option(
        "--end-to-end-rate",
        "Rates, as a share of those of the blocks.",
        _END_TO_END,
        default="0.4; 0.1 for binary-mos",
        metavar="X",
    ),
]
EndToEndTrain = Annotated[
    Literal["scales", "scales-zeros", "all"] | None,
    option(
        "--end-to-end-train",
        "What trains: scales; the zero points of an asymmetric affine format too; or weights too.",
        _END_TO_END,
        default="scales",
    ),
]
EndToEndZeroRate = Annotated[
    float | None,
    option(
        "--zero-rate",
        "Learning rate of zero points (scales-zeros), in grid steps.",
        _END_TO_END,
        default="0.1",
        metavar="X",
    ),
]
Checkpointing = Annotated[
    bool | None,
    option(
        "--checkpointing/--no-checkpointing",
        "Run each block again for its gradients, or keep all that they need in memory.",
        _END_TO_END,
        default="checkpointing",
    ),
]
Accumulation = Annotated[
    int | None, option("--accumulation", "Samples a step.", _END_TO_END, default="2", min=1, metavar="N")
]
Teacher = Annotated[
    Literal["streamed", "cached"] | None,
    option("--teacher", "Run the teacher beside, or keep its best guesses on disk.", _END_TO_END, default="streamed"),
]
TeacherTopK = Annotated[
    int | None,
    option("--teacher-top-k", "Guesses a token in that cache.", _END_TO_END, default="64", min=1, metavar="N"),
]
EndToEndGamma = Annotated[
    float | None,
    option(
        "--dad-gamma", "Exponent of the entropies that weigh tokens (dad).", _END_TO_END, default="0.5", metavar="X"
    ),
]
EndToEndHiddenWeight = Annotated[
    float | None,
    option("--hidden-weight", "Weight of the hidden states' error (kl-hidden).", _END_TO_END, default="1", metavar="X"),
]

ActivationMemory = Annotated[
    str | None,
    option(
        "--activation-memory",
        "Activations beyond this lie on disk (512M, 4G, …).",
        COMPUTE,
        default="4G",
        metavar="SIZE",
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"] | None,
    option(
        "--precision",
        "Dtype of the matrix products; auto is bf16 where the hardware has it.",
        COMPUTE,
        default="auto",
    ),
]

"""The options of ``ulbq finetune`` as types, where they are not those of ``ulbq quantize``.

What is not typed is the task's: a signature gives None.
"""

from typing import Annotated, Literal

import typer

from . import training_options as t
from .quantize_options import option
from .recipe_list import complete_task, show_tasks

_WHAT, _HOW, _RATES, _ADAPTER = "What to learn", "How", "Rates", "Adapter"
_END_TO_END = "Of end-to-end alone"

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK|FILE.yaml",
        help="What the adapter learns: gsm8k, arithmetic, commonsense, wikitext2; instructions, with --data; or a "
        "file of options. end-to-end: scales, norms and adapter of the whole model learn together.",
        autocompletion=complete_task,
        rich_help_panel=_WHAT,
    ),
]
ListTasks = Annotated[
    bool, typer.Option("--list-tasks", help="Show the tasks, then stop.", is_eager=True, callback=show_tasks)
]
Data = Annotated[
    str | None,
    option(
        "--data",
        "An instruction set, whose answers alone are learnt: a file of instruction and output, prompt and completion, "
        "or chats; a Hub id; alpaca. Or plain text, as 'quantize --calibration' takes it.",
        _WHAT,
        default="the task's; for end-to-end wikitext2, else self",
        metavar="NAME|FILE",
        autocompletion=lambda: t.DATA_SETS,
    ),
]
Template = Annotated[
    Literal["chat", "alpaca", "gsm8k"] | None,
    option(
        "--template",
        "How instructions are laid out: by the tokenizer's chat template, as Alpaca's prompt, or as LoftQ's for GSM8K.",
        _WHAT,
        default="the task's, else chat where there is one",
    ),
]
Samples = Annotated[
    int | None,
    option("--samples", "Training samples.", _WHAT, default="all; of end-to-end the preset's", min=1, metavar="N"),
]
Heldout = Annotated[
    int | None,
    option("--heldout", "Samples that are held out and measured.", _WHAT, default="64, or 1/8", min=1, metavar="N"),
]
SequenceLength = Annotated[
    int | None, option("--sequence-length", "Tokens a sample.", _WHAT, default="the task's", min=2, metavar="N")
]

Train = Annotated[
    Literal["adapter", "adapter-scales", "scales", "scales-zeros", "all"] | None,
    option(
        "--train",
        "What trains: the adapter; the scales of the packed weights too. Of end-to-end: scales; the zero points of an "
        "asymmetric affine format too; or weights too.",
        _HOW,
        default="adapter; of end-to-end scales",
    ),
]
Epochs = Annotated[
    int | None,
    option("--epochs", "Passes over the samples.", _HOW, default="the task's; of end-to-end 1", min=1, metavar="N"),
]
BatchSize = Annotated[
    int | None, option("--batch-size", "Samples a step.", _HOW, default="the task's", min=1, metavar="N")
]
MicroBatch = Annotated[
    int | None,
    option("--micro-batch", "Samples that run at once; a step adds up several.", _HOW, default="4", min=1, metavar="N"),
]
EvalEvery = Annotated[
    int | None,
    option(
        "--eval-every",
        "Steps between two looks at the held-out samples; 0: before and after only.",
        _HOW,
        default="an epoch",
        min=0,
        metavar="N",
    ),
]
SaveEvery = Annotated[
    int | None,
    option(
        "--save-every",
        "Steps between two checkpoints, from which a stopped run goes on.",
        _HOW,
        default="a tenth of the run",
        min=1,
        metavar="N",
    ),
]
Checkpointing = Annotated[
    bool | None,
    option(
        "--checkpointing/--no-checkpointing",
        "Run each block again for its gradients, or keep all that they need in memory.",
        _HOW,
        default="checkpointing",
    ),
]
Clip = Annotated[
    float | None,
    option("--clip", "Largest gradient norm; 0 for none.", _HOW, default="the task's; of end-to-end 1", metavar="X"),
]

Schedule = Annotated[
    Literal["cosine", "linear", "constant"] | None,
    option("--schedule", "How the rates fall.", _RATES, default="the task's; of end-to-end cosine"),
]
Warmup = Annotated[
    float | None,
    option(
        "--warmup",
        "Share of the steps with rising rates.",
        _RATES,
        default="the task's; of end-to-end 0.05",
        metavar="X",
    ),
]
AdapterRate = Annotated[
    float | None,
    option(
        "--adapter-rate",
        "Learning rate of the adapter.",
        _RATES,
        default="the task's; of end-to-end 0.005",
        metavar="X",
    ),
]
ScaleRate = Annotated[
    float | None,
    option(
        "--scale-rate",
        "Learning rate of scales, in shares of themselves.",
        _RATES,
        default="0.001; of end-to-end 0.005, of binary-mos 0.03",
        metavar="X",
    ),
]
AdapterDecay = Annotated[
    float | None,
    option(
        "--adapter-decay",
        "Weight decay of the adapter.",
        _RATES,
        default="the task's; of end-to-end 0",
        metavar="X",
    ),
]
ScaleDecay = Annotated[
    float | None, option("--scale-decay", "Weight decay of scales.", _RATES, default="0", metavar="X")
]

Fresh = Annotated[
    bool | None,
    option("--fresh", "Begin with a new adapter, and lose the artifact's own.", _ADAPTER, default="its own goes on"),
]
Rank = Annotated[int | None, option("--rank", "Of a new adapter.", _ADAPTER, default="the task's", min=1, metavar="N")]
Alpha = Annotated[
    float | None,
    option("--alpha", "A new adapter is scaled by alpha / rank.", _ADAPTER, default="the task's", metavar="X"),
]
Dora = Annotated[
    bool | None, option("--dora/--lora", "Learn the rows' magnitudes too, or not.", _ADAPTER, default="lora")
]
Dropout = Annotated[
    float | None,
    option(
        "--dropout",
        "Share of the adapter's inputs dropped in training.",
        _ADAPTER,
        default="the adapter's own, else the task's; of end-to-end 0",
        metavar="X",
    ),
]
Targets = Annotated[
    str | None,
    option(
        "--targets",
        "Layers with a new adapter, as in q_proj,v_proj.",
        _ADAPTER,
        default="all",
        metavar="NAME,…",
        autocompletion=lambda: t.TARGETS,
    ),
]

Loss = Annotated[
    Literal["ce", "kl", "ce-kl", "kl-hidden", "dad"] | None,
    option(
        "--loss",
        "Cross-entropy of the text, the full-precision parent's predictions, both, with hidden states too, or "
        "deviation-aware.",
        _END_TO_END,
        default="ce",
    ),
]
Rate = Annotated[
    float | None,
    option("--rate", "Factor of all rates.", _END_TO_END, default="0.4; 0.1 for binary-mos", metavar="X"),
]

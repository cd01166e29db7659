"""The options of ``ulbq quantize`` as types: what to make, and from which samples. How: ``training_options.py``.

What is not typed is the recipe's, or the method's default: a signature gives None.
"""

import re
from typing import Annotated, Any, Literal

import typer

from ulbq.errors import UsageError

from .recipe_list import complete_recipe, show_recipes

_FORMAT, _COLUMNS, _CODEBOOKS, CALIBRATION = "Format", "Columns (gptq, claq)", "Codebooks (claq)", "Calibration"


def option(name: str, help: str, panel: str, *, default: str, **more: Any) -> Any:
    """An option of one section.

    Args:
        default: what the help page says of it.
        more: as ``typer.Option`` takes it.
    """
    return typer.Option(name, help=help, rich_help_panel=panel, show_default=default, **more)


Method = Annotated[
    Literal["db-llm", "rtn", "gptq", "claq", "efficientqat", "apiq", "ulb-sapr", "binary-mos"] | None,
    typer.Option(
        "--method",
        "-m",
        help="The published recipe to follow. "
        "db-llm: two bit planes; rtn: affine rounding, in seconds; gptq: the same with errors made good, in "
        "minutes; claq: a codebook for every column, wider where it pays; efficientqat: affine "
        "codes, all of a block trained; apiq: affine codes and an adapter; "
        "ulb-sapr: the same with salient weights held in place; binary-mos: signs and mixed scales, 1 bit.",
        show_default="the recipe's, else db-llm",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE.yaml",
        help="Options from a file or a shipped recipe; what is typed wins (--stage over its epochs, and the reverse).",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
ListRecipes = Annotated[
    bool,
    typer.Option("--list-recipes", help="Show the shipped recipes, then stop.", is_eager=True, callback=show_recipes),
]


def _read_bits(text: str | int) -> int:
    """Whole bits; a fraction is what another option takes."""
    try:
        return int(text)
    except ValueError:
        fraction = re.fullmatch(r"\d*\.\d+", str(text)) is not None
    if fraction:
        raise UsageError(
            f"--bits takes a whole number, and {text} is none.",
            hint=f"--target-bits {text} spends so many on average (with --method claq).",
        )
    raise UsageError(f"--bits takes a number, and '{text}' is none.", hint="1, 2, 3, 4 or 8.")


Bits = Annotated[
    int | None,
    option(
        "--bits",
        "1, 2, 3, 4 or 8; claq takes 2, 3 or 4.",
        _FORMAT,
        parser=_read_bits,
        default="4 for rtn and gptq, 2 for apiq, ulb-sapr and claq",
        metavar="N",
    ),
]
GroupSize = Annotated[
    int | None,
    option("--group-size", "Columns that share a scale; -1 for rows.", _FORMAT, default="64", metavar="N"),
]
Rotate = Annotated[
    bool | None,
    option(
        "--rotate/--no-rotate",
        "Spread outliers first, by rotations that leave the model's function as it is.",
        _FORMAT,
        default="no-rotate",
    ),
]
Symmetric = Annotated[
    bool | None,
    option("--symmetric/--asymmetric", "Fixed zero point, or one a group.", _FORMAT, default="asymmetric"),
]
Start = Annotated[
    Literal["min-max", "search", "gptq"] | None,
    option(
        "--start",
        "Where training starts (efficientqat): plain rounding as published, searched ranges, or gptq's codes.",
        _FORMAT,
        default="search",
    ),
]
Search = Annotated[
    bool | None,
    option(
        "--search/--no-search",
        "Shrink each group's range where that lowers its error (rtn, gptq).",
        _FORMAT,
        default="search",
    ),
]
Experts = Annotated[
    int | None, option("--experts", "Pairs of scales to mix (binary-mos).", _FORMAT, default="4", min=1, metavar="N")
]
Zeros = Annotated[
    Literal["none", "output", "input"] | None,
    option("--zeros", "A zero point for each output or input channel (binary-mos).", _FORMAT, default="none"),
]

Damping = Annotated[
    float | None,
    option(
        "--damping",
        "Share of the mean diagonal that is added to the Hessian's diagonal.",
        _COLUMNS,
        default="0.01",
        min=0,
        max=1,
        metavar="X",
    ),
]
ActOrder = Annotated[
    bool | None,
    option("--act-order/--no-act-order", "Take columns with the largest inputs first.", _COLUMNS, default="act-order"),
]
TrueSequential = Annotated[
    bool | None,
    option(
        "--true-sequential/--one-pass",
        "Let layers read what the quantized ones before them in the block give.",
        _COLUMNS,
        default="true-sequential",
    ),
]
ColumnBlock = Annotated[
    int | None,
    option(
        "--column-block",
        "Columns after which errors are handed on to all others; changes speed alone.",
        _COLUMNS,
        default="128",
        min=1,
        metavar="N",
    ),
]

TargetBits = Annotated[
    float | None,
    option(
        "--target-bits",
        "True bits a weight to spend, codebooks and outliers with their positions counted: columns that matter get "
        "wider codes.",
        _CODEBOOKS,
        default="none, all columns alike",
        min=0,
        metavar="X",
    ),
]
Allocation = Annotated[
    Literal["global", "layer", "outlier", "hessian"] | None,
    option(
        "--allocation",
        "Who gets the bits: by the loss that a bit saves, in each layer or across all; or the first columns of an "
        "order, by extreme values or by the Hessian, as published.",
        _CODEBOOKS,
        default="layer",
    ),
]
OutlierBits = Annotated[
    float | None,
    option(
        "--outlier-bits",
        "Of these bits, how many go to single values that are stored as they are.",
        _CODEBOOKS,
        default="as pays; by an order none",
        min=0,
        metavar="X",
    ),
]
Refit = Annotated[
    bool | None,
    option("--refit/--no-refit", "Fit all codebooks together after the pass.", _CODEBOOKS, default="refit"),
]
AsPublished = Annotated[
    bool | None,
    option(
        "--as-published/--as-meant",
        "What the authors' code does, its slips included; bits are nominal.",
        _CODEBOOKS,
        default="as-meant",
    ),
]

Preset = Annotated[
    Literal["quick", "balanced", "best"] | None,
    option(
        "--preset",
        "Samples, length and epochs at once.",
        CALIBRATION,
        default="quick on a CPU, balanced on a GPU",
    ),
]
TEXTS = ["wikitext2", "c4", "ptb", "pile", "redpajama", "alpaca", "mix", "self"]
Calibration = Annotated[
    str | None,
    option(
        "--calibration",
        "wikitext2, c4, ptb, pile, redpajama, alpaca, mix, self, or a file: text, JSONL, Parquet or safetensors.",
        CALIBRATION,
        default="wikitext2, else self",
        metavar="NAME|FILE",
        autocompletion=lambda: TEXTS,
    ),
]
Samples = Annotated[
    int | None, option("--samples", "Training samples.", CALIBRATION, default="preset", min=1, metavar="N")
]
SequenceLength = Annotated[
    int | None, option("--sequence-length", "Tokens a sample.", CALIBRATION, default="preset", min=2, metavar="N")
]

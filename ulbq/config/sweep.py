"""What ``sweep`` is asked to do."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ulbq.config.evaluate import Listed, Names, ScoreOptions
from ulbq.config.methods import METHOD_OPTIONS
from ulbq.config.options import Option
from ulbq.config.quantize import Calibration, PresetChoice, Samples, SequenceLength
from ulbq.config.run import DataDir, Device, Force, Offline, Out
from ulbq.runtime import MAX_SEED


class SweepRequest(ScoreOptions):
    """Many quantization runs of one model, and their scores.

    Attributes:
        source: as of a quantization run; a model in full precision.
        options: of every run whose method takes them, by their names in recipes.
    """

    source: str | None = None
    method: Annotated[
        Names, Option("Methods to try.", "", "NAME,…", flag="--method -m", offers=tuple(METHOD_OPTIONS), primary=True)
    ] = ()
    bits: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...],
        Listed,
        Option(
            "Bits to try with each method; a fraction is spent on average, by methods with target_bits.",
            "",
            "N,…",
            default="each method's own",
            primary=True,
        ),
    ] = ()
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...],
        Field(min_length=1),
        Listed,
        Option("Seeds of every setting.", "", "N,…", default="0", primary=True),
    ] = (0,)
    settings: Annotated[
        Path | None,
        Option(
            "A YAML list of settings instead of a grid, each with the options of a recipe.", "", "FILE", primary=True
        ),
    ] = None
    preset: PresetChoice | None = None
    calibration: Calibration | None = None
    samples: Samples | None = None
    sequence_length: SequenceLength | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    parallel: Annotated[
        int,
        Field(ge=1, le=64),
        Option("Runs at a time, in processes that share the cores; each has a GPU of its own where there are several."),
    ] = 1
    device: Device = "auto"
    data_dir: DataDir = None
    offline: Offline = False
    out: Out = None
    force: Force = False

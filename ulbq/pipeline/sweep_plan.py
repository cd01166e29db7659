"""Which runs a sweep has: a grid or a list of settings, each with every seed, checked before the first begins."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ulbq import runtime
from ulbq.artifacts.names import is_component
from ulbq.artifacts.records import Record
from ulbq.config.evaluate import EvaluateRequest, ScoreOptions
from ulbq.config.methods import method_options
from ulbq.config.options import renamed
from ulbq.config.quantize import QuantizeRequest, check_options, for_method
from ulbq.config.sweep import SweepRequest
from ulbq.data.registry import available, text_set
from ulbq.errors import InputError, UlbqError, UsageError
from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.measurer import Measures
from ulbq.evaluation.results import Protocol
from ulbq.models.source import DEFAULT_NAME, resolve
from ulbq.pipeline import recipes
from ulbq.pipeline.evaluation_plan import CPU_WINDOWS, DEFAULT_TEXT, measures_of, protocol_of
from ulbq.pipeline.predict import Cost
from ulbq.pipeline.quantization_plan import plan as plan_run
from ulbq.pipeline.recipe_files import read_yaml
from ulbq.progress import Progress, Silent

_COMMON = ("preset", "calibration", "samples", "sequence_length")
_OF_THE_SWEEP = ("source", "device", "data_dir", "offline")


@dataclass(frozen=True)
class Setting:
    """What is tried with every seed.

    Attributes:
        name: of its runs, and of their folders.
        options: by the names that they have in recipes; ``recipe`` and ``method`` among them.
    """

    name: str
    options: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The method, the recipe's where it has one. Raises UsageError where it has none."""
        if "method" in self.options:
            return str(self.options["method"])
        if "recipe" not in self.options:
            raise UsageError(f"Setting '{self.name}' has neither a method nor a recipe.", hint="As in 'method: gptq'.")
        return str(recipes.load(str(self.options["recipe"])).options["method"])


@dataclass(frozen=True)
class Run:
    """One run; ``options`` are what was asked of it."""

    name: str
    setting: str
    options: Mapping[str, Any]
    request: QuantizeRequest


class PlannedRun(Record):
    """What one run would do and cost; :class:`~ulbq.pipeline.quantization_plan.QuantizePlan` has more."""

    name: str
    options: dict[str, Any]
    seed: int
    bits_per_weight: float
    cost: Cost


class SweepPlan(Record):
    """What a sweep would do.

    Attributes:
        left_out: why cells of the grid have no run, by their names.
    """

    model: str
    device: str
    runs: tuple[PlannedRun, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class SweepJob:
    """Everything that is settled before the first run.

    Attributes:
        original: the model in full precision.
        scoring: how models are measured, ``measures`` what that comes to.
    """

    request: SweepRequest
    original: EvaluatedModel
    runs: list[Run]
    scoring: EvaluateRequest
    measures: Measures
    protocol: Protocol
    device: torch.device
    plan: SweepPlan


def plan(request: SweepRequest, progress: Progress | None = None) -> SweepPlan:
    """Check a sweep and predict the cost of its runs; nothing is written. Raises as :func:`prepare`."""
    return prepare(request, progress or Silent(), outline=True).plan


def prepare(request: SweepRequest, progress: Progress, *, outline: bool = False) -> SweepJob:
    """Check every run and every score that is asked for.

    Args:
        request: what is asked for.
        progress: told what is chosen.
        outline: no tensor will be read, as of :func:`~ulbq.models.source.resolve`.

    Raises:
        UsageError: nothing to try; options that no method of the sweep takes, or that do not go together.
        InputError: no such model or settings, or a model that is quantized.
        ResourceError: no such device, or no such data here.
    """
    runs, left_out = expand(request)
    for name in request.perplexity:
        text_set(name)
    device = runtime.resolve_device(request.device)
    source = resolve(request.source, offline=request.offline, outline=outline)
    if source.quantized is not None:
        raise InputError(
            f"'{source.given}' is quantized, and a sweep compares with the full-precision model.",
            hint="Give the model that it was made from.",
        )
    check_names(source.name, runs)
    original = EvaluatedModel(source, source.name)
    scoring = _scoring(request, device)
    # As one that has a parent: the runs have this one.
    measures = measures_of(scoring, [EvaluatedModel(source, source.name, original)], device, progress)
    planned = []
    with progress.phase("Planning", len(runs)) as phase:
        for run in runs:
            with _naming(run.name):
                made = plan_run(run.request, Silent())
            options = {name: value for name, value in run.options.items() if name != "seed"}
            planned.append(
                PlannedRun(
                    name=run.name,
                    options=options,
                    seed=run.request.seed,
                    bits_per_weight=made.bits_per_weight,
                    cost=made.cost,
                )
            )
            phase.advance(detail=run.name)
    described = SweepPlan(
        model=source.name, device=runtime.describe_device(device), runs=tuple(planned), left_out=left_out
    )
    protocol = protocol_of(scoring, measures)
    return SweepJob(request, original, runs, scoring, measures, protocol, device, described)


def expand(request: SweepRequest) -> tuple[list[Run], dict[str, str]]:
    """The runs of a sweep, and why cells of its grid have none, by their names. Raises UsageError, InputError."""
    if bool(request.method) == (request.settings is not None):
        raise UsageError(
            "A sweep wants a grid or a file of settings, and not both.",
            hint="As in `method=rtn,gptq` `bits=2,3`, or `settings=FILE`.",
        )
    if request.settings is None:
        settings, left_out = _grid(request)
    else:
        settings, left_out = _listed(request.settings), {}
    given = {name: getattr(request, name) for name in _COMMON}
    common = {name: value for name, value in given.items() if value is not None}
    common |= renamed(QuantizeRequest, request.options)
    for name in common:
        if name not in recipes.OPTIONS:
            raise UsageError(f"There is no option `{name}` for all runs.", hint="See 'ulbq quantize --help-all'.")
        if not any(name in for_method(setting.method) for setting in settings):
            methods = ", ".join(dict.fromkeys(setting.method for setting in settings))
            raise UsageError(f"`{name}` means nothing to any method of this sweep ({methods}).", hint="Leave it out.")
    return [run for setting in settings for run in _runs(setting, common, request)], left_out


def _grid(request: SweepRequest) -> tuple[list[Setting], dict[str, str]]:
    """Every method with every width. What a method has no width for is left out, and has a reason."""
    settings: list[Setting] = []
    left_out: dict[str, str] = {}
    for method in dict.fromkeys(request.method):
        for bits in tuple(dict.fromkeys(request.bits)) or (None,):
            if bits is None:
                settings.append(Setting(method, {"method": method}))
                continue
            name = f"{method}-w{bits:g}"
            asked: dict[str, Any] = {"bits": int(bits)}
            if bits != int(bits):
                asked = {"target_bits": bits}
                # What all layers have at least, where a method usually takes more than is to be spent.
                if method_options(method).model_fields["bits"].default > bits:
                    asked["bits"] = int(bits)
            if (why := _refusal({"method": method, **asked})) is not None:
                left_out[name] = why
            else:
                settings.append(Setting(name, {"method": method, **asked}))
    if not settings:
        raise UsageError(f"Nothing is left to try. {next(iter(left_out.values()))}", hint="Give other `bits`.")
    return settings, left_out


def check_names(original: str, runs: Sequence[Run]) -> None:
    """Refuse names that two models of a sweep would have: scores are kept by them. Raises UsageError."""
    counts = Counter([original, *(run.name for run in runs)])
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UsageError(f"Two models of this sweep would be called '{twice[0]}'.", hint="Give settings other names.")


def _refusal(options: Mapping[str, Any]) -> str | None:
    """Why a method does not take a width."""
    try:
        check_options(QuantizeRequest.model_validate(options))
    except UsageError as error:
        return error.message
    except ValidationError as error:
        return _problem(error)
    return None


def _listed(path: Path) -> list[Setting]:
    """The settings of a file. Raises UsageError, InputError."""
    content = read_yaml("Settings", path)
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"'{path}' holds no list of settings.", hint="As in '- {method: gptq, bits: 2}', one a line.")
    settings = [_setting(entry) for entry in content]
    if twice := [name for name, count in Counter(setting.name for setting in settings).items() if count > 1]:
        raise UsageError(f"Two settings are called '{twice[0]}'.", hint="Give each a 'name' of its own.")
    return settings


def _setting(entry: Mapping[Any, Any]) -> Setting:
    options = {str(key): value for key, value in entry.items() if key != "name"}
    recipe, method = options.get("recipe"), options.get("method")
    telling = str(recipe).rpartition("/")[2].removesuffix(".yaml") if recipe else f"{method}"
    width = options.get("target_bits", options.get("bits"))
    name = str(entry.get("name", telling if width is None else f"{telling}-w{width}"))
    if not is_component(name):
        raise UsageError(f"A setting cannot be called {name!r}.", hint="Its name is that of a folder.")
    options = renamed(QuantizeRequest, options)
    for key in options:
        if key not in recipes.OPTIONS | {"recipe"}:
            raise UsageError(
                f"Setting '{name}' has an unknown option '{key}'.", hint="It takes what a recipe takes, and 'recipe'."
            )
    found = Setting(name, options)
    method_options(found.method)
    return found


def _runs(setting: Setting, common: Mapping[str, Any], request: SweepRequest) -> Iterator[Run]:
    """A setting with every seed; once where nothing is drawn at random."""
    taken = for_method(setting.method)
    shared = {name: value for name, value in common.items() if name in taken and name not in setting.options}
    random = method_options(setting.method).calibrated or shared.get("rotate") or setting.options.get("rotate")
    seeds = tuple(dict.fromkeys(request.seeds)) if random else request.seeds[:1]
    recipe = None if "recipe" not in setting.options else recipes.load(str(setting.options["recipe"]))
    for seed in seeds:
        name = f"{setting.name}-s{seed}" if len(seeds) > 1 else setting.name
        options = {**setting.options, **shared, "seed": seed}
        place = {field: getattr(request, field) for field in _OF_THE_SWEEP}
        asked = {field: value for field, value in options.items() if field != "recipe"} | place
        with _naming(name):
            made = recipes.request_of(asked, recipe)
            check_options(made)
        yield Run(name, setting.name, options, made)


@contextmanager
def _naming(run: str) -> Iterator[None]:
    """Say which run an error is about."""
    try:
        yield
    except UlbqError as error:
        raise type(error)(f"Run '{run}': {error.message}", hint=error.hint) from error
    except ValidationError as error:
        raise UsageError(f"Run '{run}': {_problem(error)}") from error


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"`{'.'.join(map(str, first['loc']))}={first['input']}`: {first['msg']}."


def _scoring(request: SweepRequest, device: torch.device) -> EvaluateRequest:
    """How every model is measured: its perplexity and fidelity, and the tasks that were asked for."""
    at_hand = available(DEFAULT_TEXT, "test", data_dir=request.data_dir, offline=request.offline)
    asked: dict[str, Any] = {name: getattr(request, name) for name in ScoreOptions.model_fields}
    asked["perplexity"] = request.perplexity or ((DEFAULT_TEXT,) if at_hand else ())
    if request.limit is None and device.type == "cpu":
        asked["limit"] = CPU_WINDOWS
    place = {name: getattr(request, name) for name in ("device", "data_dir", "offline")}
    source = request.source or DEFAULT_NAME
    return EvaluateRequest(sources=(source,), fidelity=True, parent_scores=True, **asked, **place)

"""``recommend``: the setting to take for a model, a limit and this machine, by what settings were measured to give."""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from ulbq import runtime
from ulbq.artifacts.records import Record
from ulbq.artifacts.store import DEFAULT_ROOT
from ulbq.config.convert import ENGINES
from ulbq.config.options import bare, options, typed
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.quantize import resolve as resolve_request
from ulbq.config.recommend import RecommendRequest
from ulbq.errors import InputError, UlbqError, UsageError
from ulbq.export.engines import services
from ulbq.export.fit import Candidate, Layer, left_dense, nameless
from ulbq.formats import AnyScheme
from ulbq.methods.base import Method
from ulbq.models.blocks import Linear, skeleton
from ulbq.models.config import cache_bytes
from ulbq.models.source import DEFAULT_NAME, ModelSource, resolve
from ulbq.pipeline.evidence import Evidence, shipped, swept
from ulbq.pipeline.quantization_plan import QuantizedShare, QuantizePlan, build_method, quantized_share
from ulbq.pipeline.quantization_plan import plan as plan_run
from ulbq.printable import binary
from ulbq.progress import Progress, Silent

PROGRAM = 512 << 20
"""Bytes beside weights and cache: an interpreter or engine, and activations."""
CONTEXT = 4096
_START = 6.0  # seconds of imports and checks, whatever the model
_DENSE = 16  # bits
_FEW = 5  # others that are shown
_SEED = 0.1  # by which single runs of one setting differ, relatively
_PLACE = ("device", "data_dir", "offline", "out", "force")
"""What a recommendation hands on to the run."""


class Proposal(Record):
    """A setting on this model.

    Attributes:
        name: of the setting where it was measured.
        command: to type.
        bits: true bits a quantized weight; ``served`` those that it takes in the engine that was asked for.
        weights: bytes of all stored weights.
        running: bytes where it runs: weights as the engine has them, cache and program.
        seconds: of quantizing here; None where nobody knows.
        ratio: perplexity on WikiText-2 over the full-precision model's, where it was measured; with the least and the
            most to expect of another run.
        measured: on which model, and how many runs.
        sure: how far that tells of this model.
    """

    name: str
    options: dict[str, Any]
    command: str
    bits: float
    served: float
    weights: int
    running: int
    seconds: float | None
    ratio: float
    ratio_range: tuple[float, float]
    measured: str
    sure: Literal["this model", "another model"]


class Recommendation(Record):
    """What to do with a model.

    Attributes:
        best: of what keeps the limits, what is expected to lose least.
        peak_memory: bytes that quantizing takes.
        disk: bytes that lie on disk meanwhile.
        engine: that was asked for; None for none.
        others: what keeps the limits too.
        limits: in words.
    """

    model: str
    best: Proposal
    peak_memory: int
    disk: int
    engine: str | None
    others: tuple[Proposal, ...]
    limits: tuple[str, ...]


class _Limit(NamedTuple):
    """A limit, what it bounds, how both are told, and the step of the last digit told."""

    name: str
    most: float
    of: Callable[[Proposal], float]
    told: Callable[[float], str]
    step: Callable[[float], float]

    def enough(self, least: float) -> float:
        """``least``, rounded up to what `told` shows: who types that number keeps the limit."""
        step = self.step(least)
        return least if math.isinf(least) else math.ceil(least / step) * step


@dataclass(frozen=True)
class _Model:
    """A model as far as shapes tell; ``given`` is what is typed for it."""

    given: str
    source: ModelSource
    model: PreTrainedModel
    context: int

    @property
    def cache(self) -> int:
        """Bytes of keys and values of all tokens in half precision, were every block to attend to all of them."""
        return cache_bytes(self.source.config, 2) * self.context


def recommend(request: RecommendRequest, progress: Progress | None = None) -> tuple[Recommendation, QuantizeRequest]:
    """Choose a setting.

    Args:
        request: the model and the limits.
        progress: told how it goes.

    Returns:
        What to do, and the request that does it.

    Raises:
        UsageError: nothing that was measured keeps the limits; the hint has what would be the least.
        InputError: no such model, or one that is quantized; an engine that takes none of it packed.
        ResourceError: no such device.
    """
    progress = progress or Silent()
    device = runtime.resolve_device(request.device)
    source = resolve(request.source, offline=request.offline, outline=True)
    if source.quantized is not None:
        raise InputError(
            f"'{source.given}' is quantized already.", hint="Give the full-precision model that it was made from."
        )
    model = skeleton(source)
    of = _Model(request.source or DEFAULT_NAME, source, model, _context(request, source.config))
    found = list(_proposals(of, request, device, progress))
    if not found:
        name = ENGINES[request.engine] if request.engine else "ulbq"
        raise InputError(
            f"Nothing that was measured runs packed in {name} with '{source.given}'.",
            hint="Leave out `engine`, or see 'ulbq convert --for'.",
        )
    limits = _limits(request, device)
    kept = sorted(_kept(found, limits), key=lambda one: (one.ratio, one.bits))
    if not kept:
        raise _too_tight(found, limits)
    for number, best in enumerate(kept):
        asked = _request(best, request)
        try:
            planned = plan_run(asked, Silent())
        except UlbqError as error:  # of options that this model has no place for
            progress.note(f"{best.name} does not go with '{source.given}': {error.message}")
            continue
        cost = planned.cost
        places = [("here", cost.peak_memory, runtime.available_memory())]
        if cost.device_memory:
            places.append((f"on {runtime.describe_device(device)}", cost.device_memory, runtime.free_memory(device)))
        if short := [(where, wanted) for where, wanted, free in places if wanted > free]:
            where, wanted = short[0]
            progress.note(f"{best.name} wants {binary(wanted)} to quantize, more than is free {where}.")
            continue
        return _told(source, best, kept[number + 1 :], planned, limits, request), asked
    raise UsageError("Nothing that keeps the limits can be made on this machine.", hint="Free memory, or widen them.")


def _told(
    source: ModelSource,
    best: Proposal,
    others: Sequence[Proposal],
    planned: QuantizePlan,
    limits: Sequence[_Limit],
    request: RecommendRequest,
) -> Recommendation:
    return Recommendation(
        model=source.name,
        best=best,
        peak_memory=planned.cost.peak_memory,
        disk=planned.cost.disk,
        engine=request.engine,
        others=tuple(others[:_FEW]),
        limits=tuple(f"{limit.name} {limit.told(limit.most)}" for limit in limits),
    )


def _context(request: RecommendRequest, config: PreTrainedConfig) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    return request.context or min(CONTEXT, int(longest))


def _proposals(of: _Model, request: RecommendRequest, device: torch.device, progress: Progress) -> Iterator[Proposal]:
    """Every setting that was measured, on this model; measurements on the model itself in place of others."""
    table = {_key(one.options): one for one in shipped()}
    own = list(swept(request.artifacts or DEFAULT_ROOT))
    # Hashing a large model takes a minute, so only where a sweep may be of it.
    # A model of which only headers were fetched has no sweep here.
    here = of.source.stored is None or of.source.stored.here
    mine = of.source.content_hash if here and any(one.model == of.source.name for one in own) else ""
    table |= {_key(one.options): one for one in own if _key(one.options) not in table}
    table |= {_key(one.options): one for one in own if one.sha256 == mine}
    services_of: dict[str, float | None] = {}
    where = request.model_dump(include=set(_PLACE), exclude_defaults=True)
    with progress.phase("Weighing", len(table)) as phase:
        for one in table.values():
            phase.advance(detail=one.name)
            try:
                asked = QuantizeRequest.model_validate(one.options)
                method = build_method(asked)
                share = quantized_share(resolve_request(asked, "quick"), method, of.source, of.model)
            except (UlbqError, ValidationError):  # a width or group that this model has no layers for; an old option
                continue
            adapter: Literal["", "LoRA"] = "" if method.needs.adapter is None else "LoRA"
            key = str((method.scheme, share.schemes, share.tables, adapter))
            if request.engine is not None and key not in services_of:
                services_of[key] = _packed_bits(of, share, method, adapter, request.engine)
            if request.engine is None or services_of[key] is not None:
                yield _proposal(one, of, share, max(services_of.get(key) or 0.0, share.bits), mine, device, where)


def _key(asked: Mapping[str, Any]) -> str:
    return str(sorted((name, str(value)) for name, value in asked.items() if name != "calibration"))


def _packed_bits(
    of: _Model, share: QuantizedShare, method: Method, adapter: Literal["", "LoRA"], engine: str
) -> float | None:
    """Bits a weight in an engine; None where it takes it dense or not at all."""

    def packed(own: Mapping[Linear, AnyScheme]) -> dict[str, Layer]:
        return {x.name: Layer(scheme, (x.out_features, x.in_features)) for x, scheme in own.items()}

    found = share.selected.found
    layers = packed({linear: share.schemes.get(linear.name, method.scheme) for linear in found.layers})
    inside, routers = left_dense(found.skipped, layers)
    unpacked = nameless(inside, of.model) if inside else ()
    candidate = Candidate(of.source.given, of.source.config, layers, adapter, unpacked, routers, packed(share.tables))
    service = services(candidate)[0].get(engine)
    return None if service is None or service.bits >= _DENSE else service.bits


def _proposal(
    one: Evidence,
    of: _Model,
    share: QuantizedShare,
    served: float,
    mine: str,
    device: torch.device,
    where: Mapping[str, Any],
) -> Proposal:
    whole, bits = share.coverage, share.bits
    stored = round(whole.bits * whole.total / 8)
    running = stored + round((served - bits) * whole.quantized / 8) + of.cache + PROGRAM
    low, high = min(one.ratios), max(one.ratios)
    single = len(one.ratios) == 1
    # The package's table knows its model by name and size alone.
    known = one.model == of.source.name and one.weights == whole.quantized
    same = one.sha256 == mine if one.sha256 else known
    return Proposal(
        name=one.name,
        options=one.options,
        command=_command({**one.options, **where}, of.given),
        bits=bits,
        served=served,
        weights=stored,
        running=running,
        seconds=_seconds(one, whole.quantized, device),
        ratio=one.ratio,
        ratio_range=(low * (1 - _SEED * single), high * (1 + _SEED * single)),
        measured=f"{one.model}, {len(one.ratios)} run{'s' * (not single)}",
        sure="this model" if same else "another model",
    )


def _seconds(one: Evidence, weights: int, device: torch.device) -> float | None:
    """Time by the weights, from a run on as many or fewer threads of a CPU; None for other devices."""
    ran = re.match(r"cpu, (\d+) threads?", one.device)
    if one.seconds is None or ran is None or device.type != "cpu":
        return None
    # The second of two threads brings half of the first.
    faster = float((torch.get_num_threads() / int(ran[1])) ** 0.6)
    return _START + max(one.seconds - _START, 1.0) * weights / one.weights / faster


def _command(asked: Mapping[str, Any], given: str) -> str:
    """The command line of a setting."""
    words = ["ulbq", "quantize", given]
    for name, field, option in options(QuantizeRequest):
        # WikiText-2 is what is taken where it can be had.
        if (value := asked.get(name)) is None or (name, value) == ("calibration", "wikitext2"):
            continue
        pair = [spelled.split("/") for spelled in typed(name, option, switch=bare(field)[0] is bool)]
        flag = max((one[0] for one in pair), key=len)
        if isinstance(value, bool):
            words.append(flag if value else max((one[-1] for one in pair), key=len))
            continue
        for each in value if option.repeated else [value]:
            words += [flag, ",".join(map(str, each)) if isinstance(each, list | tuple) else str(each)]
    return shlex.join(words)


def _limits(request: RecommendRequest, device: torch.device) -> list[_Limit]:
    """What was asked for; else what this machine has."""
    fit = request.fit
    if fit is None and request.bits is None and request.max_time is None:
        fit = _memory(device)
    wanted = [
        _Limit("fit", fit or 0, lambda one: one.running, binary, _shown_memory),
        _Limit("bits", request.bits or 0, lambda one: one.bits, "{:.2f}".format, lambda _: 0.01),
        _Limit("max_time", request.max_time or 0, lambda one: _known(one.seconds), _minutes, lambda _: 60),
    ]
    return [limit for limit in wanted if limit.most]


def _shown_memory(count: float) -> float:
    """The last digit that `binary` shows, or more, in bytes."""
    return 2**20 if count < 998 * 2**20 else 2**30 / 100


def _known(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _minutes(seconds: float) -> str:
    return "an unknown time" if math.isinf(seconds) else f"{seconds / 60:.0f} min"


def _memory(device: torch.device) -> int:
    """Of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return runtime.available_memory()


def _kept(found: Sequence[Proposal], limits: Sequence[_Limit]) -> list[Proposal]:
    return [one for one in found if all(limit.of(one) <= limit.most for limit in limits)]


def _too_tight(found: Sequence[Proposal], limits: Sequence[_Limit]) -> UsageError:
    """Why nothing is left, and the least that each limit would have to be."""
    least = {}
    for limit in limits:
        others = _kept(found, [other for other in limits if other is not limit]) or found
        best = min(others, key=limit.of)
        least[limit.name] = f"`{limit.name}` takes at least {limit.told(limit.enough(limit.of(best)))} ({best.name})"
    asked = ", ".join(f"`{limit.name}` {limit.told(limit.most)}" for limit in limits)
    return UsageError(f"Nothing that was measured keeps {asked}.", hint=f"{'; '.join(least.values())}.")


def _request(proposal: Proposal, request: RecommendRequest) -> QuantizeRequest:
    place = {name: getattr(request, name) for name in ("source", *_PLACE)}
    asked = {name: value for name, value in proposal.options.items() if (name, value) != ("calibration", "wikitext2")}
    return QuantizeRequest.model_validate({**asked, **place})

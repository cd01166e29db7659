"""The engines that load models, late in 2026, and which target suits each."""

from collections.abc import Iterable
from typing import NamedTuple

from ulbq.config.convert import ENGINES, TARGETS
from ulbq.errors import InputError
from ulbq.export import fit
from ulbq.export.fit import Candidate
from ulbq.export.rules import Obstacle, Reader
from ulbq.export.targets import target
from ulbq.export.targets.base import Target


def targets_of(engine: str) -> dict[str, Reader]:
    """The targets that an engine is given, the best first, and how it reads each."""
    readers = {name: target(name).readers.get(engine) for name in TARGETS}
    ranked = [(reader.rank, name, reader) for name, reader in readers.items() if reader and reader.rank is not None]
    return {name: reader for _, name, reader in sorted(ranked, key=lambda one: one[0])}


def judge(
    engine: str, candidate: Candidate, to: str | None = None, *, merge_adapter: bool = False
) -> tuple[Target, str]:
    """Choose the target for an engine, or check the one that was asked for.

    Args:
        to: the target that the user wants; None for the engine's best.
        merge_adapter: the adapter becomes a part of the weights.

    Returns:
        The target, and what becomes of the model in a few sentences for people.

    Raises:
        InputError: nothing that the engine reads can hold the model, or not ``to``; the hint says what to change.
    """
    name, readers = ENGINES[engine], targets_of(engine)
    if to is not None and to not in readers:
        raise InputError(
            f"{name} does not read {to}.",
            hint=f"It reads {' and '.join(readers)}: leave out `to`, and the one that fits is chosen.",
        )
    fitting, found = _first(engine, candidate, readers if to is None else (to,), merge_adapter=merge_adapter)
    if fitting is not None:
        return target(fitting), _sentence(engine, candidate, fitting, found)
    if not found:
        raise InputError(
            f"{name} reads packed weights alone, and an adapter cannot be merged into those.",
            hint="Leave out `merge_adapter`.",
        )
    raise InputError(f"'{candidate.given}' does not fit {name}: {found[0].reason}.", hint=found[0].change)


class Service(NamedTuple):
    """How an engine runs a model.

    Attributes:
        target: what the model is converted to.
        reader: how the engine reads that.
        bits: that a packed weight takes there; ``at_most`` where it may take less.
        merged: the model's adapter has to become a part of the weights.
    """

    target: str
    reader: Reader
    bits: float
    at_most: bool
    merged: bool


def services(candidate: Candidate) -> tuple[dict[str, Service], dict[str, str]]:
    """How each engine runs a packed model, and why others do not, as the end of a sentence; both by the engine."""
    able: dict[str, Service] = {}
    unable: dict[str, str] = {}
    for engine in ENGINES:
        readers, reasons = targets_of(engine), list[str]()
        for merged in (False, True) if candidate.adapter else (False,):
            name, found = _first(engine, candidate, readers, merge_adapter=merged)
            if name is not None:
                bits = target(name).bits(candidate, merge_adapter=merged) / candidate.weights
                at_most = target(name).varies and not all(one.symmetric for one in fit.affine_schemes(candidate))
                able[engine] = Service(name, readers[name], bits, at_most and not merged, merged)
                break
            reasons += [why.reason for why in found]
        else:
            unable[engine] = reasons[0]
    return able, unable


def _first(
    engine: str, candidate: Candidate, names: Iterable[str], *, merge_adapter: bool
) -> tuple[str | None, list[Obstacle]]:
    """The first of these targets by which an engine takes a model, and what is in the way of those before."""
    found: list[Obstacle] = []
    for name in names:
        if merge_adapter and not target(name).merges:
            continue
        why = _obstacle(engine, candidate, name, merge_adapter=merge_adapter)
        if why is None:
            return name, found
        found.append(why)
    return None, found


def _obstacle(engine: str, candidate: Candidate, name: str, *, merge_adapter: bool) -> Obstacle | None:
    why = target(name).unsupported_reason(candidate, merge_adapter=merge_adapter)
    if why is None:
        return target(name).readers[engine].obstacle(candidate, ENGINES[engine])
    able = fit.holders(candidate)
    others = [other for other in able if other not in targets_of(engine)] or able
    return Obstacle(why, f"Targets that can hold it: {', '.join(others) or 'none'}.")


def _sentence(engine: str, candidate: Candidate, name: str, found: list[Obstacle]) -> str:
    reader = target(name).readers[engine]
    if name == "dense":
        why = f", since {found[0].reason}" if found and candidate.layers else ""
        return f"{ENGINES[engine]} gets it dense{why}."
    option = reader.option(candidate)
    said = (
        f"{ENGINES[engine]} loads this as {name} ({fit.describe(candidate)}). Hardware: {reader.hardware}.",
        f"Start it with {option}." if option else "",
        reader.needs,
        reader.elsewhere,
    )
    return " ".join(text for text in said if text)

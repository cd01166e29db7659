"""The engines that load models, late in 2026, and which target suits each."""

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
        The target, and what becomes of the model in one sentence for people.

    Raises:
        InputError: nothing that the engine reads can hold the model, or not ``to``; the hint says what to change.
    """
    name, readers = ENGINES[engine], targets_of(engine)
    if to is not None and to not in readers:
        raise InputError(
            f"{name} does not read {to}.",
            hint=f"It reads {' and '.join(readers)}: leave out `to`, and the one that fits is chosen.",
        )
    found: list[Obstacle] = []
    for each in readers if to is None else (to,):
        if merge_adapter and not target(each).merges:
            continue
        why = _obstacle(engine, candidate, each, merge_adapter=merge_adapter)
        if why is None:
            return target(each), _sentence(engine, candidate, each, found)
        found.append(why)
    if not found:
        raise InputError(
            f"{name} reads packed weights alone, and an adapter cannot be merged into those.",
            hint="Leave out `merge_adapter`.",
        )
    raise InputError(f"'{candidate.given}' does not fit {name}: {found[0].reason}.", hint=found[0].change)


def loaders(candidate: Candidate) -> list[tuple[str, str]]:
    """The engines that take a model packed or exactly, each with its target."""
    pairs: list[tuple[str, str]] = []
    for engine in ENGINES:
        for name in targets_of(engine):
            merge = bool(candidate.adapter) and target(name).merges
            if name != "dense" and _obstacle(engine, candidate, name, merge_adapter=merge) is None:
                pairs.append((engine, name))
                break
    return pairs


def _obstacle(engine: str, candidate: Candidate, name: str, *, merge_adapter: bool) -> Obstacle | None:
    why = target(name).unsupported_reason(candidate, merge_adapter=merge_adapter)
    if why is None:
        return target(name).readers[engine].obstacle(candidate, ENGINES[engine])
    able = fit.holders(candidate)
    others = [other for other in able if other not in targets_of(engine)] or able
    return Obstacle(why, f"Targets that can hold it: {', '.join(others) or 'none'}.")


def _sentence(engine: str, candidate: Candidate, name: str, found: list[Obstacle]) -> str:
    if name == "dense":
        why = f", since {found[0].reason}" if found and candidate.layers else ""
        return f"{ENGINES[engine]} gets it dense{why}."
    loads = f"{ENGINES[engine]} loads this as {name} ({fit.describe(candidate)})."
    return target(name).readers[engine].command(candidate, loads)

"""What the engines load, late in 2026, and which target suits each.

An engine's rules are stricter than its file format's: GPTQ's layout holds 3 bits, and exllamav2 reads 4 of it. Each
engine here names its targets, the best first, and says of a model and a target what stands in the way. The
versions that the rules were read from stand in docs/guides/converting.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from ulbq.config.convert import Engine, Target
from ulbq.errors import InputError
from ulbq.export import fit
from ulbq.export.fit import Candidate
from ulbq.formats import AffineScheme

ENGINES: tuple[Engine, ...] = get_args(Engine)

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines make one of."""

_AUTO_GPTQ = ("llama", "mistral", "qwen2", "gemma", "gpt_neox", "falcon", "opt", "gpt2", "gptj", "bloom", "mixtral")
_CUDA_GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True)
class Rules:
    """What an engine takes.

    Attributes:
        name: as its makers write it.
        targets: that it reads, the best first; ``dense`` last, where it reads that.
        obstacle: what stands in the way of a model in a packed target, as the end of a sentence, and what to change;
            None where nothing does.
        start: what else a user must do, as a whole sentence; empty where nothing.
    """

    name: str
    targets: tuple[Target, ...]
    obstacle: Callable[[Candidate, Target], tuple[str, str] | None]
    start: Callable[[Candidate, Target], str] = lambda candidate, target: ""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a model for an engine: the target, and one sentence for people."""

    target: Target
    sentence: str


def judge(engine: Engine, candidate: Candidate, to: Target | None = None, *, merge_adapter: bool = False) -> Verdict:
    """Choose the target for an engine, or check the one that was asked for.

    Args:
        to: the target that the user wants; None for the engine's best.
        merge_adapter: the adapter becomes a part of the weights.

    Raises:
        InputError: nothing that the engine reads can hold the model, or not ``to``; the hint says what to change.
    """
    rules = RULES[engine]
    if to is not None and to not in rules.targets:
        raise InputError(
            f"{rules.name} does not read {to}.",
            hint=f"It reads {' and '.join(rules.targets)}: leave out --to, and the one that fits is chosen.",
        )
    found: list[tuple[str, str]] = []
    for target in rules.targets if to is None else (to,):
        if merge_adapter and target in ("gptq", "compressed-tensors"):
            continue
        why = _obstacle(rules, candidate, target, merge_adapter=merge_adapter)
        if why is None:
            return Verdict(target, _sentence(rules, candidate, target, found))
        found.append(why)
    if not found:
        raise InputError(
            f"{rules.name} reads packed weights alone, and an adapter cannot be merged into those.",
            hint="Leave out --merge-adapter.",
        )
    reason, change = found[0]
    raise InputError(f"'{candidate.given}' does not fit {rules.name}: {reason}.", hint=change)


def loaders(candidate: Candidate) -> list[tuple[Engine, Target]]:
    """The engines that take a model packed or exactly, each with its target."""
    merge = bool(candidate.adapter)
    pairs: list[tuple[Engine, Target]] = []
    for engine, rules in RULES.items():
        packed = [target for target in rules.targets if target != "dense"]
        fitting = [t for t in packed if _obstacle(rules, candidate, t, merge_adapter=merge and t == "gguf") is None]
        if fitting:
            pairs.append((engine, fitting[0]))
    return pairs


def _obstacle(rules: Rules, candidate: Candidate, target: Target, *, merge_adapter: bool) -> tuple[str, str] | None:
    why = fit.unfit(candidate, target, merge_adapter=merge_adapter)
    if why is not None:
        others = [name for name in fit.holders(candidate) if name not in rules.targets] or fit.holders(candidate)
        return why, f"Targets that can hold it: {', '.join(others) or 'none'}."
    return None if target == "dense" else rules.obstacle(candidate, target)


def _sentence(rules: Rules, candidate: Candidate, target: Target, found: list[tuple[str, str]]) -> str:
    if target == "dense":
        why = f", since {found[0][0]}" if found and candidate.layers else ""
        return f"{rules.name} gets it dense{why}."
    start = rules.start(candidate, target)
    text = f"{rules.name} loads this as {target} ({fit.describe(candidate)})."
    return f"{text} {start}".rstrip()


def _affine(candidate: Candidate) -> list[AffineScheme]:
    return [scheme for scheme in candidate.schemes if isinstance(scheme, AffineScheme)]


def _bits(candidate: Candidate, allowed: tuple[int, ...], name: str) -> tuple[str, str] | None:
    odd = next((scheme for scheme in _affine(candidate) if scheme.bits not in allowed), None)
    if odd is None:
        return None
    widths = " or ".join(map(str, allowed))
    return f"it has {odd.bits} bits, and {name} reads {widths}", f"Quantize with --bits {widths}."


def _symmetric(candidate: Candidate, name: str) -> tuple[str, str] | None:
    if all(scheme.symmetric for scheme in _affine(candidate)):
        return None
    return f"it has zero points, and {name} reads GPTQ symmetric only", "Quantize with --symmetric."


def _uniform(candidate: Candidate, name: str) -> tuple[str, str] | None:
    if len(candidate.schemes) < 2:
        return None
    return f"its layers have several widths, and {name} reads one", "Quantize all layers with the same --bits."


def _groups(candidate: Candidate, allowed: tuple[int, ...], name: str) -> tuple[str, str] | None:
    odd = next((scheme for scheme in _affine(candidate) if scheme.group_size not in allowed), None)
    if odd is None:
        return None
    sizes = ", ".join(str(size) for size in allowed if size > 0)
    return f"its groups have {odd.group_size} weights, and {name} reads {sizes}", f"Quantize with --group-size {sizes}."


def _fused(candidate: Candidate, name: str) -> tuple[str, str] | None:
    """Layers that the engine fuses have to be stored alike."""
    for full, layer in candidate.layers.items():
        prefix, _, own = full.rpartition(".")
        for family in _FUSED:
            siblings = [candidate.layers.get(f"{prefix}.{other}") for other in family if own in family]
            if any(other is not None and other.scheme != layer.scheme for other in siblings):
                return f"{name} fuses {', '.join(family)}, and '{full}' is stored otherwise than they", (
                    "Quantize these layers with the same bits."
                )
    return None


def _no_dora(candidate: Candidate, name: str) -> tuple[str, str] | None:
    if candidate.adapter != "DoRA":
        return None
    return f"its adapter is a DoRA, and {name} applies LoRA only", "Use --to dense --merge-adapter."


def _first(*obstacles: tuple[str, str] | None) -> tuple[str, str] | None:
    return next((obstacle for obstacle in obstacles if obstacle is not None), None)


def _vllm(candidate: Candidate, target: Target) -> tuple[str, str] | None:
    common = _first(_no_dora(candidate, "vLLM"), _fused(candidate, "vLLM"), _groups(candidate, _CUDA_GROUPS, "vLLM"))
    if target == "compressed-tensors":
        return common
    return _first(
        _bits(candidate, (4, 8), "vLLM's GPTQ"), _symmetric(candidate, "vLLM"), _uniform(candidate, "vLLM"), common
    )


def _sglang(candidate: Candidate, target: Target) -> tuple[str, str] | None:
    common = _first(
        _no_dora(candidate, "SGLang"), _fused(candidate, "SGLang"), _groups(candidate, _CUDA_GROUPS, "SGLang")
    )
    if target == "compressed-tensors":
        return _first(_bits(candidate, (4, 8), "SGLang's compressed-tensors"), common)
    return _first(_symmetric(candidate, "SGLang"), _uniform(candidate, "SGLang"), common)


def _transformers(candidate: Candidate, target: Target) -> tuple[str, str] | None:
    if target == "gptq":
        return _uniform(candidate, "transformers' GPTQ")
    if all(scheme.symmetric for scheme in _affine(candidate)):
        return None
    # 5.23 with compressed-tensors 0.20 makes room for unpacked zero points and refuses the packed ones.
    return "it has zero points, and transformers loads no packed ones", "Use --to gptq, or quantize with --symmetric."


def _gptqmodel(candidate: Candidate, target: Target) -> tuple[str, str] | None:
    return _groups(candidate, (-1, 16, 32, 64, 128, 256, 512, 1024), "gptqmodel")


def _auto_gptq(candidate: Candidate, target: Target) -> tuple[str, str] | None:
    kind = candidate.config.model_type
    unknown = None
    if kind not in _AUTO_GPTQ:
        unknown = (f"AutoGPTQ 0.7.1 has no '{kind}'", "Use gptqmodel, which succeeds it: --for gptqmodel.")
    return _first(unknown, _symmetric(candidate, "AutoGPTQ"), _uniform(candidate, "AutoGPTQ"))


def _exllamav2(candidate: Candidate, target: Target) -> tuple[str, str] | None:
    return _first(
        _bits(candidate, (4,), "exllamav2"),
        _symmetric(candidate, "exllamav2"),
        _uniform(candidate, "exllamav2"),
        _groups(candidate, (-1, 32, 64, 128), "exllamav2"),
    )


def _narrow(candidate: Candidate) -> bool:
    return any(scheme.bits in (2, 3) for scheme in _affine(candidate))


def _start_vllm(candidate: Candidate, target: Target) -> str:
    return "Its 2 and 3 bits run through the Humming kernels, on a GPU." if _narrow(candidate) else ""


def _start_sglang(candidate: Candidate, target: Target) -> str:
    return "Start it with --quantization humming." if _narrow(candidate) else ""


def _start_transformers(candidate: Candidate, target: Target) -> str:
    packages = "optimum and gptqmodel" if target == "gptq" else "compressed-tensors"
    return f"It needs the package{'s' if target == 'gptq' else ''} {packages}."


RULES: Mapping[Engine, Rules] = {
    "vllm": Rules("vLLM", ("compressed-tensors", "gptq", "dense"), _vllm, _start_vllm),
    "sglang": Rules("SGLang", ("compressed-tensors", "gptq", "dense"), _sglang, _start_sglang),
    "transformers": Rules("transformers", ("gptq", "compressed-tensors", "dense"), _transformers, _start_transformers),
    "gptqmodel": Rules("gptqmodel", ("gptq",), _gptqmodel),
    "auto-gptq": Rules("AutoGPTQ", ("gptq",), _auto_gptq),
    "llama.cpp": Rules("llama.cpp", ("gguf",), lambda candidate, target: None),
    "exllamav2": Rules("exllamav2", ("gptq",), _exllamav2),
}

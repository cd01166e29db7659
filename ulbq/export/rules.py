"""What stands in the way of models in the engines that read a target, and how engines load folders.

An engine's rules are stricter than its file format's: GPTQ's layout holds 3 bits, and exllamav2 reads 4 of it. The
versions that the rules were read from stand in docs/guides/converting.md.
"""

from ulbq.export.fit import Candidate, affine_schemes
from ulbq.export.targets.base import Obstacle

AUTO_MODEL = "`AutoModelForCausalLM.from_pretrained(DIR)`"
VLLM = "`vllm serve DIR`."
SGLANG = "`python -m sglang.launch_server --model-path DIR`."

CUDA_GROUPS = (-1, 32, 64, 128)
"""Group sizes that the kernels of vLLM, SGLang and exllamav2 have."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines make one of."""


def first(*obstacles: Obstacle | None) -> Obstacle | None:
    return next((obstacle for obstacle in obstacles if obstacle is not None), None)


def bits(candidate: Candidate, allowed: tuple[int, ...], name: str) -> Obstacle | None:
    odd = next((scheme for scheme in affine_schemes(candidate) if scheme.bits not in allowed), None)
    if odd is None:
        return None
    widths = " or ".join(map(str, allowed))
    return Obstacle(f"it has {odd.bits} bits, and {name} reads {widths}", f"Quantize with --bits {widths}.")


def symmetric(candidate: Candidate, name: str) -> Obstacle | None:
    if all(scheme.symmetric for scheme in affine_schemes(candidate)):
        return None
    return Obstacle(f"it has zero points, and {name} reads GPTQ symmetric only", "Quantize with --symmetric.")


def uniform(candidate: Candidate, name: str) -> Obstacle | None:
    if len(candidate.schemes) < 2:
        return None
    reason = f"its layers have several widths, and {name} reads one"
    return Obstacle(reason, "Quantize all layers with the same --bits.")


def groups(candidate: Candidate, allowed: tuple[int, ...], name: str) -> Obstacle | None:
    """Only these group sizes; -1 stands for whole rows."""
    odd = next((scheme for scheme in affine_schemes(candidate) if scheme.group_size not in allowed), None)
    if odd is None:
        return None
    sizes = ", ".join(str(size) for size in allowed if size > 0)
    reason = f"its groups have {odd.group_size} weights, and {name} reads {sizes}"
    return Obstacle(reason, f"Quantize with --group-size {sizes}.")


def served(candidate: Candidate, name: str) -> Obstacle | None:
    """What vLLM and SGLang want in every packed layout: LoRA only, fused layers stored alike, their kernels' groups."""
    dora = None
    if candidate.adapter == "DoRA":
        dora = Obstacle(f"its adapter is a DoRA, and {name} applies LoRA only", "Use --to dense --merge-adapter.")
    return first(dora, _fused(candidate, name), groups(candidate, CUDA_GROUPS, name))


def is_narrow(candidate: Candidate) -> bool:
    return any(scheme.bits in (2, 3) for scheme in affine_schemes(candidate))


def start_vllm(candidate: Candidate) -> str:
    return "Its 2 and 3 bits run through the Humming kernels, on a GPU." if is_narrow(candidate) else ""


def start_sglang(candidate: Candidate) -> str:
    return "Start it with --quantization humming." if is_narrow(candidate) else ""


def _fused(candidate: Candidate, name: str) -> Obstacle | None:
    """Layers that the engine fuses have to be stored alike."""
    for full, layer in candidate.layers.items():
        prefix, _, own = full.rpartition(".")
        for family in _FUSED:
            siblings = [candidate.layers.get(f"{prefix}.{other}") for other in family if own in family]
            if any(other is not None and other.scheme != layer.scheme for other in siblings):
                reason = f"{name} fuses {', '.join(family)}, and '{full}' is stored otherwise than they"
                return Obstacle(reason, "Quantize these layers with the same bits.")
    return None

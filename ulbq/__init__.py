"""Ultra-low-bit (1 to 4 bit) weight quantization of language models.

The commands are functions here, as in ``ulbq.quantize("model", method="efficientqat", bits=2, output="q")``. After
``import ulbq``, transformers' ``AutoModelForCausalLM.from_pretrained`` loads quantized artifacts, packed as they are.
The import itself loads neither transformers nor torch: transformers learns of the format when it is imported.
"""

from ulbq.api import Artifact, Evaluation, Loaded, convert, evaluate, finetune, load, quantize, saliency
from ulbq.import_hook import after_import

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
    "quantize",
    "saliency",
]


def _register() -> None:
    import ulbq.models.hf  # noqa: F401 - registers itself


after_import("transformers.quantizers.auto", _register)

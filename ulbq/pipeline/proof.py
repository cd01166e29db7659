"""The last step of a run that makes a model: what was written is opened as users open it, and goes on for a few tokens.

It is looked at before it stands at its place, on the CPU, by the first process alone. What a run ends without an error
with, then, loads.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from ulbq import runtime
from ulbq.errors import InputError, NumericsError
from ulbq.export.dense import open_again
from ulbq.export.fit import Candidate
from ulbq.export.targets.base import Target
from ulbq.models.load import load_model
from ulbq.models.skeleton import BUILD_ERRORS
from ulbq.progress import Progress

_TOKENS = 8
_DTYPE = torch.bfloat16  # as `generate` and `eval` compute
_COPIES = 2  # of the weights that live together while they are loaded


def proof(
    progress: Progress, target: Target | None = None, candidate: Candidate | None = None
) -> Callable[[Path], None]:
    """What :meth:`~ulbq.artifacts.store.ArtifactWriter.finish` is to look with at a folder.

    Args:
        progress: told what was seen.
        target: of a conversion, and the model that was converted; None for a quantized artifact.

    Returns:
        A function that raises InputError where the folder cannot be opened or run, and NumericsError where its
        predictions are not finite.
    """
    return partial(_look, progress, target, candidate)


def _look(progress: Progress, target: Target | None, candidate: Candidate | None, folder: Path) -> None:
    needed = _COPIES * sum(
        path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")
    )
    if needed > (free := runtime.available_memory()):
        progress.note(f"Not opened again: that takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free.")
        return
    with progress.phase("Opening what was written"):
        try:
            said = _run(folder, target, candidate)
        except BUILD_ERRORS as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"What was written to '{folder}' does not run ({cause[:200]}).",
                hint="transformers, or ulbq, cannot compute with this model as it is stored: please report it.",
            ) from error
    progress.note(said)


def _run(folder: Path, target: Target | None, candidate: Candidate | None) -> str:
    """Open the folder and run it as far as can be; what was done, in words."""
    if target is None or candidate is None:
        _generate(load_model(open_again(folder), dtype=_DTYPE))
        return f"Opened again, and ran {_TOKENS} tokens."
    if (why := target.unopened_reason(candidate, folder)) is not None:
        return why
    _generate(target.load(folder, _DTYPE))
    return f"{target.opened}, and ran {_TOKENS} tokens."


@torch.inference_mode()
def _generate(model: PreTrainedModel) -> None:
    """Have a model go on from one token. Raises NumericsError where its predictions are not finite."""
    first = model.config.get_text_config().bos_token_id
    prompt = torch.tensor([[first if isinstance(first, int) else 0]])
    settings = GenerationConfig(max_new_tokens=_TOKENS, do_sample=False, pad_token_id=0)
    if model.generation_config is not None:
        model.generation_config.stop_strings = None  # they want a tokenizer, which is looked at by itself
    found = model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if not all(logits.isfinite().all() for logits in found.logits):
        raise NumericsError(
            "What was written predicts what is no number, in bf16.",
            hint="Try 'ulbq eval --dtype fp32' on the model that it was made from: it may overflow itself.",
        )

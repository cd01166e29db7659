"""The last step of a run that makes a model: what was written is opened as users open it, and goes on for a few tokens.

It is looked at before it stands at its place, on the CPU, by the first process alone. What a run ends without an error
with, then, loads.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ulbq import runtime
from ulbq.config.convert import Target
from ulbq.errors import InputError, NumericsError
from ulbq.export.gguf import FILE_NAME
from ulbq.models.load import load_model
from ulbq.models.skeleton import BUILD_ERRORS
from ulbq.models.source import ModelSource, open_written, resolve
from ulbq.progress import Progress

_TOKENS = 8
_DTYPE = torch.bfloat16  # as `generate` and `eval` compute
_COPIES = 2  # of the weights that live together while they are loaded
_READERS: dict[str, tuple[str, ...]] = {"gptq": ("optimum", "gptqmodel"), "compressed-tensors": ("compressed_tensors",)}
"""Packages with which transformers loads layouts of other tools."""


def proof(progress: Progress, target: Target | None = None, *, symmetric: bool = True) -> Callable[[Path], None]:
    """What :meth:`~ulbq.artifacts.store.ArtifactWriter.finish` is to look with at a folder.

    Args:
        progress: told what was seen.
        target: layout of a conversion; None for a quantized artifact.
        symmetric: whether the packed layers have no zero points, which transformers reads in one layout alone.

    Returns:
        A function that raises InputError where the folder cannot be opened or run, and NumericsError where its
        predictions are not finite.
    """
    return partial(_look, progress, target, symmetric)


def _look(progress: Progress, target: Target | None, symmetric: bool, folder: Path) -> None:
    needed = _COPIES * sum(
        path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")
    )
    if needed > (free := runtime.available_memory()):
        progress.note(f"Not opened again: that takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free.")
        return
    with progress.phase("Opening what was written"):
        try:
            said = _run(folder, target, symmetric)
        except BUILD_ERRORS as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"What was written to '{folder}' does not run ({cause[:200]}).",
                hint="transformers, or ulbq, cannot compute with this model as it is stored: please report it.",
            ) from error
    progress.note(said)


def _run(folder: Path, target: Target | None, symmetric: bool) -> str:
    """Open the folder and run it as far as can be; what was done, in words."""
    if target == "gguf":
        source = resolve(folder / FILE_NAME, verify=False)  # it was hashed just now
        _generate(load_model(source, dtype=_DTYPE))
        return f"Opened again by transformers' reader of GGUF files, and ran {_TOKENS} tokens."
    if target in ("gptq", "compressed-tensors"):
        return _run_for_others(folder, target, symmetric)
    source = open_written(folder)
    _check_tokenizer(source)
    if target == "dense":
        _generate(AutoModelForCausalLM.from_pretrained(folder, dtype=_DTYPE, local_files_only=True))
    else:
        _generate(load_model(source, dtype=_DTYPE))
    return f"Opened again, and ran {_TOKENS} tokens."


def _run_for_others(folder: Path, target: Target, symmetric: bool) -> str:
    """Of other tools' layouts every layer was read back already; here they are run where their packages are."""
    AutoConfig.from_pretrained(folder, local_files_only=True)
    missing = [name for name in _READERS[target] if importlib.util.find_spec(name) is None]
    if missing:
        return f"Every layer reads back to the bit; not run, for want of {' and '.join(missing)}."
    if target == "compressed-tensors" and not symmetric:
        return "Every layer reads back to the bit; not run, for transformers reads no zero points of this layout."
    _generate(AutoModelForCausalLM.from_pretrained(folder, dtype=_DTYPE, local_files_only=True))
    return f"Every layer reads back to the bit; opened again by transformers, and ran {_TOKENS} tokens."


def _check_tokenizer(source: ModelSource) -> None:
    """Load the tokenizer, where there is any. Raises InputError."""
    if any(source.path.glob("tokenizer*")):
        source.tokenizer()


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

"""The last step of a run that makes a model: what was written is opened as users open it, and goes on for a few tokens.

It is looked at before it stands at its place, on the CPU, by the first process alone. What a run ends without an error
with, then, loads.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ulbq import formats, runtime
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.streamed import AnyModel, StreamedModel
from ulbq.blockwise.walk import BlockWalk
from ulbq.errors import InputError, NumericsError
from ulbq.export.dense import open_again
from ulbq.export.fit import Candidate
from ulbq.export.targets.base import Target
from ulbq.models.blocks import block_list, load_block, skeleton
from ulbq.models.load import load_model
from ulbq.models.skeleton import BUILD_ERRORS
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline import layout
from ulbq.pipeline.memory import OPENED_COPIES
from ulbq.pipeline.quantization_plan import Job
from ulbq.printable import one_line
from ulbq.progress import Progress

_TOKENS = 8
_DTYPE = torch.bfloat16  # as `generate` and `eval` compute
_ROWS = (1, 64)  # of inputs: kernels for one token, and for many
_WRONG = 0.05  # relative error of products that no rounding explains


def proof(
    progress: Progress, target: Target | None = None, candidate: Candidate | None = None, job: Job | None = None
) -> Callable[[Path], None]:
    """What :meth:`~ulbq.artifacts.store.ArtifactWriter.finish` is to look with at a folder.

    Args:
        progress: told what was seen.
        target: of a conversion, and the model that was converted; None for a quantized artifact.
        job: of a quantization, whose blocks are compared; None where there was none.

    Returns:
        A function that raises InputError where the folder cannot be opened or run, or its blocks compute otherwise
        than in the run, and NumericsError where its predictions are not finite.
    """
    return partial(_look, progress, target, candidate, job)


def _look(
    progress: Progress, target: Target | None, candidate: Candidate | None, job: Job | None, folder: Path
) -> None:
    opened = None if job is None else open_again(folder)
    if job is not None and opened is not None:
        with progress.phase("Comparing blocks"):
            _check_blocks(job, opened, folder)
            if job.precision.device.type != "cpu":
                check_products(opened, job.precision.device)
    needed = OPENED_COPIES * sum(
        path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")
    )
    free = runtime.available_memory()
    if target is not None and needed > free:
        progress.note(f"Not opened again: that takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free.")
        return
    with progress.phase("Opening what was written"):
        try:
            said = _run(folder, target, candidate, opened, streamed=needed > min(free, runtime.peak_memory()))
        except BUILD_ERRORS as error:
            cause = one_line(f"{type(error).__name__}: {error}")
            raise InputError(
                f"What was written to '{folder}' does not run ({cause[:200]}).",
                hint="transformers, or ulbq, cannot compute with this model as it is stored: please report it.",
            ) from error
    progress.note(said)


def _check_blocks(job: Job, source: ModelSource, folder: Path) -> None:
    """Compare first and last block, as users open them, with what later blocks were trained on: the shards alone.

    Raises:
        InputError: a block cannot be read, or computes something else.
    """
    model = skeleton(source)
    walks = [_walk(one, source) for one in (model, job.model)]
    for index in sorted({0, job.found.n_blocks - 1}):
        prefix = job.names(index)[0]
        packed = {name.removeprefix(prefix): one for name, one in source.packed.items() if name.startswith(prefix)}
        # A walk has the first already.
        opened = load_block(model, source, index, torch.float32) if walks[0] is None else walks[0].load(index)
        shard = folder / layout.block_shard(index)
        stored = layout.packed_block(job.model, index, shard, tuple(packed), job.method.scheme, packed)
        answers = [_answer(walk, index, block) for walk, block in zip(walks, (opened, stored), strict=True)]
        if answers[0] is not None and answers[1] is not None and not torch.equal(answers[0], answers[1]):
            raise InputError(
                f"Block {index} of what was written to '{folder}' computes something else than in the run.",
                hint="transformers, or ulbq, cannot compute with this model as it is stored: please report it.",
            )


@torch.inference_mode()
def check_products(source: ModelSource, device: torch.device) -> None:
    """Compare what a device's kernels make of the first block's packed layers with their weights, dequantized.

    Raises:
        InputError: a product is another.
    """
    model = skeleton(source)
    prefix = f"{block_list(model)[0]}.0."
    for name, layer in load_block(model, source, 0, _DTYPE, device).named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        layer.cache = False
        tensors = {short: tensor.to(device) for short, tensor in source.read_packed(prefix + name).items()}
        matrix = formats.matrix(layer.scheme, tensors, layer.in_features, torch.float32)
        bias = None if layer.bias is None else layer.bias.float()
        for rows in _ROWS:
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(0)).to(device, _DTYPE)
            expected = formats.multiply(layer.scheme, tensors, x.float(), matrix, bias)
            if not (layer(x) - expected).norm() <= _WRONG * expected.norm():
                raise InputError(
                    f"The kernels of {device} compute something else than '{prefix}{name}' has stored.",
                    hint="Report it, with the output of 'ulbq doctor'; `device=cpu` does without them.",
                )


def _walk(model: PreTrainedModel, source: ModelSource) -> BlockWalk | None:
    """What blocks of a model are called with; None where they cannot be run by themselves."""
    samples = Samples(torch.full((1, _TOKENS), _first_token(model)))
    try:
        return BlockWalk(
            model,
            source,
            samples,
            dtype=torch.float32,
            device=torch.device("cpu"),
            limit=1 << 30,
            directory=source.path,
            embeddings=False,
        )
    except (InputError, *BUILD_ERRORS):
        return None


@torch.inference_mode()
def _answer(walk: BlockWalk | None, index: int, block: nn.Module) -> torch.Tensor | None:
    """Output of a block on random states; None without a walk, or where the block wants more than that has."""
    if walk is None:
        return None
    for layer in block.modules():
        if isinstance(layer, QuantLinear):
            layer.cache = False  # of every block: so that products are the same to the bit
    states = torch.randn(walk.hidden.shape, generator=torch.Generator().manual_seed(0))
    try:
        return walk.call(index, block, states)
    except BUILD_ERRORS:
        return None


def _run(
    folder: Path, target: Target | None, candidate: Candidate | None, opened: ModelSource | None, *, streamed: bool
) -> str:
    """Run what was opened, or open the folder as its target does; what was done, in words.

    An artifact is ``streamed`` where loading it would take more than the run has taken so far.
    """
    if target is None or candidate is None:
        source = opened or open_again(folder)
        if streamed:
            _run_streamed(StreamedModel(source, dtype=_DTYPE, device=torch.device("cpu"), directory=folder))
        else:
            _generate(load_model(source, dtype=_DTYPE))
        return f"Opened again, and ran {_TOKENS} tokens."
    if (why := target.unopened_reason(candidate, folder)) is not None:
        return why
    _generate(target.load(folder, _DTYPE))
    return f"{target.opened}, and ran {_TOKENS} tokens."


def _run_streamed(model: StreamedModel) -> None:
    """Run tokens through one part of a model after the other: its embedding and head are not in memory together.

    Raises:
        NumericsError: as :func:`_generate`.
    """
    try:
        passed = model.pass_blocks(torch.full((1, _TOKENS), _first_token(model)), 1)
    except InputError:
        # Blocks that are no plain chain can write. Whatever else is wrong shows again.
        _generate(model.whole())
        return
    _check_finite(passed.logits(slice(0, 1)))


@torch.inference_mode()
def _generate(model: PreTrainedModel) -> None:
    """Have a model go on from one token. Raises NumericsError where its predictions are not finite."""
    prompt = torch.tensor([[_first_token(model)]])
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
    _check_finite(torch.stack(found.logits))


def _check_finite(logits: torch.Tensor) -> None:
    """Refuse predictions that are no numbers. Raises NumericsError."""
    if not logits.isfinite().all():
        raise NumericsError(
            "What was written predicts what is no number, in bf16.",
            hint="Try 'ulbq eval --dtype fp32' on the model that it was made from: it may overflow itself.",
        )


def _first_token(model: AnyModel) -> int:
    first = getattr(model.config.get_text_config(), "bos_token_id", None)
    return first if isinstance(first, int) else 0

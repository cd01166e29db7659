"""The calibration samples of a run, drawn from text or written by the model itself."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ulbq import distributed, runtime
from ulbq.artifacts.store import ArtifactWriter
from ulbq.blockwise.streamed import AnyModel, StreamedModel, whole_model
from ulbq.config.quantize import Quantization
from ulbq.data.calibration import (
    CALIBRATION_FILE,
    Calibration,
    calibration_samples,
    load_calibration,
    save_calibration,
    sources,
)
from ulbq.data.contents import contents
from ulbq.data.examples import training_text
from ulbq.data.generate import self_samples
from ulbq.data.image_rows import names_images
from ulbq.data.images import image_samples
from ulbq.data.registry import available
from ulbq.errors import InputError, UsageError
from ulbq.models.blocks import block_list, load_outer, materialize
from ulbq.models.load import load_model, unfilled_model
from ulbq.models.processor import load_processor, placeholders
from ulbq.models.source import ModelSource
from ulbq.progress import Progress
from ulbq.training.precision import Precision
from ulbq.training.sharding import join, shard

_WRITTEN = "samples in "


class Sampled(Protocol):
    """The part of a request that says which samples."""

    @property
    def calibration(self) -> str | None: ...
    @property
    def sequence_length(self) -> int | None: ...
    @property
    def activation_memory(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def data_dir(self) -> Path | None: ...
    @property
    def offline(self) -> bool: ...


def default_calibration(request: Sampled, progress: Progress) -> str:
    """WikiText-2, or the model's own writing where that cannot be had."""
    if available("wikitext2", data_dir=request.data_dir, offline=request.offline):
        return "wikitext2"
    progress.note("WikiText-2 cannot be had here: the model writes its own calibration samples (`calibration=self`).")
    return "self"


def draw(request: Sampled, source: ModelSource, samples: int, progress: Progress) -> Calibration:
    """Samples of the text, or of the images, that a completed request names. Raises InputError, ResourceError."""
    path, *others = map(Path, sources(str(request.calibration)))
    if not others and names_images(path):
        processor = load_processor(source)
        return image_samples(
            path,
            processor,
            placeholders(source, processor),
            samples=samples,
            length=request.sequence_length or 0,
            seed=request.seed,
            progress=progress,
        )
    drawn = calibration_samples(
        str(request.calibration),
        source.tokenizer(),
        samples=samples,
        length=request.sequence_length or 0,
        seed=request.seed,
        data_dir=request.data_dir,
        offline=request.offline,
    )
    if drawn.mask is not None:
        raise InputError(
            f"'{request.calibration}' holds examples of an instruction set, filled up behind their ends.",
            hint="Calibrate on plain text; such samples are for `end_to_end_data`.",
        )
    return _looked_at(drawn, source, progress)


def _looked_at(drawn: Calibration, source: ModelSource, progress: Progress) -> Calibration:
    """The samples with what they hold, of which ``progress`` is told."""
    found = drawn.contents or contents(drawn.tokens, source.tokenizer())
    progress.note(f"Calibration on {drawn.name}: {found.words}.")
    for sentence in found.warnings(getattr(source.config.get_text_config(), "hidden_size", 0)):
        progress.warn(sentence)
    return replace(drawn, contents=found)


def check_images(asked: Mapping[str, bool]) -> None:
    """Refuse what goes by predictions, for samples of images: no model was taught to predict a part of an image.

    Args:
        asked: fields with their values, each with whether it goes by predictions here.

    Raises:
        InputError: names the first that does.
    """
    if field := next((name for name, found in asked.items() if found), None):
        raise InputError(
            f"`{field}` goes by what the model predicts, and the parts of images in the calibration are no words.",
            hint="Leave it out, or give it text: `end_to_end_data`, or a `calibration` without images.",
        )


def draw_text(run: Quantization, source: ModelSource, samples: int, progress: Progress) -> Calibration:
    """Samples of the text or the instruction set that an end-to-end phase has of its own; not of ``self``.

    Raises:
        UsageError, InputError, ResourceError: as :func:`ulbq.data.examples.training_text`.
    """
    return training_text(
        str(run.text),
        source.tokenizer(),
        samples=samples,
        length=run.sequence_length,
        seed=run.seed,
        template=None if run.phase is None else run.phase.end_to_end_template,
        data_dir=run.data_dir,
        offline=run.offline,
        progress=progress,
    )


def choose_streamed(asked: bool | None, needed: int, device: torch.device, progress: Progress) -> bool:
    """Whether the full-precision model is read block by block where all of it is wanted.

    Args:
        asked: for or against it; None to go by the memory.
        needed: bytes of the largest phase that has it in memory; 0 where none wants it.
        device: that computes.
        progress: told of a choice that nobody made.

    Raises:
        UsageError: asked for, and nothing wants the model as a whole.
    """
    if not needed and asked is not None:
        raise UsageError(
            "`stream` means nothing here: no phase of this run wants all of the full-precision model.",
            hint="It is for `calibration=self` and for teachers, as of `end_to_end=kl`. Leave it out.",
        )
    if asked is not None:
        return asked
    lack = _lack(needed, device)
    if lack is not None:
        progress.note(f"With the full-precision model loaded this takes {lack}: it is read block by block (`stream`).")
    return lack is not None


def choose_sharded(asked: bool | None, needed: int, device: torch.device, progress: Progress) -> bool:
    """Whether each of several processes holds a part of what they train.

    Args:
        asked: for or against it; None to go by the memory.
        needed: bytes of the training where each holds all of it; 0 where nothing trains.
        device: that computes.
        progress: told of a choice that nobody made.

    Raises:
        UsageError: asked for, and there is one process, or nothing to shard.
    """
    if asked is not None and not needed:
        raise UsageError(
            "`shard` means nothing here: nothing trains in this run.",
            hint="It is for methods that train, `end_to_end` and 'ulbq finetune'. Leave it out.",
        )
    alone = distributed.size() == 1
    if asked and alone:
        raise UsageError(
            "`shard` spreads what trains over processes, and there is one.", hint="Start several with torchrun."
        )
    if asked is not None or alone or not needed:
        return bool(asked)
    lack = _lack(needed, device)
    if lack is not None:
        progress.note(f"With all that trains in each process this takes {lack}: each holds a part of it (`shard`).")
    return lack is not None


def _lack(needed: int, device: torch.device) -> str | None:
    """How the most that a process needs exceeds the least that one has free; None where it does not.

    All processes decide alike, whatever their GPUs are.
    """
    most, free = max(distributed.gather(needed)), min(distributed.gather(runtime.free_memory(device)))
    return None if most <= free else f"{most / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"


def parent_model(
    request: Sampled,
    source: ModelSource,
    precision: Precision,
    writer: ArtifactWriter,
    progress: Progress,
    *,
    streamed: bool,
) -> AnyModel:
    """The full-precision model in the dtype of a run's products, whole or one block at a time."""
    options: dict[str, Any] = {"dtype": precision.dtype, "device": precision.device}
    if not streamed:
        return load_model(source, **options)
    limit = request.activation_memory or 0
    return StreamedModel(source, directory=writer.scratch, limit=limit, progress=progress, **options)


def sharded_model(source: ModelSource, precision: Precision) -> PreTrainedModel:
    """The full-precision model in the dtype of a run's products, its blocks sharded over the processes."""
    device, model = precision.device, unfilled_model(source, precision.dtype)
    load_outer(model, source, None, device)
    prefix, blocks = block_list(model)
    for index, block in enumerate(blocks):
        materialize(block, source, None, prefix=f"{prefix}.{index}.", device=device)
        shard(block, device)
    join(blocks, device)
    return model


@contextmanager
def _alone(kept: Path | None) -> Iterator[None]:
    """Let other runs wait that would write the same samples, as those of a sweep at the same time."""
    if kept is None or not distributed.is_main():
        yield
        return
    with kept.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def written_samples(
    request: Sampled,
    source: ModelSource,
    samples: int,
    *,
    file: str = CALIBRATION_FILE,
    precision: Precision,
    streamed: bool,
    writer: ArtifactWriter,
    shared: Path | None = None,
    progress: Progress,
) -> Calibration:
    """Samples of the model's own, or those that the interrupted run wrote to ``file``: they follow from the seed.

    Where there is a ``shared`` folder, those that lie there are taken, and new ones are kept there.
    """
    saved, step = writer.path / file, f"{_WRITTEN}{file}"
    if step in writer.journal:
        return _looked_at(load_calibration(saved), source, progress)

    def write() -> Calibration:
        return self_samples(
            whole_model(parent_model(request, source, precision, writer, progress, streamed=streamed)),
            source.tokenizer(),
            samples=samples,
            length=request.sequence_length or 0,
            seed=request.seed,
            room=(request.activation_memory or 0) if streamed else 0,
            progress=progress,
        )

    words = f"{samples}x{request.sequence_length}-{request.seed}-{precision.dtype}-{source.content_hash}.safetensors"
    kept = None if shared is None else shared / words
    with _alone(kept):
        if kept is not None and kept.exists():
            written = load_calibration(kept)
        else:
            # One process writes for all: each word hangs on those before it.
            written = distributed.on_main(write)
            if kept is not None:
                save_calibration(kept, written)
    save_calibration(saved, written)
    writer.record(step, {}, files=[saved])
    # Read back: what a model wrote while it kept no gradients takes none later.
    return _looked_at(load_calibration(saved), source, progress)

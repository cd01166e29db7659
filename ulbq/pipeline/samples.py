"""The calibration samples of a run, drawn from text or written by the model itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ulbq import distributed
from ulbq.artifacts.store import ArtifactWriter
from ulbq.config.quantize import Quantization
from ulbq.data.calibration import CALIBRATION_FILE, Calibration, calibration_samples, load_calibration, save_calibration
from ulbq.data.examples import training_text
from ulbq.data.generate import self_samples
from ulbq.data.image_rows import names_images
from ulbq.data.images import image_samples
from ulbq.data.registry import available
from ulbq.errors import InputError
from ulbq.models.load import load_model
from ulbq.models.processor import load_processor, placeholders
from ulbq.models.source import ModelSource
from ulbq.progress import Progress
from ulbq.training.precision import Precision

_WRITTEN = "samples in "


class Sampled(Protocol):
    """The part of a request that says which samples."""

    @property
    def calibration(self) -> str | None: ...
    @property
    def sequence_length(self) -> int | None: ...
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
    path = Path(str(request.calibration))
    if names_images(path):
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
    return drawn


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


def written_samples(
    request: Sampled,
    source: ModelSource,
    samples: int,
    *,
    file: str = CALIBRATION_FILE,
    precision: Precision,
    writer: ArtifactWriter,
    shared: Path | None = None,
    progress: Progress,
) -> Calibration:
    """Samples of the model's own, or those that the interrupted run wrote to ``file``: they follow from the seed.

    Where there is a ``shared`` folder, those that lie there are taken, and new ones are kept there.
    """
    saved, step = writer.path / file, f"{_WRITTEN}{file}"
    if step in writer.journal:
        return load_calibration(saved)

    def write() -> Calibration:
        return self_samples(
            load_model(source, dtype=precision.dtype, device=precision.device),
            source.tokenizer(),
            samples=samples,
            length=request.sequence_length or 0,
            seed=request.seed,
            progress=progress,
        )

    words = f"{samples}x{request.sequence_length}-{request.seed}-{precision.dtype}-{source.content_hash}.safetensors"
    kept = None if shared is None else shared / words
    if kept is not None and kept.exists():
        written = load_calibration(kept)
    else:
        # One process writes for all: each word hangs on those before it.
        written = distributed.on_main(write)
        if kept is not None:
            save_calibration(kept, written)
    save_calibration(saved, written)
    writer.record(step, {}, files=[saved])
    return written

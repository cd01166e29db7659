"""Samples that show images: rows of text and images, packed into samples of one length.

A sample is several rows, one behind the other, with all that a model sees of their images. It is cut at its length,
never within an image. What no further row fits into is filled with text, so that there is no padding, and every
position counts like any other.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ulbq.data.calibration import Calibration
from ulbq.data.image_rows import BETWEEN, TAKES_ELSE, ImageRow, cause, read_image_rows
from ulbq.errors import InputError
from ulbq.progress import Progress

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_SLACK = 8  # tokens that rows may lose where they are joined


@dataclass(frozen=True)
class ImageSample:
    """A sample; a call makes what a model takes of it beside the tokens.

    Attributes:
        processor: the model's.
        text: of all its rows, with the processor's placeholders.
        files: the images, in order.
        sha256: of each.
        length: tokens.
        settings: hash of the processor's.
    """

    processor: "ProcessorMixin"
    text: str
    files: tuple[Path, ...]
    sha256: tuple[str, ...]
    length: int
    settings: str

    def __call__(self) -> dict[str, torch.Tensor]:
        """Pixel values and what belongs to them, of batch size 1. Raises InputError where a file changed."""
        for file, known in zip(self.files, self.sha256, strict=True):
            if _hash(file) != known:
                raise InputError(f"The image '{file}' changed while the run read it.", hint="Start again.")
        encoded = _encode(self.processor, self.text, self.files)
        whole = encoded.pop("input_ids").shape
        # There is no padding to be told of.
        encoded.pop("attention_mask", None)
        return {
            name: value[:, : self.length] if value.shape == whole else value
            for name, value in encoded.items()
            if isinstance(value, torch.Tensor)
        }


def image_samples(
    path: Path,
    processor: "ProcessorMixin",
    placeholders: frozenset[int],
    *,
    samples: int,
    length: int,
    seed: int,
    progress: Progress,
) -> Calibration:
    """Draw samples from a file whose rows name images.

    Args:
        path: ``.jsonl`` or ``.parquet``. A row has a ``text`` in which each ``<image>`` stands for the next of its
            ``images``; or ``messages`` as chat templates take them, whose images are named in place or by ``images``.
            Paths are seen from the file's folder. Rows without images fill up.
        processor: the model's.
        placeholders: tokens that stand for parts of images.
        samples: number of samples.
        length: tokens a sample.
        seed: of the rows' order.
        progress: told what came of the rows.

    Raises:
        InputError: unreadable rows or images, other counts of images than of their places, or too few rows.
    """
    rows = read_image_rows(path, processor)
    shown = [row for row in rows if row.files]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shown), generator=generator).tolist()
    texts = [row.plain for row in rows if row.plain and not row.files] or [row.plain for row in rows if row.plain]
    packing = _Packing(path, processor, placeholders, length, deque(shown[i] for i in order), cycle(texts), samples)
    made = [packing.next(samples - number) for number in range(samples)]
    tokens = torch.cat([tokens for _, tokens in made])
    images = tuple(sample for sample, _ in made)
    progress.note(packing.told(tokens, images))
    return Calibration(path.name, tokens, seed, images=images)


@dataclass
class _Packing:
    """Rows on their way into samples.

    Attributes:
        queue: rows with images that are left.
        texts: what fills up, again and again; empty where no row has a text.
        samples: that are to be made.
        dropped: rows whose images alone take more than a sample.
        filled: tokens that filled up.
        count: of the rows with images.
        settings: hash of the processor's.
    """

    path: Path
    processor: "ProcessorMixin"
    placeholders: frozenset[int]
    length: int
    queue: deque[ImageRow]
    texts: Iterator[str]
    samples: int
    dropped: int = 0
    filled: int = 0
    count: int = field(init=False)
    settings: str = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.queue)
        processor: Any = self.processor
        self.settings = hashlib.sha256(processor.image_processor.to_json_string().encode()).hexdigest()

    def next(self, wanted: int) -> tuple[ImageSample, torch.Tensor]:
        """A sample and its tokens ``[1, length]``; ``wanted`` samples share the rows that are left."""
        taken, used = self._rows(max(1, len(self.queue) // wanted))
        while True:
            texts, size = [row.text for row in taken], used
            while size < self.length + _SLACK:
                texts.append(self._filler())
                size += self._count(BETWEEN + texts[-1])
            text, files = BETWEEN.join(texts), tuple(file for row in taken for file in row.files)
            tokens = self._tokens(text, files, f"from row {taken[0].number} on")
            if tokens.shape[1] < self.length:
                used -= self.length - tokens.shape[1]
            elif self._core(tokens) > self.length:
                # Joints took more tokens than was thought: the last row comes into the next sample.
                self.queue.appendleft(taken.pop())
                used = sum(self._size(row)[0] for row in taken)
            else:
                break
        self.filled += max(0, self.length - used)
        sample = ImageSample(
            self.processor, text, files, tuple(map(_hash, files)), length=self.length, settings=self.settings
        )
        return sample, tokens[:, : self.length]

    def told(self, tokens: torch.Tensor, images: Sequence[ImageSample]) -> str:
        """What became of the rows, in words."""
        shown = torch.isin(tokens, torch.tensor(sorted(self.placeholders))).sum().item() / tokens.numel()
        said = (
            f"{len(images)} samples show {sum(len(sample.files) for sample in images)} images: {shown:.0%} of their "
            f"tokens are images', {self.filled / tokens.numel():.0%} text that fills them up."
        )
        if self.dropped:
            said += f" {self.dropped} rows were left out, whose images do not fit into {self.length} tokens."
        return said

    def _rows(self, most: int) -> tuple[list[ImageRow], int]:
        """The next rows, as many as fit, and the tokens they take."""
        taken: list[ImageRow] = []
        used = 0
        while self.queue and len(taken) < most and used < self.length:
            whole, core = self._size(self.queue[0])
            if core > self.length:
                self.dropped += 1
                self.queue.popleft()
                continue
            if used + core > self.length:
                break
            taken.append(self.queue.popleft())
            used += whole
        if taken:
            return taken, used
        left_out = f", as the images of {self.dropped} do not fit into {self.length} tokens" if self.dropped else ""
        raise InputError(
            f"{self.path} has {self.count} rows with images, too few for {self.samples} samples{left_out}.",
            hint="Lower `samples`, or raise `sequence_length`." if self.dropped else "Lower `samples`, or add rows.",
        )

    def _size(self, row: ImageRow) -> tuple[int, int]:
        """Tokens of a row, and those up to the end of its last image."""
        tokens = self._tokens(row.text, row.files, f"row {row.number}")
        return tokens.shape[1] + self._count(BETWEEN), self._core(tokens)

    def _tokens(self, text: str, files: Sequence[Path], where: str) -> torch.Tensor:
        try:
            tokens: torch.Tensor = _encode(self.processor, text, files)["input_ids"]
        except TAKES_ELSE as error:
            raise InputError(
                f"{self.path}, {where}: the model's processor does not take it ({cause(error)}).",
                hint="Take that row out, or write it otherwise.",
            ) from error
        return tokens

    def _core(self, tokens: torch.Tensor) -> int:
        places = torch.isin(tokens[0], torch.tensor(sorted(self.placeholders))).nonzero()
        return int(places[-1]) + 1 if len(places) else 0

    def _filler(self) -> str:
        text = next(self.texts, None)
        if text is None:
            raise InputError(
                f"{self.path} holds no text to fill samples of {self.length} tokens.",
                hint="Add rows of text, or lower `sequence_length`.",
            )
        return text

    def _count(self, text: str) -> int:
        processor: Any = self.processor
        return len(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _hash(path: Path) -> str:
    return hashlib.sha256(_bytes(path)).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"The image '{path}' cannot be read ({error.strerror}).", hint="Check the file.") from error


def _encode(processor: "ProcessorMixin", text: str, files: Sequence[Path]) -> dict[str, Any]:
    """What the processor makes of a text and its images; a text that begins with a special token gets no other."""
    found: Any = processor
    first = found.tokenizer.bos_token
    special = first is None or not text.startswith(first)
    encoded = found(
        text=[text], images=[_image(file) for file in files], return_tensors="pt", add_special_tokens=special
    )
    return dict(encoded)


def _image(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(BytesIO(_bytes(path))).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"'{path}' is not an image that Pillow can read ({cause(error)}).", hint="Write it again, as a PNG or JPEG."
        ) from error

"""Rows of a file that name images, as texts with a processor's placeholders and paths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ulbq.data.files import CHAT, ROW_SUFFIXES, Row, numbered_rows, suffix_of, text_of
from ulbq.errors import InputError
from ulbq.models.skeleton import BUILD_ERRORS
from ulbq.printable import one_line

if TYPE_CHECKING:
    from transformers import ProcessorMixin

BETWEEN = "\n\n"
"""What stands between two texts."""
_MARK = "<image>"
"""Where a row's text has an image, whatever the model's own word for that is."""
_COLUMN = "images"
_PLACES = ("image", "path", "url")
_LOOKED_AT = 1000

# What processors and chat templates raise that are given something else than they expect.
TAKES_ELSE = (TemplateError, *BUILD_ERRORS)


def names_images(path: Path) -> bool:
    """Whether one of a file's first thousand rows names an image. Raises as :func:`numbered_rows`."""
    return suffix_of(path) in ROW_SUFFIXES and any(_shows(row) for _, row in islice(numbered_rows(path), _LOOKED_AT))


@dataclass(frozen=True)
class ImageRow:
    """A row of a file.

    Attributes:
        number: in the file.
        text: with the processor's placeholders.
        files: the images.
        plain: the text without them.
    """

    number: int
    text: str
    files: tuple[Path, ...]
    plain: str


def _shows(row: Row) -> bool:
    if isinstance(row.get(_COLUMN), list) and row[_COLUMN]:
        return True
    turns: list[Any] = next((row[name] for name in CHAT if isinstance(row.get(name), list)), [])
    parts = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    return any(_is_image(part) for content in parts if isinstance(content, list) for part in content)


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def read_image_rows(path: Path, processor: "ProcessorMixin") -> list[ImageRow]:
    """All rows; those without a text or an image are passed over."""
    markup, token = _markup(processor), _token(processor)
    found = []
    for number, row in numbered_rows(path):
        where = f"{path}, row {number}"
        named = list(row[_COLUMN]) if isinstance(row.get(_COLUMN), list) else []
        turns = next((row[name] for name in CHAT if isinstance(row.get(name), list)), None)
        if turns is not None and all(isinstance(turn, Mapping) and "content" in turn for turn in turns):
            chat, named = _chat(turns, named, where)
            parts = [part["text"] for turn in chat for part in turn["content"] if part["type"] == "text"]
            plain = BETWEEN.join(part for part in parts if part.strip())
            text = _rendered(processor, chat, where) if named else plain
        else:
            text = text_of(row) or ""
            plain = text.replace(_MARK, "")
            text = text.replace(_MARK, markup)
        files = tuple(_file(path.parent, name, where) for name in named)
        places = text.count(token)
        if places != len(files):
            raise InputError(
                f"{where}: {len(files)} images, and {places} places for them in the text.",
                hint=f"Write {_MARK} where each image stands.",
            )
        if text.strip():
            found.append(ImageRow(number, text, files, plain.replace(token, "").strip()))
    return found


def _chat(turns: Sequence[Row], named: list[Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns as chat templates of processors take them, and the images in order; those of the column where none is."""
    chat, files, rest = [], [], list(named)
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            pieces = content.split(_MARK)
            between: list[dict[str, Any]] = [{"type": "image"}] * (len(pieces) - 1)
            texts: list[dict[str, Any]] = [{"type": "text", "text": piece} for piece in pieces]
            content = [part for pair in zip(texts, [*between, {}], strict=True) for part in pair if part]
        parts: list[dict[str, Any]] = []
        for part in content or []:
            if _is_image(part):
                own = next((part[name] for name in (*_PLACES, "image_url") if part.get(name)), None)
                if own is None and not rest:
                    raise InputError(
                        f"{where}: an image without a path.", hint='Name it: {"type": "image", "path": "a.png"}.'
                    )
                files.append(rest.pop(0) if own is None else own)
                parts.append({"type": "image"})
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise InputError(
                    f"{where}: a part of a turn that is neither text nor an image.",
                    hint='Parts are {"type": "text", "text": …} and {"type": "image", "path": …}.',
                )
        chat.append({"role": turn.get("role", "user"), "content": parts})
    return chat, [*files, *rest]


def _rendered(processor: "ProcessorMixin", chat: Any, where: str) -> str:
    try:
        text: str = processor.apply_chat_template(chat, tokenize=False)
    except TAKES_ELSE as error:
        raise InputError(
            f"{where}: the model's chat template does not take it ({cause(error)}).",
            hint="Give texts with <image> in them instead.",
        ) from error
    return text


def _markup(processor: "ProcessorMixin") -> str:
    """What stands for an image in a text, by the model's chat template, which may put marks around it."""
    before, behind = "ulbq-before", "ulbq-behind"
    parts: Any = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": behind}]
    token = _token(processor)
    try:
        text: str = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except TAKES_ELSE:
        return token
    _, _, rest = text.partition(before)
    found, _, _ = rest.partition(behind)
    return found if found.count(token) == 1 and behind in rest else token


def _token(processor: "ProcessorMixin") -> str:
    found: Any = processor
    return str(found.image_token)


def _file(folder: Path, name: object, where: str) -> Path:
    """An image's path. Raises InputError for what is none, and where there is no such file."""
    if not isinstance(name, str):
        raise InputError(f"{where}: an image that is not named by a path.", hint="Store it in a file of its own.")
    if name.startswith(("http://", "https://", "data:")):
        raise InputError(
            f"{where}: the image '{name[:80]}' is no file here; images are not fetched.",
            hint="Store it in a file, and name that.",
        )
    path = folder / name
    if not path.is_file():
        raise InputError(f"{where}: there is no image '{path}'.", hint="Paths are seen from the file's own folder.")
    return path


def cause(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]

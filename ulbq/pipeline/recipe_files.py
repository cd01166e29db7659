"""The files of recipes and tasks: bounded YAML, and a sentence for each way in which it can be none."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from ulbq import limits
from ulbq.artifacts.names import local_path
from ulbq.artifacts.records import Record
from ulbq.artifacts.small_files import read_small
from ulbq.artifacts.yaml_files import parse_yaml
from ulbq.errors import InputError, UsageError

_SUFFIXES = (".yaml", ".yml")


class Recipe(Record):
    """One recipe, or one task.

    Attributes:
        name: what it is asked for by.
        description: one line.
        source: where its values come from.
        options: fields of a request, not yet completed.
        sha256: of the file's bytes.
    """

    name: str
    description: str
    source: str
    options: dict[str, Any]
    sha256: str


def shipped_names(folder: Any) -> list[str]:
    """Names of the recipes in a folder of the package."""
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES))


def read_recipe(
    what: str, given: str, folder: Any, *, required: frozenset[str], hint: str
) -> tuple[dict[str, Any], str]:
    """The content of a shipped recipe, or of a YAML file, and the SHA-256 of its bytes.

    Args:
        what: ``recipe`` or ``task``.
        given: a shipped one's name, or a file.
        folder: where the shipped ones lie.
        required: keys that it must have.
        hint: where there is none of that name.

    Raises:
        UsageError: neither a name nor a file, or a key that recipes do not have.
        InputError: a file that cannot be read or is no recipe.
    """
    path, title = local_path(given), what.capitalize()
    if given in shipped_names(folder):
        raw = (folder / f"{given}.yaml").read_bytes()
    elif path.suffix in _SUFFIXES or path.is_file():
        if not path.is_file():
            shipped = ", ".join(shipped_names(folder))
            raise InputError(f"There is no {what} file '{given}'.", hint=f"Shipped {what}s: {shipped}.")
        raw = _bytes(title, path)
    else:
        raise UsageError(f"There is no {what} '{given}'.", hint=hint)
    content = _yaml(title, given, raw)
    if not isinstance(content, dict) or required - content.keys() or not isinstance(content["options"], dict):
        raise InputError(
            f"'{given}' is no {what}.", hint="It has the keys name, description, source and options, the last a map."
        )
    texts = {key: str(content.get(key) or "") for key in ("name", "description", "source")}
    return content | texts, hashlib.sha256(raw).hexdigest()


def read_yaml(what: str, path: Path) -> object:
    """The value in a short YAML file; ``what`` names it in errors. Raises InputError."""
    return _yaml(what, str(path), _bytes(what, path))


def _bytes(what: str, path: Path) -> bytes:
    """A recipe's bytes; ``what`` is ``Recipe`` or ``Task``. Raises InputError where they cannot be read."""
    try:
        return read_small(path, limits.RECIPE_SIZE)
    except ValueError as error:
        raise InputError(f"{what} '{path}' cannot be read: {error}.", hint="It has to be a short YAML file.") from error
    except OSError as error:
        raise InputError(f"{what} '{path}' cannot be read: {error.strerror}.") from error


def _yaml(what: str, given: str, raw: bytes) -> object:
    """The YAML value in a recipe. Raises InputError where there is none, with the line where it is known."""
    try:
        return parse_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{what} '{given}' is no text.", hint="It has to be a YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"{what} '{given}' is no YAML{where}: {problem}.", hint="Mend the file.") from None
    except ValueError as error:
        raise InputError(f"{what} '{given}' cannot be read: {error}.", hint="Mend the file.") from None

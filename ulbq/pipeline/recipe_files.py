"""The files of recipes and tasks: bounded YAML, and a sentence for each way in which it can be none."""

from pathlib import Path

import yaml

from ulbq import limits
from ulbq.artifacts.small_files import read_small
from ulbq.artifacts.yaml_files import parse_yaml
from ulbq.errors import InputError


def read_recipe_file(what: str, path: Path) -> bytes:
    """A recipe's bytes; ``what`` is ``Recipe`` or ``Task``. Raises InputError where they cannot be read."""
    try:
        return read_small(path, limits.RECIPE_SIZE)
    except ValueError as error:
        raise InputError(f"{what} '{path}' cannot be read: {error}.", hint="A recipe is a short YAML file.") from error
    except OSError as error:
        raise InputError(f"{what} '{path}' cannot be read: {error.strerror}.") from error


def read_yaml(what: str, given: str, raw: bytes) -> object:
    """The YAML value in a recipe. Raises InputError where there is none, with the line where it is known."""
    try:
        return parse_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{what} '{given}' is no text.", hint="A recipe is a YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"{what} '{given}' is no YAML{where}: {problem}.", hint="Mend the file.") from None
    except ValueError as error:
        raise InputError(f"{what} '{given}' cannot be read: {error}.", hint="Mend the file.") from None

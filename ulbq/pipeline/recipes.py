"""Recipes: the options of a run in a file, with where their values come from.

    name: apiq-w2
    description: …
    source: paper, section or file that the values are from
    options:
      method: apiq
      bits: 2

``options`` are fields of :class:`~ulbq.config.quantize.QuantizeRequest`. Shipped recipes lie in ``ulbq/recipes``.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ulbq.artifacts.names import local_path
from ulbq.config.quantize import Preset, QuantizeRequest, idle
from ulbq.config.run import RecipeRecord
from ulbq.errors import InputError, UsageError
from ulbq.pipeline.recipe_files import read_recipe_file, read_yaml

# What belongs to one machine or one run is no recipe's to say.
_NOT_IN_RECIPES = frozenset({"source", "recipe", "out", "force", "device", "data_dir", "offline", "seed"})
OPTIONS = frozenset(QuantizeRequest.model_fields) - _NOT_IN_RECIPES
"""Fields of a request that a recipe may set."""

# What an option takes the place of besides itself.
_REPLACES = {"preset": frozenset(Preset.model_fields), "stages": frozenset({"epochs"}), "epochs": frozenset({"stages"})}
_SUFFIXES = (".yaml", ".yml")


class Recipe(BaseModel):
    """One recipe.

    Attributes:
        name: what it is asked for by; a file of one's own goes by its path.
        description: one line.
        source: where its values come from.
        options: fields of a request, not yet completed.
        sha256: of the file's bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    source: str
    options: dict[str, Any]
    sha256: str


def names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(_SUFFIXES))


def shipped() -> list[Recipe]:
    """Every shipped recipe, by name."""
    return [load(name) for name in names()]


def load(given: str) -> Recipe:
    """Read a recipe.

    Args:
        given: a shipped recipe's name, or a YAML file.

    Raises:
        UsageError: neither, or options that no request has.
        InputError: a file that cannot be read or is no recipe.
    """
    path = local_path(given)
    if given in names():
        raw = (_folder() / f"{given}.yaml").read_bytes()
    elif path.suffix in _SUFFIXES or path.is_file():
        if not path.is_file():
            raise InputError(f"There is no recipe file '{given}'.", hint=f"Shipped recipes: {', '.join(names())}.")
        raw = read_recipe_file("Recipe", path)
    else:
        raise UsageError(
            f"There is no recipe '{given}'.",
            hint=f"{_nearest(given, names())} See 'ulbq quantize --list-recipes', or name a .yaml file.".strip(),
        )
    return _read(given, raw)


def request_of(given: Mapping[str, Any], recipe: Recipe | None) -> QuantizeRequest:
    """The request of a command line.

    What was given wins over the recipe; what that leaves without a meaning in the recipe (the rank, where the adapter
    was switched off; epochs, where a preset was chosen; stages, where epochs were given, and the reverse) is left out
    with it.

    Args:
        given: fields of the request; None for what was not given.
        recipe: what fills in the rest; None for no recipe.
    """
    explicit = {name: value for name, value in given.items() if value is not None}
    if recipe is None:
        return QuantizeRequest.model_validate(explicit)
    replaced = {name for given, names in _REPLACES.items() if given in explicit for name in names}
    options = {name: value for name, value in recipe.options.items() if name not in replaced}
    # What the recipe itself leaves without a meaning is a slip in it, and refused later.
    merged = QuantizeRequest.model_validate({**options, **explicit})
    lost = idle(merged) - idle(QuantizeRequest.model_validate(recipe.options))
    options = {name: value for name, value in options.items() if name not in lost}
    record = RecipeRecord(name=recipe.name, sha256=recipe.sha256)
    return QuantizeRequest.model_validate({**options, **explicit, "recipe": record})


def _read(given: str, raw: bytes) -> Recipe:
    content = read_yaml("Recipe", given, raw)
    if not isinstance(content, dict) or not isinstance(content.get("options"), dict):
        raise InputError(
            f"'{given}' is no recipe.",
            hint="A recipe has the keys name, description, source and options, the last a map.",
        )
    _refuse_unknown(given, "key", content, {"name", "description", "source", "options"})
    _refuse_unknown(given, "option", content["options"], OPTIONS)
    if "method" not in content["options"]:
        raise InputError(f"Recipe '{given}' names no method.", hint="Add 'method: …' to its options.")
    texts = {key: str(content.get(key) or "") for key in ("description", "source")}
    try:
        QuantizeRequest.model_validate(content["options"])
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UsageError(f"Recipe '{given}', {where}: {problem['msg']}.", hint="Mend the file.") from error
    return Recipe(name=given, **texts, options=content["options"], sha256=hashlib.sha256(raw).hexdigest())


def _refuse_unknown(given: str, what: str, found: Mapping[Any, Any], known: Iterable[str]) -> None:
    for key in found:
        if key in _NOT_IN_RECIPES and what == "option":
            raise UsageError(
                f"Recipe '{given}' sets '{key}', which belongs to one run.", hint="Leave it to the command line."
            )
        if key not in known:
            raise UsageError(
                f"Recipe '{given}' has an unknown {what} '{key}'.",
                hint=_nearest(str(key), known) or f"Known: {', '.join(sorted(known))}.",
            )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=3)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def _folder() -> Any:
    return resources.files("ulbq") / "recipes"

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
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from pydantic import ValidationError

from ulbq.config.options import renamed
from ulbq.config.quantize import Preset, QuantizeRequest, idle
from ulbq.config.run import RecipeRecord
from ulbq.errors import InputError, UsageError
from ulbq.pipeline.recipe_files import Recipe, read_recipe, shipped_names

# What belongs to one machine or one run is no recipe's to say.
_NOT_IN_RECIPES = frozenset({"source", "recipe", "out", "force", "device", "data_dir", "offline", "seed"})
OPTIONS = frozenset(QuantizeRequest.model_fields) - _NOT_IN_RECIPES
"""Fields of a request that a recipe may set."""

# What an option takes the place of besides itself.
_REPLACES = {"preset": frozenset(Preset.model_fields), "stages": frozenset({"epochs"}), "epochs": frozenset({"stages"})}


def names() -> list[str]:
    """Names of the shipped recipes."""
    return shipped_names(_folder())


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
    hint = f"{_nearest(given, names())} See 'ulbq quantize --list-recipes', or name a .yaml file.".strip()
    content, sha256 = read_recipe("recipe", given, _folder(), required=frozenset({"options"}), hint=hint)
    _refuse_unknown(given, "key", content, {"name", "description", "source", "options"})
    content["options"] = renamed(QuantizeRequest, content["options"])
    _refuse_unknown(given, "option", content["options"], OPTIONS)
    if "method" not in content["options"]:
        raise InputError(f"Recipe '{given}' names no method.", hint="Add 'method: …' to its options.")
    try:
        QuantizeRequest.model_validate(content["options"])
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UsageError(f"Recipe '{given}', {where}: {problem['msg']}.", hint="Mend the file.") from error
    return Recipe.model_validate({**content, "name": given, "sha256": sha256})


def request_of(given: Mapping[str, Any], recipe: Recipe | None) -> QuantizeRequest:
    """The request of a command line.

    What was given wins over the recipe; what that leaves without a meaning in the recipe (the rank, where the adapter
    was switched off; epochs, where a preset was chosen; stages, where epochs were given, and the reverse) is left out
    with it.

    Args:
        given: fields of the request; None for what was not given.
        recipe: what fills in the rest; None for no recipe.
    """
    explicit = renamed(QuantizeRequest, {name: value for name, value in given.items() if value is not None})
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

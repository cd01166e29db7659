"""Where the parents of an artifact stand now, wherever they and it were moved to."""

import os
from pathlib import Path

from ulbq.artifacts.names import local_path
from ulbq.artifacts.records import Parent
from ulbq.errors import InputError


def places(parent: Parent, child: Path) -> list[Path]:
    """Where a parent may stand that is no model of the Hub, and something does; the likeliest place first.

    Args:
        parent: as its child recorded it.
        child: the folder of the child.

    Returns:
        Its absolute path; its path relative to the child, for the two may have moved together; the path as it was
        typed; and the place beside the child.
    """
    try:
        given = local_path(parent.path)
        named = [local_path(text) for text in (parent.absolute, parent.relative) if text]
    except InputError:  # texts of a file that can be no paths
        return []
    found = [given, child.absolute().parent / given.name]
    # An absolute path stays what it is behind another.
    found = [*(Path(os.path.normpath(child.absolute() / path)) for path in named), *found]
    # Where it is the same place, as it was typed: that is how people know it.
    known = [given if place == given.absolute() else place for place in found]
    return [place for place in dict.fromkeys(known) if place.exists()]


def seen_from(parent: Parent, child: Path) -> Parent:
    """A parent's record with its path relative to a child that will stand at ``child``."""
    if not parent.absolute or not Path(parent.absolute).exists():
        return parent.model_copy(update={"relative": ""})
    return parent.model_copy(update={"relative": os.path.relpath(parent.absolute, child)})

"""Where the parents of an artifact stand now, wherever they and it were moved to."""

import os
from pathlib import Path

from ulbq.artifacts.records import Parent


def places(parent: Parent, child: Path) -> list[Path]:
    """Where a parent may stand that is no model of the Hub, and something does; the likeliest place first.

    Args:
        parent: as its child recorded it.
        child: the folder of the child.

    Returns:
        Its absolute path; its path relative to the child, for the two may have moved together; the path as it was
        typed; and the place beside the child.
    """
    given = Path(parent.path).expanduser()
    found = [given, child.absolute().parent / given.name]
    if parent.relative:
        found.insert(0, Path(os.path.normpath(child.absolute() / parent.relative)))
    if parent.absolute:
        found.insert(0, Path(parent.absolute))
    return [place for place in dict.fromkeys(found) if place.exists()]


def seen_from(parent: Parent, child: Path) -> Parent:
    """A parent's record with its path relative to a child that will stand at ``child``."""
    if not parent.absolute or not Path(parent.absolute).exists():
        return parent.model_copy(update={"relative": ""})
    return parent.model_copy(update={"relative": os.path.relpath(parent.absolute, child)})

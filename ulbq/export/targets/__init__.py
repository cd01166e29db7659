"""The layouts that ``convert`` writes, and who reads them.

A target is a module here with a ``TARGET``, and a name in :data:`ulbq.config.convert.TARGETS`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ulbq.export.targets.base import Target


def target(name: str) -> "Target":
    """The target of a name."""
    found: Target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    return found

"""Runs a function once another library's module is imported, and imports nothing itself."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` right after the module ``name`` has run for the first time; now, where it has already.

    What ``action`` raises, the import raises.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """Lets the other finders find one module, and adds the action to its loading; then it is gone."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            self._action()

        # On the loader itself, which is this spec's alone: what asks it for source or resources finds all it had.
        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec

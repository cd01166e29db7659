"""Triton's interpreter, as quick as it can be."""

import inspect
from functools import cache
from typing import Any

import pytest

from ulbq.kernels import triton_launch


@pytest.fixture(scope="session", autouse=True)
def _language_looked_over_once() -> None:
    """The interpreter looks at all members of Triton's language for each launch, and for each function in it."""
    if triton_launch.unavailable_reason() or not triton_launch.interpreted():
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch

"""Triton's interpreter, as quick as it can be."""

from dataclasses import replace
from functools import cache
from typing import Any

from ulbq.kernels import triton_launch


def quicken() -> None:
    """Leave out what the interpreter does over and over; most of its time goes there.

    It puts itself in the language's place for each launch and for each function that a kernel calls: once for each
    module that has kernels is enough. It makes a table of all types to look up one. And it computes all sums again in
    64 bits, for assertions that it does not look at.
    """
    if triton_launch.unavailable_reason() or not triton_launch.interpreted():
        return
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set[str]()

    def patch_once(function: Any) -> Any:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to be restored

    interpreter._patch_lang = patch_once
    numpy_type = interpreter._get_np_dtype
    of_scalar = cache(numpy_type)
    interpreter._get_np_dtype = lambda kind: numpy_type(kind) if kind.scalar.is_ptr() else of_scalar(kind.scalar)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "assertions are looked at"
    builder.options = replace(builder.options, sanitize_overflow=False)

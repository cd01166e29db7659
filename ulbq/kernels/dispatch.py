"""Which code multiplies a packed matrix, and why no other: one table, read from the top.

A backend takes a case or tells why it does not. ``dense`` takes all, so there is always an answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ulbq.formats import AnyScheme
from ulbq.kernels import build, columns, humming, int4, tiles, triton_launch, words

Name = Literal["tiles", "columns", "int4", "humming", "triton", "dense"]


class Case(NamedTuple):
    """A product to be made.

    Attributes:
        scheme: the weight's.
        outs, columns: the weight's dimensions.
        device: ``cpu``, ``cuda``, ….
        dtype: of the activations.
        rows: of the activations.
        differentiable: whether a gradient of the activations will be asked for.
    """

    scheme: AnyScheme
    outs: int
    columns: int
    device: str
    dtype: torch.dtype
    rows: int
    differentiable: bool = False


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: of the backend.
        summary: what it does, for people.
        missing: why it is not available on this machine; empty where it is.
        matrix: why it does not take such a matrix: scheme, outputs, columns, device.
        call: why it does not take such activations for a matrix that it takes.
    """

    name: Name
    summary: str
    missing: Callable[[], str]
    matrix: Callable[[AnyScheme, int, int, str], str]
    call: Callable[[Case], str]


class Choice(NamedTuple):
    """The first backend that takes a case, and why each one above it does not."""

    backend: Backend
    passed_over: dict[Name, str]


def choose(case: Case) -> Choice:
    """Which backend makes a product."""
    passed: dict[Name, str] = {}
    for backend in BACKENDS:
        reason = _refusal(backend, case)
        if not reason:
            return Choice(backend, passed)
        passed[backend.name] = reason
    raise AssertionError("dense takes everything")


def layout(scheme: AnyScheme, outs: int, columns: int, device: str) -> Name:
    """The backend whose layout a matrix is brought into when it is made ready: the first that takes it at all."""
    fit = (b.name for b in BACKENDS if not (b.matrix(scheme, outs, columns, device) or b.missing()))
    return next(fit)


def _refusal(backend: Backend, case: Case) -> str:
    return backend.matrix(case.scheme, case.outs, case.columns, case.device) or backend.missing() or backend.call(case)


def _always(*_: object) -> str:
    return ""


def _tiles_matrix(scheme: AnyScheme, outs: int, columns: int, device: str) -> str:
    return f"runs on the CPU, not on {device}" if device != "cpu" else tiles.refusal(scheme, columns)


def _tiles_call(case: Case) -> str:
    if case.dtype not in tiles.FLOATS:
        return f"{_short(case.dtype)} activations: float32, bfloat16 or float16"
    most = tiles.most_rows(case.dtype)
    return f"{case.rows} rows: beyond {most} dense slabs are faster" * (case.rows > most)


def _columns_matrix(scheme: AnyScheme, outs: int, columns_: int, device: str) -> str:
    return f"runs on the CPU, not on {device}" if device != "cpu" else columns.refusal(scheme, outs)


def _columns_call(case: Case) -> str:
    if case.dtype not in tiles.FLOATS:
        return f"{_short(case.dtype)} activations: float32, bfloat16 or float16"
    if columns.takes(case.dtype, case.rows):
        return ""
    return f"{case.rows} rows: beyond {columns.FEW_ROWS} a dense weight is faster"


def _int4_matrix(scheme: AnyScheme, outs: int, columns: int, device: str) -> str:
    return f"runs on the CPU, not on {device}" if device != "cpu" else int4.refusal(scheme, outs)


def _int4_call(case: Case) -> str:
    if case.dtype != torch.bfloat16:
        return f"{_short(case.dtype)} activations: bfloat16 only"
    if case.differentiable:
        return "has no gradient"
    if case.rows > int4.FEW_ROWS:
        return f"{case.rows} rows: beyond {int4.FEW_ROWS} dense slabs are faster"
    return ""


def _humming_matrix(scheme: AnyScheme, outs: int, columns: int, device: str) -> str:
    return f"runs on CUDA GPUs, not on {device}" if device != "cuda" else humming.refusal(scheme, outs, columns)


def _humming_call(case: Case) -> str:
    if case.dtype != torch.bfloat16:
        return f"{_short(case.dtype)} activations: bfloat16 only"
    if case.differentiable:
        return "has no gradient"
    if case.rows <= triton_launch.VECTOR_ROWS:
        return f"{case.rows} rows: up to {triton_launch.VECTOR_ROWS} our kernel for vectors takes them"
    return ""


def _triton_matrix(scheme: AnyScheme, outs: int, columns: int, device: str) -> str:
    return f"runs on CUDA GPUs, not on {device}" if device != "cuda" else words.refusal(scheme)


def _triton_call(case: Case) -> str:
    if case.dtype not in triton_launch.FLOATS:
        return f"{_short(case.dtype)} activations: float32, bfloat16 or float16"
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="tiles",
        summary="our compiled C++: integer dot products with codes in tiles; 1 to 4 bits, affine, dual binary, signs",
        missing=build.failure,
        matrix=_tiles_matrix,
        call=_tiles_call,
    ),
    Backend(
        name="columns",
        summary="our compiled C++: lookups in tables of each column's levels",
        missing=build.failure,
        matrix=_columns_matrix,
        call=_columns_call,
    ),
    Backend(
        name="int4",
        summary="torch's int4 product: affine codes of 1 to 4 bits, bfloat16 activations",
        missing=_always,
        matrix=_int4_matrix,
        call=_int4_call,
    ),
    Backend(
        name="humming",
        summary="Humming, an optional package: affine codes of 1 to 4 bits, bfloat16 activations, batches on CUDA GPUs",
        missing=humming.failure,
        matrix=_humming_matrix,
        call=_humming_call,
    ),
    Backend(
        name="triton",
        summary="our Triton kernels for CUDA GPUs: every format at 1 to 4 bits, vectors and batches",
        missing=triton_launch.failure,
        matrix=_triton_matrix,
        call=_triton_call,
    ),
    Backend(
        name="dense",
        summary="slabs of dense weights, then torch's product: everything, on every device",
        missing=_always,
        matrix=_always,
        call=_always,
    ),
)

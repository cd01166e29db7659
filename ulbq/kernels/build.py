"""Compiles the C++ kernels once for each machine and keeps the library in the user's cache.

There are two libraries: products with packed weights (``cpu/``), written for AVX-512, and the loops of the closed-form
solvers (``portable/``), plain C++ for any processor. Nothing needs them: where one cannot be built, other backends or
torch do the work, and the reason is told by ``ulbq inspect --kernels`` or a note. They have a plain C interface, so
neither torch's headers nor Python's are needed, and share torch's OpenMP threads by linking to the runtime that torch
has loaded.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ulbq.kernels import cache

_LOG = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "cpu"
_PORTABLE = Path(__file__).parent / "portable"
_FLAGS = ("-std=c++17", "-O3", "-w", "-fPIC", "-fopenmp")
# By their names in /proc/cpuinfo; the compiler calls them the same but for the underscores of one.
_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
_PAIRS = "avx512_bf16"  # products of pairs of bfloat16: used where the processor has them, not needed
_FUNNEL = "avx512_vbmi2"  # shifts of two registers as one, likewise
_BYTES = "avx512vbmi"  # permutations of bytes, likewise
# Torch rounds after every operation; a solver that does not would round other weights up.
_EXACT = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
_WIDE = (("avx512f", "avx512bw", "avx512vl", "avx512dq"), ("avx2", "fma"))
"""Vectors for the solvers, the widest first; without either the compiler's default serves."""
_AT, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_MATRIX = (_AT, _INT, _INT, _LONG, _LONG, _AT, _AT, _FLOAT, _LONG)
_PLACED = (_AT, _INT, _LONG, _LONG, _LONG)
_ROUTES = (_AT, _LONG, _AT, _LONG, _LONG)  # jobs and how many, order, places, rows that share an input
_TABLE = (_AT, _INT, _INT, _LONG, _LONG, _FLOAT, _LONG, *_ROUTES)
_TRELLIS = (_AT, _INT, _INT, ctypes.c_uint32, _FLOAT, _FLOAT, _LONG, _LONG)
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ulbq_multiply": (*_MATRIX, _AT, _INT, _LONG, _AT, _INT),
    "ulbq_multiply_each": (*_TABLE, _AT, _INT, _AT, _INT),
    "ulbq_columns_each": (_AT, _LONG, _LONG, _AT, *_ROUTES, _AT, _INT, _AT, _INT),
    "ulbq_trellis_each": (*_TRELLIS, _LONG, _AT, _LONG, _AT, *_ROUTES, _AT, _INT, _INT, _AT, _INT),
    "ulbq_widen": (*_MATRIX, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_to_tiles": (_AT, _INT, _LONG, _LONG, _AT, _LONG, _INT),
    "ulbq_columns": (_AT, _LONG, _LONG, _AT, _AT, _AT, _AT, _AT, _AT, _AT, _INT, _LONG, _AT, _INT),
    "ulbq_from_tiles": (_AT, _INT, _LONG, _LONG, _AT, _LONG, _INT),
    "ulbq_fake_dual_binary": (_AT, _AT, _AT, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_fake_dual_binary_back": (_AT, _AT, _AT, _LONG, _LONG, _AT, _INT, _AT, _AT, _INT),
    "ulbq_fake_affine": (_AT, _AT, _AT, _AT, _FLOAT, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_fake_affine_back": (_AT, _AT, _AT, _AT, _FLOAT, _LONG, _LONG, _AT, _INT, _AT, _AT, _AT, _INT),
    "ulbq_fixed": (_AT, _LONG, _LONG, _LONG, _LONG, _AT, _AT, _AT, _INT, _INT),
    "ulbq_fixed_back": (_AT, _LONG, _LONG, _LONG, _LONG, _AT, _AT, _AT, _INT, _AT, _AT, _INT),
    "ulbq_affine_grid": (_AT, _FLOAT, _FLOAT, _LONG, _AT, _AT),
    "ulbq_affine_grid_back": (_AT, _FLOAT, _FLOAT, _LONG, _AT, _AT, _AT),
    "ulbq_norm": (_AT, _AT, _FLOAT, _LONG, _LONG, _AT, _AT, _AT, _INT),
    "ulbq_norm_back": (_AT, _AT, _AT, _LONG, _LONG, _AT, _AT, _AT, _AT, _INT),
    "ulbq_rotary": (*_PLACED, _AT, _AT, *(_LONG,) * 5, _INT, *_PLACED, _INT),
    "ulbq_multiply_trellis": (*_TRELLIS, _AT, _LONG, _INT, _AT, _INT),
    "ulbq_widen_trellis": (*_TRELLIS, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_turn": (_AT, _INT, _LONG, _LONG, _LONG, _AT, _AT, _AT, _AT, _INT, _INT),
    "ulbq_multiply_bytes": (*(_AT,) * 3, _FLOAT, *(_LONG,) * 3, _AT, _LONG, _AT, _INT),
    "ulbq_bytes_linear": (*(_AT,) * 3, _FLOAT, *(_LONG,) * 3, _AT, _INT, _AT),
    "ulbq_multiply_k_quant": (_INT, _LONG, _LONG, *(_AT,) * 6, _LONG, _AT, _INT),
    "ulbq_k_quant_linear": (_INT, _LONG, _LONG, *(_AT,) * 7),
    "ulbq_tiles_linear": (*_MATRIX, _AT, _INT, _AT),
    "ulbq_signs_linear": (*_MATRIX, *(_AT,) * 5, _LONG, _INT, _INT, _AT),
    "ulbq_columns_linear": (_AT, _LONG, _LONG, *(_AT,) * 8),
    "ulbq_tiled_columns_linear": (_AT, _AT, _AT, _LONG, _LONG, *(_AT,) * 8),
    "ulbq_trellis_linear": (*_TRELLIS, _AT, _AT, _LONG, _AT, _LONG, _AT, _AT, _INT, _AT),
    "ulbq_dense_linear": (_AT, _INT, _LONG, _LONG, _AT, _AT),
    "ulbq_free_linear": (_AT,),
    "ulbq_decode": (*(_AT,) * 8, _INT),
    "ulbq_gate": (_AT, _AT, _LONG, _AT, _INT, _INT),
    "ulbq_gate_back": (_AT, _AT, _AT, _LONG, _AT, _AT, _INT, _INT),
}
_SIGNATURES_OF_PAIRS: dict[str, tuple[type, ...]] = {
    "ulbq_dots": (*_MATRIX, _AT, _LONG, _AT, _INT),
    "ulbq_dots_each": (*_TABLE, _AT, _AT, _INT),
    "ulbq_column_dots_each": (_AT, _LONG, _LONG, _AT, *_ROUTES, _AT, _AT, _INT),
    "ulbq_attend": (*(_AT,) * 5, *(_LONG,) * 5, _FLOAT, _AT, _INT),
    "ulbq_attend_back": (*(_AT,) * 9, *(_LONG,) * 5, _FLOAT, _AT, _INT),
    "ulbq_column_dots": (_AT, _LONG, _LONG, _AT, _AT, _AT, _AT, _AT, _AT, _AT, _LONG, _AT, _INT),
}
_GROUPS = (_AT, _LONG, _FLOAT)  # importance, group size, smallest scale
_SEARCH = (_FLOAT, _FLOAT, _AT, _LONG)  # largest code, centre, factors and how many
_STRIDED = (_AT, _LONG, _LONG, _LONG, _LONG)
_SIGNATURES_OF_SOLVERS: dict[str, tuple[type, ...]] = {
    "ulbq_round_to_nearest": (*_STRIDED, *_GROUPS, *_SEARCH, _AT, _AT, _AT, _AT, _INT),
    "ulbq_search_scales": (*_STRIDED, *_GROUPS, _AT, _LONG, _INT, _AT, _INT),
    "ulbq_compensate": (
        *(_AT, _LONG, _LONG, _AT, _LONG, _AT, _AT, _AT),
        *(*_GROUPS, *_SEARCH),
        *(_AT, _AT, _AT, _AT, _INT),
    ),
    "ulbq_trellis": (_AT, *(_LONG,) * 4, *(_AT,) * 3, _INT),
}
SWITCH = "ULBQ_COMPILE"
"""Set to 0 in the environment, nothing is compiled and nothing compiled is used."""


class UnavailableError(RuntimeError):
    """The library cannot be had here; the message says why, for people."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled first where no earlier process has left it. Raises UnavailableError."""
    if failed := unavailable_reason():
        raise UnavailableError(failed)
    return _load()


@functools.cache
def unavailable_reason() -> str | None:
    """Why :func:`library` cannot give one; None where it can."""
    return _reason(_load)


@functools.cache
def solvers() -> ctypes.CDLL:
    """The loaded library of the solvers, as :func:`library`. Raises UnavailableError."""
    if failed := solvers_unavailable_reason():
        raise UnavailableError(failed)
    return _load_solvers()


@functools.cache
def solvers_unavailable_reason() -> str | None:
    """Why :func:`solvers` cannot give one; None where it can."""
    return _reason(_load_solvers)


def _reason(load: Callable[[], ctypes.CDLL]) -> str | None:
    try:
        load()
    except UnavailableError as error:
        _LOG.info("a compiled library cannot be had: %s", error)
        return str(error)
    return None


@functools.cache
def _load() -> ctypes.CDLL:
    _refuse_if_switched_off()
    if lacking := sorted(set(_NEEDED) - cpu_features()):
        raise UnavailableError(f"this processor has no {', '.join(lacking)}")
    signatures = _SIGNATURES | (_SIGNATURES_OF_PAIRS if has_pairs() else {})
    return _built(_SOURCES, (*_FLAGS, *_target()), signatures)


@functools.cache
def _load_solvers() -> ctypes.CDLL:
    _refuse_if_switched_off()
    wide = next((names for names in _WIDE if cpu_features().issuperset(names)), ())
    return _built(_PORTABLE, (*_FLAGS, *_EXACT, *_switches(wide)), _SIGNATURES_OF_SOLVERS)


def _refuse_if_switched_off() -> None:
    if os.environ.get(SWITCH) == "0":
        raise UnavailableError(f"switched off by {SWITCH}=0")


def _built(sources: Path, flags: tuple[str, ...], signatures: dict[str, tuple[type, ...]]) -> ctypes.CDLL:
    """The library of a folder's sources, from the cache or compiled."""
    compiler = find_compiler()
    if compiler is None:
        raise UnavailableError("no C++ compiler on the path (g++, clang++, or $CXX)")
    key = _key(compiler, sources, flags)
    try:
        path = cache.find(key) or _compile(compiler, sources, flags, key)
    except (OSError, cache.UntrustedError) as error:
        raise UnavailableError(f"the cache of compiled libraries cannot be used ({error})") from error
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"the compiled library does not load ({error})") from error
    for name, arguments in signatures.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = None
    return loaded


def has_pairs() -> bool:
    """Whether the library has the products of pairs of bfloat16 (``cpu/dots.h``)."""
    return _PAIRS in cpu_features()


def looks_up_bytes() -> bool:
    """Whether the library has the products by tables of bytes (``cpu/lookups.h``)."""
    return _BYTES in cpu_features()


@functools.cache
def cpu_features() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty elsewhere, or on another architecture than x86-64."""
    information = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux" or not information.is_file():
        return frozenset()
    lines = information.read_text(encoding="utf-8").splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _target() -> tuple[str, ...]:
    return _switches((*_NEEDED, *(feature for feature in (_PAIRS, _FUNNEL, _BYTES) if feature in cpu_features())))


def _switches(features: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("-m" + feature.replace("_", "") for feature in features)


def find_compiler() -> str | None:
    """Path of ``$CXX``, or of the first C++ compiler found."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _key(compiler: str, sources: Path, flags: tuple[str, ...]) -> str:
    """Hash of everything that decides the library: sources, flags, compiler and torch, whose OpenMP it shares."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    stamp = Path(compiler).resolve().stat()
    facts = (*flags, str(Path(compiler).resolve()), stamp.st_size, stamp.st_mtime_ns, torch.__version__)
    digest.update("\0".join(map(str, facts)).encode())
    return digest.hexdigest()[:32]


def _compile(compiler: str, folder: Path, flags: tuple[str, ...], key: str) -> Path:
    """Build the library beside its final name and move it there, so that no other process sees half of it."""
    place = cache.open_folder()
    _LOG.info("compiling kernels into %s", place)
    # Found first, and already loaded under the same name: one OpenMP runtime in the process, not two.
    runtime = f"-L{Path(torch.__file__).parent / 'lib'}"
    try:
        with tempfile.TemporaryDirectory(dir=place) as unfinished:
            sources = sorted(folder.glob("*.cpp"))
            objects = [str(Path(unfinished) / f"{source.stem}.o") for source in sources]
            # A process for each: the compiler itself uses one core.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = zip(sources, objects, strict=True)
                list(pool.map(lambda job: _run(compiler, *flags, "-c", str(job[0]), "-o", job[1]), jobs))
            made = Path(unfinished) / f"{key}.so"
            _run(compiler, *flags, "-shared", *objects, runtime, "-o", str(made))
            return cache.keep(made, key)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the kernels could not be compiled ({error})") from error


def _run(compiler: str, *arguments: str) -> None:
    """Raises UnavailableError with what the compiler said first."""
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise UnavailableError(f"{compiler} failed: {said}")

"""Compiles the C++ kernels once for each machine and keeps the library in the user's cache.

Nothing needs it: where it cannot be built, other backends do the work, and the reason is told by
``ulbq inspect --kernels``. The library has a plain C interface, so neither torch's headers nor Python's are needed; it
shares torch's OpenMP threads by linking to the runtime that torch has loaded.
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
from pathlib import Path

import torch

_LOG = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ("-std=c++17", "-O3", "-w", "-fPIC", "-shared", "-fopenmp")
# By their names in /proc/cpuinfo; the compiler calls them the same but for the underscores of one.
_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
_PAIRS = "avx512_bf16"  # products of pairs of bfloat16: used where the processor has them, not needed
_AT, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_MATRIX = (_AT, _INT, _INT, _LONG, _LONG, _AT, _AT, _FLOAT, _LONG)
_PLACED = (_AT, _INT, _LONG, _LONG, _LONG)
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ulbq_multiply": (*_MATRIX, _AT, _INT, _LONG, _AT, _INT),
    "ulbq_widen": (*_MATRIX, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_to_tiles": (_AT, _INT, _LONG, _LONG, _AT, _LONG, _INT),
    "ulbq_columns": (_AT, _LONG, _LONG, _AT, _AT, _AT, _AT, _AT, _AT, _AT, _INT, _LONG, _AT, _INT),
    "ulbq_from_tiles": (_AT, _INT, _LONG, _LONG, _AT, _LONG, _INT),
    "ulbq_fake_dual_binary": (_AT, _AT, _AT, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_fake_dual_binary_back": (_AT, _AT, _AT, _LONG, _LONG, _AT, _INT, _AT, _AT, _INT),
    "ulbq_fake_affine": (_AT, _AT, _AT, _AT, _FLOAT, _LONG, _LONG, _AT, _INT, _INT),
    "ulbq_fake_affine_back": (_AT, _AT, _AT, _AT, _FLOAT, _LONG, _LONG, _AT, _INT, _AT, _AT, _AT, _INT),
    "ulbq_affine_grid": (_AT, _FLOAT, _FLOAT, _LONG, _AT, _AT),
    "ulbq_affine_grid_back": (_AT, _FLOAT, _FLOAT, _LONG, _AT, _AT, _AT),
    "ulbq_norm": (_AT, _AT, _FLOAT, _LONG, _LONG, _AT, _AT, _AT, _INT),
    "ulbq_norm_back": (_AT, _AT, _AT, _LONG, _LONG, _AT, _AT, _AT, _AT, _INT),
    "ulbq_rotary": (*_PLACED, _AT, _AT, *(_LONG,) * 5, _INT, *_PLACED, _INT),
    "ulbq_gate": (_AT, _AT, _LONG, _AT, _INT, _INT),
    "ulbq_gate_back": (_AT, _AT, _AT, _LONG, _AT, _AT, _INT, _INT),
}
_SIGNATURES_OF_PAIRS: dict[str, tuple[type, ...]] = {
    "ulbq_dots": (*_MATRIX, _AT, _LONG, _AT, _INT),
    "ulbq_attend": (*(_AT,) * 5, *(_LONG,) * 5, _FLOAT, _AT, _INT),
    "ulbq_attend_back": (*(_AT,) * 9, *(_LONG,) * 5, _FLOAT, _AT, _INT),
    "ulbq_column_dots": (_AT, _LONG, _LONG, _AT, _AT, _AT, _AT, _AT, _AT, _AT, _LONG, _AT, _INT),
}
SWITCH = "ULBQ_COMPILE"
"""Set to 0 in the environment, nothing is compiled and nothing compiled is used."""


class UnavailableError(RuntimeError):
    """The library cannot be had here; the message says why, for people."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled first where no earlier process has left it. Raises UnavailableError."""
    if failed := failure():
        raise UnavailableError(failed)
    return _load()


@functools.cache
def failure() -> str:
    """Why :func:`library` cannot give one; empty where it can."""
    try:
        _load()
    except UnavailableError as error:
        _LOG.info("no compiled kernels: %s", error)
        return str(error)
    return ""


@functools.cache
def _load() -> ctypes.CDLL:
    if os.environ.get(SWITCH) == "0":
        raise UnavailableError(f"switched off by {SWITCH}=0")
    if lacking := sorted(set(_NEEDED) - cpu_features()):
        raise UnavailableError(f"this processor has no {', '.join(lacking)}")
    compiler = find_compiler()
    if compiler is None:
        raise UnavailableError("no C++ compiler on the path (g++, clang++, or $CXX)")
    path = cache_folder() / f"{_key(compiler)}.so"
    if not path.is_file():
        _compile(compiler, path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"the compiled library does not load ({error})") from error
    for name, arguments in (_SIGNATURES | (_SIGNATURES_OF_PAIRS if has_pairs() else {})).items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = None
    return loaded


def has_pairs() -> bool:
    """Whether the library has the products of pairs of bfloat16 (``cpu/dots.h``)."""
    return _PAIRS in cpu_features()


@functools.cache
def cpu_features() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty elsewhere, or on another architecture than x86-64."""
    information = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux" or not information.is_file():
        return frozenset()
    lines = information.read_text(encoding="utf-8").splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _target() -> tuple[str, ...]:
    used = (*_NEEDED, _PAIRS) if has_pairs() else _NEEDED
    return tuple("-m" + feature.replace("_", "") for feature in used)


def find_compiler() -> str | None:
    """Path of ``$CXX``, or of the first C++ compiler found."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``ulbq/kernels`` under the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ulbq" / "kernels"


def _key(compiler: str) -> str:
    """Hash of everything that decides the library: sources, flags, compiler and torch, whose OpenMP it shares."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    stamp = Path(compiler).resolve().stat()
    facts = (*_FLAGS, *_target(), str(Path(compiler).resolve()), stamp.st_size, stamp.st_mtime_ns, torch.__version__)
    digest.update("\0".join(map(str, facts)).encode())
    return digest.hexdigest()[:32]


def _compile(compiler: str, path: Path) -> None:
    """Build the library beside its final name and move it there, so that no other process sees half of it."""
    _LOG.info("compiling kernels into %s", path)
    sources = [str(source) for source in sorted(_SOURCES.glob("*.cpp"))]
    # Found first, and already loaded under the same name: one OpenMP runtime in the process, not two.
    runtime = [f"-L{Path(torch.__file__).parent / 'lib'}"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *_FLAGS, *_target(), *sources, *runtime, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                said = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
                raise UnavailableError(f"{compiler} failed: {said}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the kernels could not be compiled ({error})") from error

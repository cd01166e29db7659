"""Tensors in one or many safetensors files, read one at a time and written whole. No pickle is ever read."""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ulbq import distributed, limits
from ulbq.artifacts.disk import (
    Stamp,
    changed,
    check_unchanged,
    replace_synced,
    sha256_file,
    stamp_of,
    temporary,
    write_atomically,
)
from ulbq.artifacts.small_files import read_json
from ulbq.errors import InputError, ResourceError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
GUARD_NAME = "model-guard.safetensors"

OUTLINE = "ulbq-outline"
"""In the metadata of a safetensors file: it has a header and a size, and no tensors."""

EXPERT = re.compile(r"\.experts\.(\d+)\.\w+$|\.(\d+)\.linear$")
"""The end of the name of a layer that is one of several experts', JetMoe's at last."""

_CARRIED = re.compile(r"model-carried-\d{5}\.safetensors")
_CARRIED_AT_ONCE = 1 << 30  # bytes a shard

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HeaderOnlyError(InputError):
    """A tensor was asked for of which only the header is here."""


class _Stored(NamedTuple):
    """Where a tensor lies, from its file's header.

    Attributes:
        stamp: what the file was known by then.
        begin: where its bytes begin in the file.
        here: whether the file has more than the header, see :data:`OUTLINE`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    stamp: Stamp
    begin: int
    here: bool


class LazyTensors:
    """Tensors of a set of safetensors files by name. Only headers stay in memory; every read opens the file anew.

    Args:
        files: whose headers are read at once.
        sums: SHA-256 of files by name; such a file is hashed, once, before the first tensor of it is given out.

    Attributes:
        guards: names of empty weights of layers that are packed, see :func:`write_guard`.

    Raises:
        InputError: a file is missing, corrupt or truncated, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[Path], sums: Mapping[str, str] = {}) -> None:
        self._stored: dict[str, _Stored] = {}
        self._sums = dict(sums)
        for file in files:
            for name, stored in _header(file).items():
                if name in self._stored:
                    raise InputError(f"'{name}' is both in '{self._stored[name].file}' and in '{file}'.")
                self._stored[name] = stored
        empty = {name for name, stored in self._stored.items() if stored.shape == (0,)}
        self.guards = frozenset(name for name in empty if name.removesuffix(".weight") + ".codes" in self._stored)

    @classmethod
    def folder(cls, path: Path, sums: Mapping[str, str] = {}) -> "LazyTensors":
        """The weights of a model folder: ``model.safetensors``, else what the index names, else every safetensors file.

        Raises:
            InputError: as the constructor, and: no weights, pickle weights only, an index that does not fit its shards.
        """
        if (path / SINGLE_NAME).is_file():
            return cls([path / SINGLE_NAME], sums)
        if (path / INDEX_NAME).is_file():
            return cls._indexed(path, sums)
        files = sorted(path.glob("*.safetensors"))
        if files:
            return cls(files, sums)
        if pickle := next((file for pattern in _PICKLES for file in sorted(path.glob(pattern))), None):
            raise InputError(
                f"The weights in '{path}' are pickled ('{pickle.name}'), and unpickling can run anything.",
                hint="Convert them to safetensors, or take the model's safetensors revision.",
            )
        raise InputError(f"'{path}' holds no weights: there is no safetensors file.")

    @classmethod
    def _indexed(cls, path: Path, sums: Mapping[str, str]) -> "LazyTensors":
        weight_map = _read_index(path / INDEX_NAME)
        tensors = cls((path / file for file in sorted(set(weight_map.values()))), sums)
        for name, file in weight_map.items():
            if name not in tensors._stored or tensors._stored[name].file.name != file:
                raise InputError(
                    f"'{path / INDEX_NAME}' says that '{name}' is in '{file}', and it is not.",
                    hint="The shards belong to another model or were only copied in part: fetch them again.",
                )
        return tensors

    @property
    def names(self) -> frozenset[str]:
        """All tensor names, without the guards."""
        return frozenset(self._stored) - self.guards

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._find(name).file

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        return sorted({self._stored[name].file for name in self.names})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header. Raises InputError for one that torch does not have."""
        stored = self._find(name)
        if stored.dtype not in _DTYPES:
            raise InputError(f"'{name}' in '{stored.file}' has the dtype {stored.dtype}, which ulbq cannot read.")
        return _DTYPES[stored.dtype]

    def nbytes(self, name: str) -> int:
        """Stored size of a tensor in bytes."""
        return self.dtype(name).itemsize * torch.Size(self.shape(name)).numel()

    @property
    def here(self) -> bool:
        """Whether the tensors can be read; else only their headers were fetched."""
        return all(stored.here for stored in self._stored.values())

    @property
    def total_bytes(self) -> int:
        """Stored size of all tensors in bytes."""
        return sum(map(self.nbytes, self._stored))

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU as it is stored, in memory of its own."""
        tensor = torch.empty(self._readable(name).shape, dtype=self.dtype(name))
        self._read_into(name, [(0, tensor)])
        return tensor

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows ``[n, ...]`` of a tensor, as :meth:`read` gives it. Raises IndexError for one that it has not."""
        whole = self._readable(name).shape
        if any(not 0 <= row < whole[0] for row in rows):
            raise IndexError(f"'{name}' has {whole[0]} rows, and others are asked for")
        tensor = torch.empty((len(rows), *whole[1:]), dtype=self.dtype(name))
        if rows and rows == range(rows[0], rows[0] + len(rows)):
            self._read_into(name, [(rows[0] * tensor[0].nbytes, tensor)])
        else:
            self._read_into(name, [(row * part.nbytes, part) for row, part in zip(rows, tensor, strict=True)])
        return tensor

    def rows(self, name: str, shape: Sequence[int]) -> Callable[[Sequence[int]], torch.Tensor] | None:
        """What reads rows of a floating tensor, see :meth:`read_rows`; None where there is none of that shape."""
        found = name in self.names and self.shape(name) == tuple(shape) and self.dtype(name).is_floating_point
        return partial(self.read_rows, name) if found else None

    def _readable(self, name: str) -> _Stored:
        """Where a tensor lies, in a file that is there whole and as it was."""
        stored = self._find(name)
        if not stored.here:
            raise HeaderOnlyError(f"Only the header of '{stored.file.name}' was fetched: it holds no tensors.")
        check_unchanged(stored.file, stored.stamp)
        self._check(stored.file)
        return stored

    def _read_into(self, name: str, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Read a tensor's bytes from some places on, as many as the tensors have that they are read into."""
        stored = self._find(name)
        # Not through safetensors: it maps the whole file, and a mapped file pins pages, dies with the file, and may not
        # be larger than the memory.
        try:
            with stored.file.open("rb", buffering=0) as file:
                for begin, tensor in parts:
                    room = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                    file.seek(stored.begin + begin)
                    while room:
                        count = file.readinto(room)
                        if not count:
                            raise EOFError("it ends too early")
                        room = room[count:]
        except (EOFError, OSError) as error:
            _refuse_scarcity(stored.file)
            raise InputError(f"'{name}' cannot be read from '{stored.file}': {error}.") from error

    def _check(self, file: Path) -> None:
        """Hash a file whose sum is known, the first time. Raises InputError where it is another."""
        wanted = self._sums.pop(file.name, None)
        if wanted is not None and sha256_file(file) != wanted:
            self._sums[file.name] = wanted
            raise changed(file)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise InputError(f"The weights hold no tensor '{name}'.")
        return self._stored[name]


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file; a crash leaves it whole or absent. Equal tensors give equal bytes.

    Of several processes, which hold the same tensors, the first writes and the others wait.

    Raises:
        OSError: as any write does, ``ENOSPC`` for one.
        RuntimeError: two tensors share memory.
    """
    distributed.on_main(store_shard, path, tensors)


def store_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """As :func:`write_shard`, by whichever process calls it: for one that writes while the others do not wait."""
    scratch = temporary(path)
    # safetensors makes its files readable by their owner alone; ours get the permissions that any new file has.
    scratch.touch()
    mode = scratch.stat().st_mode & 0o777
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            scratch,
            metadata={"format": "pt"},
        )
        scratch.chmod(mode)
        replace_synced(scratch, path)
    except SafetensorError as error:
        # It hides the system's error number in its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)


def guarded(linears: Iterable[str]) -> str:
    """The packed layer whose dense weight a guard stands for: no expert, since those lie fused in dense models."""
    return min(linears, key=lambda name: (EXPERT.search(name) is not None, name))


def write_guard(folder: Path, linears: Iterable[str]) -> dict[str, list[str]]:
    """Write a shard that makes a reader fail who does not know packed layers; returns its tensor's name by shard.

    transformers skips a ``quant_method`` that it does not know, and draws the weights that it misses at random. An
    empty dense weight of a packed layer is one that it does not miss, and whose shape it refuses.

    Args:
        linears: names of the packed layers.
    """
    guard = f"{guarded(linears)}.weight"
    write_shard(folder / GUARD_NAME, {guard: torch.empty(0, dtype=torch.bfloat16)})
    return {GUARD_NAME: [guard]}


def is_carried(file: Path) -> bool:
    """Whether a shard holds what its model has no place for, and only carries along."""
    return _CARRIED.fullmatch(file.name) is not None


def write_carried(folder: Path, stored: LazyTensors, names: Iterable[str]) -> dict[str, list[str]]:
    """Copy tensors into shards of their own, as they are stored; returns their names by shard."""
    parts: list[list[str]] = []
    room = 0
    for name in sorted(names):
        size = stored.nbytes(name)
        if not parts or size > room:
            parts.append([])
            room = _CARRIED_AT_ONCE
        parts[-1].append(name)
        room -= size
    shards = {f"model-carried-{number:05d}.safetensors": part for number, part in enumerate(parts, 1)}
    for file, part in shards.items():
        write_shard(folder / file, {name: stored.read(name) for name in part})
    return shards


def write_index(folder: Path, shards: Mapping[str, Sequence[str]]) -> None:
    """Write ``model.safetensors.index.json``.

    Args:
        folder: where the shards lie already.
        shards: tensor names by shard file name.

    Raises:
        InputError: a shard is missing or corrupt, holds other tensors than ``shards`` says, or shares one with another.
    """
    twice = [name for name, times in Counter(name for names in shards.values() for name in names).items() if times > 1]
    if twice:
        raise InputError(f"'{twice[0]}' would be stored twice.")
    weight_map: dict[str, str] = {}
    total = 0
    for file, names in shards.items():
        tensors = LazyTensors([folder / file])
        if odd := tensors.names.symmetric_difference(names):
            raise InputError(f"'{folder / file}' does not hold what it should: '{min(odd)}' is missing or too many.")
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensors.nbytes(name) for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())


def _header(file: Path) -> dict[str, _Stored]:
    try:
        # safetensors has one word for a file that is missing and one that may not be read.
        with file.open("rb") as plain:
            stamp = stamp_of(plain.fileno())
            # Checks the header. For torch it would map the file as its own, which memory must have room for.
            with safe_open(file, framework="np") as checked:
                here = OUTLINE not in (checked.metadata() or {})
            size = int.from_bytes(plain.read(8), "little")
            entries = json.loads(plain.read(size))
        entries.pop("__metadata__", None)
        return {
            name: _Stored(file, tuple(one["shape"]), one["dtype"], stamp, 8 + size + one["data_offsets"][0], here)
            for name, one in entries.items()
        }
    except PermissionError as error:
        raise InputError(
            f"'{file}' may not be read: {error.strerror}.", hint="Ask its owner, or change its permissions."
        ) from error
    except FileNotFoundError as error:
        _refuse_scarcity(file)
        raise InputError(
            f"'{file}' is missing.", hint="The model was only copied or fetched in part: fetch it again."
        ) from error
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        _refuse_scarcity(file)
        raise InputError(
            f"'{file}' is not a whole safetensors file: {error}.",
            hint="The file is corrupt or truncated: fetch it again.",
        ) from error


def _refuse_scarcity(file: Path) -> None:
    """Raise ResourceError where a file cannot be opened for lack of descriptors or memory: it is neither lost nor cut.

    safetensors calls such a file missing; the system itself is asked what is wrong.
    """
    lacking = {errno.EMFILE: "few descriptors of files", errno.ENFILE: "few descriptors of files"}
    lacking[errno.ENOMEM] = "little memory"
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in lacking:
            what = lacking[error.errno]
            raise ResourceError(f"This process is granted too {what}.", hint="See 'ulimit -a'.") from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = read_json(path, limits.INDEX_SIZE)
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is corrupt: {error}.", hint="Fetch it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"'{path}' has no 'weight_map'.", hint="Fetch it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"'{path}' puts '{name}' outside the model's folder.")
    return weight_map

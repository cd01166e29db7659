"""Tensors in one or many safetensors files, read one at a time and written whole. No pickle is ever read."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ulbq import distributed
from ulbq.artifacts.disk import replace_synced, temporary, write_atomically
from ulbq.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Stored(NamedTuple):
    """Where a tensor lies, from its file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class LazyTensors:
    """Tensors of a set of safetensors files by name. Only headers stay in memory; every read opens the file anew.

    Args:
        files: whose headers are read at once.

    Raises:
        InputError: a file is missing, corrupt or truncated, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._stored: dict[str, _Stored] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in self._stored:
                    raise InputError(f"'{name}' is both in '{self._stored[name].file}' and in '{file}'.")
                self._stored[name] = stored

    @classmethod
    def folder(cls, path: Path) -> "LazyTensors":
        """The weights of a model folder: ``model.safetensors``, else what the index names, else every safetensors file.

        Raises:
            InputError: as the constructor, and: no weights, pickle weights only, an index that does not fit its shards.
        """
        if (path / SINGLE_NAME).is_file():
            return cls([path / SINGLE_NAME])
        if (path / INDEX_NAME).is_file():
            return cls._indexed(path)
        files = sorted(path.glob("*.safetensors"))
        if files:
            return cls(files)
        if pickle := next((file for pattern in _PICKLES for file in sorted(path.glob(pattern))), None):
            raise InputError(
                f"The weights in '{path}' are pickled ('{pickle.name}'), and unpickling can run anything.",
                hint="Convert them to safetensors, or take the model's safetensors revision.",
            )
        raise InputError(f"'{path}' holds no weights: there is no safetensors file.")

    @classmethod
    def _indexed(cls, path: Path) -> "LazyTensors":
        weight_map = _read_index(path / INDEX_NAME)
        tensors = cls(path / file for file in sorted(set(weight_map.values())))
        for name, file in weight_map.items():
            if name not in tensors._stored or tensors._stored[name].file.name != file:
                raise InputError(
                    f"'{path / INDEX_NAME}' says that '{name}' is in '{file}', and it is not.",
                    hint="The shards belong to another model or were only copied in part: fetch them again.",
                )
        return tensors

    @property
    def names(self) -> frozenset[str]:
        """All tensor names."""
        return frozenset(self._stored)

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        return sorted({stored.file for stored in self._stored.values()})

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

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU as it is stored, in memory of its own."""
        stored = self._find(name)
        self.dtype(name)
        try:
            with safe_open(stored.file, framework="pt") as file:
                # What safetensors returns is mapped from the file: it pins the file's pages, and dies with the file.
                tensor: torch.Tensor = file.get_tensor(name).clone()
                return tensor
        except (SafetensorError, OSError) as error:
            raise InputError(f"'{name}' cannot be read from '{stored.file}': {error}.") from error

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
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return {name: _Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise InputError(
            f"'{file}' is missing.", hint="The model was only copied or fetched in part: fetch it again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"'{file}' is not a whole safetensors file: {error}.",
            hint="The file is corrupt or truncated: fetch it again.",
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is corrupt: {error}.", hint="Fetch it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"'{path}' has no 'weight_map'.", hint="Fetch it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"'{path}' puts '{name}' outside the model's folder.")
    return weight_map

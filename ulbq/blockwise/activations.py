"""Activations of calibration samples between two blocks, in memory or on disk."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ulbq.artifacts.disk import writing

CPU = torch.device("cpu")
Hidden = torch.Tensor
"""Hidden states ``[batch, length, hidden]``."""


class ActivationStore:
    """A float tensor ``[samples, length, hidden]``, in memory up to a limit and in a memory-mapped file beyond it.

    Args:
        shape: ``(samples, length, hidden)``.
        dtype: of the stored values.
        limit: bytes that may stay in memory.
        directory: where the file lies if there has to be one; it has no name there, so that nothing is left behind.

    Raises:
        ResourceError: the disk has no room for the file.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, limit: int, directory: Path) -> None:
        self.shape = shape
        self.dtype = dtype
        self._limit = limit
        self._directory = directory
        self._map: mmap.mmap | None = None
        if self.nbytes <= limit:
            self._tensor = torch.empty(shape, dtype=dtype)
        else:
            self._map = _mapped_file(directory, self.nbytes)
            self._tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def in_memory(self) -> bool:
        """Whether the values are in memory rather than in a file."""
        return self._map is None

    def __len__(self) -> int:
        return self.shape[0]

    def get(self, indices: slice | Sequence[int] | torch.Tensor, device: torch.device = CPU) -> Hidden:
        """Copy of some samples ``[n, length, hidden]`` on a device.

        To a GPU they go from pinned memory, and nobody waits for them: the next ones are read while it computes.
        """
        rows = self._tensor[indices]
        # A slice is a view, and later calls of set() must not show in it; lists of indices copy by themselves.
        if device.type == "cuda":
            taken = rows.pin_memory().to(device, non_blocking=True)
        else:
            taken = rows.clone() if isinstance(indices, slice) else rows
        self._release()
        return taken

    def set(self, start: int, values: Hidden) -> None:
        """Overwrite the samples from ``start`` on with ``[n, length, hidden]`` of any device and float dtype."""
        self._tensor[start : start + len(values)].copy_(values.detach())
        self._release()

    def copy(self) -> "ActivationStore":
        """A store of its own with the same values, limit and directory."""
        other = ActivationStore(self.shape, self.dtype, limit=self._limit, directory=self._directory)
        for start in range(len(self)):
            other.set(start, self.get(slice(start, start + 1)))
        return other

    def alike(self, length: int, width: int) -> "ActivationStore":
        """An empty store for as many samples of ``[length, width]``, with the same dtype, limit and directory."""
        shape = (len(self), length, width)
        return ActivationStore(shape, self.dtype, limit=self._limit, directory=self._directory)

    def _release(self) -> None:
        # The file's pages stay in the system's cache, which gives way under pressure, but leave our resident memory.
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_file(directory: Path, size: int) -> mmap.mmap:
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            # Reserved now: a full disk must be an error here, not a bus error at some later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)

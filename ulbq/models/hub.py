"""Fetches a model's files from the Hugging Face Hub into the local cache."""

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
    XetDownloadError,
)

# The HTTP library under the Hub client has changed its name before; its error is always to be had here.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]
from huggingface_hub.utils import SafetensorsFileMetadata  # type: ignore[attr-defined]

from ulbq.artifacts.names import component
from ulbq.artifacts.shards import OUTLINE, LazyTensors
from ulbq.errors import InputError, ResourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
_WANTED = [*_SMALL, "*.safetensors"]
# Subfolders hold other formats of the same weights, and so does Mistral's consolidated file. Only further chat
# templates are wanted: the patterns are all that a folder can be called that does not begin like theirs.
_UNWANTED = ["?/*", "??/*", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` could name a repository: ``name`` or ``owner/name``, where no folder ``owner`` lies here."""
    if not _HUB_ID.fullmatch(text) or ".." in text or text.endswith((".gguf", ".safetensors", ".json")):
        return False
    return "/" not in text or not Path(text).parent.is_dir()


def download(repo_id: str, *, offline: bool) -> Path:
    """The folder of the model's newest snapshot; with ``offline``, of the one in the local cache.

    Raises:
        InputError: no such model, or one that asks for a log-in.
        ResourceError: the Hub cannot be reached and the cache does not hold the model.
    """
    with _reaching(repo_id, offline):
        return Path(
            snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=offline)
        )


def outline(repo_id: str, *, offline: bool) -> Path:
    """The same for those who read no tensor: of weights that are not here only the headers are fetched.

    Returns:
        The snapshot's folder where it is whole; else one that lasts as long as this process, with safetensors files
        that have their header and size, and take no room on the disk. :class:`LazyTensors` gives no tensor of them.

    Raises:
        InputError, ResourceError: as :func:`download`.
    """
    if offline:
        return download(repo_id, offline=True)
    with _reaching(repo_id, offline):
        small = Path(snapshot_download(repo_id, allow_patterns=_SMALL, ignore_patterns=_UNWANTED))
        try:
            LazyTensors.folder(small)
        except InputError:  # a shard is missing
            return _outlined(repo_id, small)
        return small


@cache
def _outlined(repo_id: str, small: Path) -> Path:
    """A folder with a snapshot's small files, and with the outlines of its weights."""
    try:
        found = get_safetensors_metadata(repo_id, revision=small.name)
    except (SafetensorsParsingError, TypeError, AttributeError) as error:
        raise _unreadable(repo_id, error) from error
    except NotASafetensorsRepoError:  # :func:`download` says what there is instead
        return download(repo_id, offline=False)
    folder = tempfile.TemporaryDirectory(prefix="ulbq-")
    _OUTLINES.append(folder)
    place = Path(folder.name)
    for file in small.rglob("*"):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _SMALL):
            (place / file.relative_to(small)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place / file.relative_to(small))
    try:
        for name, header in found.files_metadata.items():
            _write_outline(place / component(name), header)
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise _unreadable(repo_id, error) from error
    return place


def _unreadable(repo_id: str, error: Exception) -> InputError:
    return InputError(f"A weight file of '{repo_id}' has no header that can be read: {error}.")


_MOST = 1 << 43  # bytes of a file that disks have room for the size of

_OUTLINES: list["tempfile.TemporaryDirectory[str]"] = []
"""Removed when the process ends."""


def _write_outline(file: Path, header: SafetensorsFileMetadata) -> None:
    tensors = {
        name: {"dtype": one.dtype, "shape": one.shape, "data_offsets": one.data_offsets}
        for name, one in header.tensors.items()
    }
    text = json.dumps({"__metadata__": {OUTLINE: "true"}, **tensors}).encode()
    end = max((one.data_offsets[1] for one in header.tensors.values()), default=0)
    if not 0 <= end < _MOST:
        raise ValueError(f"it says {end} bytes")
    with file.open("xb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.truncate(8 + len(text) + end)


@contextmanager
def _reaching(repo_id: str, offline: bool) -> Iterator[None]:
    """Say in our words what may go wrong on the way."""
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"The model '{repo_id}' is gated.",
            hint=f"Accept its terms at https://huggingface.co/{repo_id} and log in with `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"'{repo_id}' is neither a file or folder here nor a model on the Hugging Face Hub.",
            hint="Check the spelling; a private model needs `hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline:
            hint = "Run without `offline` once, or give a local folder or GGUF file."
        else:
            hint = "Check the network (and HF_HUB_OFFLINE), or give a local folder or GGUF file."
        raise ResourceError(
            f"'{repo_id}' is no file or folder here, the local Hub cache does not hold it, "
            + ("and `offline` forbids to fetch it." if offline else "and the Hub cannot be reached."),
            hint=hint,
        ) from error
    except (NetworkError, XetDownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ResourceError(
            f"Fetching '{repo_id}' from the Hugging Face Hub failed: {error}",
            hint="Run the same command again: finished files are kept.",
        ) from error

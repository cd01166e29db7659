"""Rows from the local Hub cache, which never touches the network, and from the Hub, which does."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ulbq.data.files import Row, read_rows
from ulbq.errors import InputError, ResourceError

# What the Hub client's HTTP library raises on a lost connection; which library that is changes with its version.
_NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__mro__[1])

_ABSENT = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)

_TIMEOUT = 5.0  # seconds that a look at the Hub may take before it counts as out of reach


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set on the Hub.

    Attributes:
        id: the repository, such as ``allenai/c4``.
        config: the configuration, None for the only one.
        split: the split's name.
        file: read this file of the repository alone (one shard of a huge set), whatever the card says.
        revision: branch or commit; None for ``main``.
        streamed: read over the network as far as needed, nothing kept, instead of fetched whole into the cache.
    """

    id: str
    config: str | None
    split: str
    file: str | None = None
    revision: str | None = None
    streamed: bool = False

    def __str__(self) -> str:
        return f"{self.id}{f' ({self.config})' if self.config else ''}, split '{self.split}'"


def cache_folders() -> tuple[str, str]:
    """Where the Hub client keeps files and where ``datasets`` keeps prepared tables."""
    return constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", str(Path(constants.HF_HOME) / "datasets"))


def offline_by_environment() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    return bool(constants.HF_HUB_OFFLINE)


def cached_rows(wanted: HubSplit) -> Iterable[Row] | None:
    """Rows of a split that this machine fetched before; None where it did not."""
    if wanted.file is not None:
        path = try_to_load_from_cache(wanted.id, wanted.file, revision=wanted.revision, repo_type="dataset")
        return read_rows(Path(path)) if isinstance(path, str) else None
    prepared = _prepared_rows(wanted)
    return prepared if prepared is not None else _snapshot_rows(wanted)


def _prepared_rows(wanted: HubSplit) -> Iterable[Row] | None:
    """The table that an earlier ``load_dataset`` prepared, the newest of its configuration.

    It lies in ``owner___name/configuration/version/hash``, in one file or several, with capitals told by underscores.
    """
    try:
        import datasets

        root = Path(datasets.config.HF_DATASETS_CACHE)
        prepared = [
            place for place in root.glob(f"*/{wanted.config or '*'}/*/*") if place.is_dir() and not place.suffix
        ]
        places = [place for place in prepared if _letters(place.parts[-4]) == _letters(wanted.id)]
        if len({place.parts[-3] for place in places}) != 1:  # none, or nobody said which configuration
            return None
        newest = max(places, key=lambda place: place.stat().st_mtime)
        files = sorted(newest.glob(f"*-{wanted.split}.arrow")) or sorted(newest.glob(f"*-{wanted.split}-*-of-*.arrow"))
        rows: Iterable[Row] = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    except (ImportError, OSError, ValueError):  # no datasets here; no such split, or a broken table
        return None
    return rows


def _letters(name: str) -> str:
    return re.sub(r"[_/]", "", name).lower()


def _snapshot_rows(wanted: HubSplit) -> Iterable[Row] | None:
    """The repository's own files, where those that the split needs were downloaded (``hf download``)."""
    try:
        from datasets import load_dataset

        folder = snapshot_download(wanted.id, repo_type="dataset", revision=wanted.revision, local_files_only=True)
        rows: Iterable[Row] = load_dataset(folder, wanted.config, split=wanted.split, streaming=True)
    except (ImportError, OSError, ValueError):
        return None
    return rows


def fetch_rows(wanted: HubSplit) -> Iterator[Row]:
    """Rows of a split from the Hub, kept in the cache unless they are streamed.

    Raises:
        InputError: the Hub has no such data set, configuration or split.
        ResourceError: the Hub cannot be reached (which may show only on the way), or ``datasets`` is not installed.
    """
    try:
        # Asked first because what follows would retry for half a minute before it gave up on a lost network.
        HfApi().dataset_info(wanted.id, timeout=_TIMEOUT)
        if wanted.file is not None and not wanted.streamed:
            return read_rows(
                Path(hf_hub_download(wanted.id, wanted.file, repo_type="dataset", revision=wanted.revision))
            )
        rows = _load(wanted)
    except (*_ABSENT, ValueError, RuntimeError) as error:
        raise _absent(wanted, error) from error
    except _NETWORK_ERRORS as error:
        raise _unreachable(wanted, error) from error
    return _watched(wanted, rows)


def _load(wanted: HubSplit) -> Iterable[Row]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise ResourceError(f"Fetching {wanted} needs the package datasets.", hint="pip install datasets") from error
    selection: dict[str, Any] = {"name": wanted.config}
    if wanted.file is not None:
        selection = {"data_files": {wanted.split: wanted.file}}
    try:
        rows: Iterable[Row] = load_dataset(
            wanted.id, split=wanted.split, revision=wanted.revision, streaming=wanted.streamed, **selection
        )
    except DatasetNotFoundError as error:
        raise _absent(wanted, error) from error
    return rows


def reachable(dataset_id: str) -> bool:
    """Whether the Hub answers for a data set, within seconds."""
    try:
        HfApi().dataset_info(dataset_id, timeout=_TIMEOUT)
    except _NETWORK_ERRORS:
        return False
    return True


def _watched(wanted: HubSplit, rows: Iterable[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except _NETWORK_ERRORS as error:
        raise _unreachable(wanted, error) from error


def _absent(wanted: HubSplit, error: Exception) -> InputError:
    return InputError(f"The Hub has no usable {wanted} ({error}).", hint="If it is gated, log in first.")


def _unreachable(wanted: HubSplit, error: BaseException) -> ResourceError:
    return ResourceError(f"{wanted} could not be fetched from the Hub ({error}).", hint="Check the network.")

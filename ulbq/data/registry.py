"""The named text sets, and where any data set's rows come from.

The order for every data set: the mirror (``--data-dir`` or ``ULBQ_DATA_DIR``), the local Hub cache, the Hub.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ulbq.data import hub
from ulbq.data.files import Row, read_rows
from ulbq.data.hub import HubSplit
from ulbq.data.mirror import data_root, mirror_file
from ulbq.errors import InputError, ResourceError, UsageError

Role = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class TextSet:
    """A text set by its short name.

    Attributes:
        id: repository on the Hub.
        config: configuration there, None for the only one.
        splits: the Hub's split for each role; a role that is missing has no text.
        columns: what a row's text is joined from, empty ones left out.
        files: for a split, the one file of the repository to read: a shard of a huge set.
        revision: branch of the repository; None for ``main``.
        endless: too large to read whole; read in order, as far as needed, and streamed from the Hub.
    """

    id: str
    config: str | None
    splits: Mapping[Role, str]
    columns: tuple[str, ...] = ("text",)
    files: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    endless: bool = False


TEXT_SETS: Mapping[str, TextSet] = MappingProxyType(
    {
        "wikitext2": TextSet(
            "Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "validation": "validation", "test": "test"}
        ),
        "c4": TextSet(
            "allenai/c4",
            "en",
            {"train": "train", "validation": "validation", "test": "validation"},
            files={
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
            endless=True,
        ),
        # The repository itself holds a loading script, which datasets 4 and later refuse; the Hub's own Parquet
        # conversion of it does not.
        "ptb": TextSet(
            "ptb-text-only/ptb_text_only",
            "penn_treebank",
            {"train": "train", "validation": "validation", "test": "test"},
            columns=("sentence",),
            files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")},
            revision="refs/convert/parquet",
        ),
        # The Pile's first 10,000 documents: what AutoRound calibrates on. A shard of the whole takes 10 GB.
        "pile": TextSet("NeelNanda/pile-10k", None, {"train": "train"}),
        # RedPajama's own sample is a loading script and at times unavailable. SlimPajama is RedPajama cleaned
        # and deduplicated; this is a sample of it, already mixed over the sources.
        "redpajama": TextSet(
            "DKYoon/SlimPajama-6B",
            None,
            {"train": "train"},
            files={"train": "data/train-00000-of-00048-ab2b35705f029d94.parquet"},
            endless=True,
        ),
        # Not its column "text": that repeats the same forty words of preamble in every row.
        "alpaca": TextSet("tatsu-lab/alpaca", None, {"train": "train"}, columns=("instruction", "input", "output")),
    }
)


def text_set(name: str) -> TextSet:
    """The set of that name. Raises UsageError, with the names that come close, where there is none."""
    if name not in TEXT_SETS:
        close = difflib.get_close_matches(name, TEXT_SETS) or list(TEXT_SETS)
        raise UsageError(f"There is no text set '{name}'.", hint=f"Try {', '.join(close)}.")
    return TEXT_SETS[name]


def texts(name: str, role: Role, *, data_dir: Path | None = None, offline: bool = False) -> Iterator[str]:
    """Texts of a named set, in order and read lazily, one a row; empty ones too (WikiText separates paragraphs so).

    Args:
        name: a key of :data:`TEXT_SETS`.
        role: ``train`` to calibrate on, ``test`` to measure on (for C4 that is its validation split).
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.

    Raises:
        UsageError: no such set, or it has no text for that role.
        InputError: a broken file, or rows without the set's columns.
        ResourceError: the set cannot be had here; says where it was looked for.
    """
    chosen = text_set(name)
    rows = _resolve(_hub_split(name, role), data_dir, offline)
    return _joined(rows, chosen.columns, name)


def available(name: str, role: Role = "train", *, data_dir: Path | None = None, offline: bool = False) -> bool:
    """Whether :func:`texts` would find the set; the Hub is asked only if not ``offline``, for a few seconds at most."""
    wanted = _hub_split(name, role)
    if mirror_file(data_root(data_dir), wanted.id, wanted.config, wanted.split) or hub.cached_rows(wanted) is not None:
        return True
    return not offline and not hub.offline_by_environment() and hub.reachable(wanted.id)


def resolve_dataset(
    dataset_id: str, config: str | None, split: str, *, data_dir: Path | None = None, offline: bool = False
) -> Iterable[Row]:
    """Rows of any data set, by its Hub id.

    Args:
        dataset_id: such as ``allenai/openbookqa``.
        config: configuration, None for the only one.
        split: the split's name.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.

    Raises:
        InputError: a broken file, or the Hub has no such set.
        ResourceError: not in the mirror, not in the cache, and the Hub is out of reach or forbidden.
    """
    return _resolve(HubSplit(dataset_id, config, split), data_dir, offline)


def check_at_hand(wanted: str, role: Role = "train", *, data_dir: Path | None = None, offline: bool = False) -> None:
    """Refuse a named set that cannot be had without the network where that is off; else the network is not asked.

    Raises:
        UsageError: no such set, or it has no text for that role.
        InputError: a data folder was named and is not there.
        ResourceError: the set is neither in the mirror nor in the caches.
    """
    check_dataset_at_hand(_hub_split(wanted, role), data_dir, offline)


def check_dataset_at_hand(wanted: HubSplit, data_dir: Path | None, offline: bool) -> None:
    """The same of any data set. Raises InputError, ResourceError."""
    root = data_root(data_dir)
    if mirror_file(root, wanted.id, wanted.config, wanted.split) is not None:
        return
    if (offline or hub.offline_by_environment()) and hub.cached_rows(wanted) is None:
        raise _nowhere(wanted, root, "the network is off")


def _hub_split(name: str, role: Role) -> HubSplit:
    chosen = text_set(name)
    if role not in chosen.splits:
        raise UsageError(f"'{name}' has no {role} text.", hint=f"It has {', '.join(chosen.splits)}.")
    split = chosen.splits[role]
    return HubSplit(chosen.id, chosen.config, split, chosen.files.get(split), chosen.revision, chosen.endless)


def _resolve(wanted: HubSplit, data_dir: Path | None, offline: bool) -> Iterable[Row]:
    root = data_root(data_dir)
    file = mirror_file(root, wanted.id, wanted.config, wanted.split)
    if file is not None:
        return read_rows(file)
    cached = hub.cached_rows(wanted)
    if cached is not None:
        return cached
    if offline or hub.offline_by_environment():
        raise _nowhere(wanted, root, "the network is off")
    try:
        return hub.fetch_rows(wanted)
    except ResourceError as error:
        raise _nowhere(wanted, root, error.message) from error


def _nowhere(wanted: HubSplit, root: Path | None, reason: str) -> ResourceError:
    places = f"the mirror {root or '(none given)'}, the caches {' and '.join(hub.cache_folders())}, the Hub ({reason})"
    return ResourceError(
        f"{wanted} was found nowhere. Looked in {places}.", hint="Give a mirror with `data_dir` or ULBQ_DATA_DIR."
    )


def _joined(rows: Iterable[Row], columns: tuple[str, ...], name: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if any(row.get(column, 0) is None for column in columns):
            continue
        missing = [column for column in columns if not isinstance(row.get(column), str)]
        if missing:
            raise InputError(
                f"{name}, row {number}: no text in column '{missing[0]}'.",
                hint="The mirror's file must have the columns of the Hub's version.",
            )
        yield "\n\n".join(row[column] for column in columns if row[column])

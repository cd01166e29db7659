"""A folder laid out like the Hub: ``<root>/<dataset id>/[<config>/]<split>.jsonl`` (or ``.parquet``).

With such a mirror no data set needs the network. A dataset card (``README.md`` with ``configs``) inside
``<root>/<dataset id>`` makes the same folder loadable by ``datasets.load_dataset``, and so by lm-eval.
"""

import os
from pathlib import Path

from ulbq.data.files import ROW_SUFFIXES
from ulbq.errors import InputError

VARIABLE = "ULBQ_DATA_DIR"


def data_root(option: Path | None = None) -> Path | None:
    """The mirror's folder: the option, else ``ULBQ_DATA_DIR``, else None.

    Raises:
        InputError: a folder was named and is not there.
    """
    named = option or (Path(value) if (value := os.environ.get(VARIABLE)) else None)
    if named is not None and not named.is_dir():
        origin = "`data_dir`" if option else VARIABLE
        raise InputError(f"There is no data folder {named}.", hint=f"Check {origin}.")
    return named


def mirror_file(root: Path | None, dataset_id: str, config: str | None, split: str) -> Path | None:
    """The file that holds one split, or None where the mirror has none."""
    if root is None:
        return None
    folder = root / dataset_id / config if config else root / dataset_id
    files = (folder / f"{split}{suffix}" for suffix in ROW_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def local_dataset_path(dataset_id: str, data_dir: Path | None = None) -> str | None:
    """What to hand ``datasets.load_dataset`` instead of the id where the mirror has that data set, else None."""
    root = data_root(data_dir)
    folder = root / dataset_id if root else None
    return str(folder) if folder and folder.is_dir() else None

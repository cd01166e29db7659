"""Where lm-eval's tasks read their data: the mirror where it has the set, else what ``datasets`` finds.

A task names its data set by a Hub id in its YAML file. For the tasks of one run, that entry is replaced by a YAML file
of our own which includes the original and points at the mirror's files; nothing of lm-eval is patched.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ulbq.data.mirror import data_root, local_dataset_path, mirror_file
from ulbq.errors import InputError

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_SCORED = ("validation_split", "test_split")


def member_tasks(index: Mapping[str, Any], name: str) -> set[str]:
    """Names of the tasks that a task, tag or group of lm-eval's index stands for, itself included if it is one."""
    entry = index.get(name)
    if entry is None:
        return set()
    if entry.tags and entry.yaml_path is None:
        return {member for tag in entry.tags for member in member_tasks(index, tag)}
    children = (entry.cfg or {}).get("task")
    if not isinstance(children, list):
        return {name}
    named = (child if isinstance(child, str) else child.get("task") or child.get("group") for child in children)
    return {member for child in named if isinstance(child, str) for member in member_tasks(index, child)}


@contextmanager
def mirrored(index: dict[str, Any], names: set[str], data_dir: Path | None, folder: Path) -> Iterator[None]:
    """Within the body, tasks of lm-eval's index whose data the mirror has read it there.

    Args:
        index: lm-eval's, changed in place and restored.
        names: of the tasks.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        folder: an empty folder for our YAML files.

    Raises:
        InputError: the mirror has a task's data set, but no split of it that can be scored.
    """
    original = {name: index[name] for name in names}
    root = data_root(data_dir)
    try:
        for number, (name, entry) in enumerate(sorted(original.items())):
            changes = _changes(name, entry.cfg or {}, root) if root and entry.yaml_path else None
            if changes:
                path = folder / f"{number}.yaml"
                # JSON is YAML.
                path.write_text(json.dumps({"include": str(entry.yaml_path), **changes}), encoding="utf-8")
                index[name] = replace(entry, yaml_path=path)
        yield
    finally:
        index.update(original)


def _changes(name: str, config: Mapping[str, Any], root: Path) -> dict[str, Any] | None:
    """What to set in a task's configuration; None where the mirror does not have its data set."""
    dataset_id = config.get("dataset_path")
    if not isinstance(dataset_id, str):
        return None
    wanted = {key: config[key] for key in _SPLITS if isinstance(config.get(key), str)}
    files = {split: mirror_file(root, dataset_id, config.get("dataset_name"), split) for split in wanted.values()}
    found = {split: os.path.abspath(file) for split, file in files.items() if file is not None}
    if not found:
        folder = local_dataset_path(dataset_id, root)
        return {"dataset_path": os.path.abspath(folder)} if folder else None
    if not any(wanted.get(key) in found for key in _SCORED):
        raise InputError(
            f"The mirror {root} has '{dataset_id}', but no split of it that task '{name}' is scored on.",
            hint=f"Add {' or '.join(str(wanted[key]) for key in _SCORED if key in wanted)} to it.",
        )
    builder = "parquet" if all(file.endswith(".parquet") for file in found.values()) else "json"
    # A split that the mirror lacks is one that the task does without: few-shot examples then come from another.
    missing: dict[str, Any] = {key: None for key, split in wanted.items() if split not in found}
    return {"dataset_path": builder, "dataset_kwargs": {"data_files": found}, **missing}

"""States of a training run on disk, as safetensors and JSON: of its optimizer, its schedule and its generators."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulbq.artifacts.disk import write_atomically
from ulbq.artifacts.shards import LazyTensors, store_shard
from ulbq.errors import InputError

_HINT = "Discard the unfinished run with --force."


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Write the state of an optimizer and of its learning-rate schedule into a folder."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, own in state["state"].items() for name, value in own.items()}
    store_shard(folder / "optimizer.safetensors", tensors)
    _write(folder / "optimizer.json", {"groups": state["param_groups"], "schedule": schedule.state_dict()})


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Read what :func:`save_optimizer` wrote. Raises InputError where it is missing or damaged."""
    stored = LazyTensors([folder / "optimizer.safetensors"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name in stored.names:
        index, _, short = name.partition(".")
        state.setdefault(int(index), {})[short] = stored.read(name)
    noted = _read(folder / "optimizer.json", {"groups", "schedule"})
    groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in noted["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule.load_state_dict(noted["schedule"])


def save_generators(folder: Path, number: int) -> None:
    """Write the states of Python's, numpy's and torch's generators, those of process ``number``, into a folder."""
    python, arrays = random.getstate(), np.random.get_state(legacy=False)
    inner = arrays["state"]
    tensors = {
        "python": torch.tensor(python[1]),
        "numpy": torch.from_numpy(inner["key"].astype(np.int64)),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    folder.mkdir(parents=True, exist_ok=True)
    store_shard(folder / f"generators-{number}.safetensors", tensors)
    rest = {
        "python": [python[0], python[2]],
        "numpy": [arrays["bit_generator"], inner["pos"], arrays["has_gauss"], arrays["gauss"]],
    }
    _write(folder / f"generators-{number}.json", rest)


def load_generators(folder: Path, number: int) -> None:
    """Bring all generators back into the states that :func:`save_generators` wrote. Raises InputError."""
    stored = LazyTensors([folder / f"generators-{number}.safetensors"])
    rest = _read(folder / f"generators-{number}.json", {"python", "numpy"})
    version, gauss = rest["python"]
    random.setstate((version, tuple(stored.read("python").tolist()), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    inner = {"key": stored.read("numpy").numpy().astype(np.uint32), "pos": position}
    np.random.set_state({"bit_generator": name, "state": inner, "has_gauss": has_gauss, "gauss": cached})
    torch.set_rng_state(stored.read("cpu"))
    if "cuda" in stored.names and torch.cuda.is_available():
        torch.cuda.set_rng_state(stored.read("cuda"))


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value).encode())


def _read(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read: {error}.", hint=_HINT) from error
    if not isinstance(value, dict) or value.keys() != keys:
        raise InputError(f"'{path}' is damaged.", hint=_HINT)
    return value

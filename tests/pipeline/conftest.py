"""Fixtures of whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.config.quantize import QuantizeRequest
from ulbq.pipeline.quantize import quantize

Asked = Callable[..., QuantizeRequest]
"""From a source, an output, samples and options to a request."""
Quantized = Callable[..., tuple[Path, QuantizedManifest]]
"""From a function that makes a request, and options, to what comes of it."""


def _save_samples(folder: Path) -> Path:
    path = folder / "tokens.safetensors"
    tokens = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, path)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Token samples in a file, so that no data set is needed."""
    return _save_samples(tmp_path)


@pytest.fixture(scope="session")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Gives what a request on the tiny Llama makes of the usual samples. It is made once: to be read, not changed."""
    made: dict[str, tuple[Path, QuantizedManifest]] = {}

    def find(asked: Asked, **changes: Any) -> tuple[Path, QuantizedManifest]:
        key = f"{asked.__module__} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized")
            made[key] = quantize(asked(tiny_llama, folder / "q", _save_samples(folder), **changes))
        return made[key]

    return find

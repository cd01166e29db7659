"""Fixtures of whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Token samples in a file, so that no data set is needed."""
    path = tmp_path / "tokens.safetensors"
    tokens = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, path)
    return path

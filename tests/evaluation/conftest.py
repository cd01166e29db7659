from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.evaluation.sample import write_mirror
from tests.models.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """A tiny Llama."""
    return tiny_model(tiny_config("llama", tied=False))


@pytest.fixture(scope="session")
def other_model() -> PreTrainedModel:
    """Another tiny Llama, of the same shape."""
    return tiny_model(tiny_config("llama", tied=False), seed=1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with a few rows of each data set."""
    return write_mirror(tmp_path_factory.mktemp("mirror"))

"""Kernels are interpreted where there is no GPU."""

import pytest

from tests.interpreted import quicken


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    quicken()

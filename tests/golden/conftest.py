"""The command line, as a stranger's files meet it."""

from tests.strangers.conftest import ulbq  # noqa: F401 - a fixture

"""The campaign's processes, its world, and the table that it ends with. ``make fuzz`` runs it."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.pool import Pool
from tests.campaign.table import Table

_TABLE = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, default=None, help="Write the campaign's table to this file.")
    parser.addoption("--zygotes", type=int, default=None, help="Processes that trials are forked from.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, Table())
    if table.rows:
        terminalreporter.write_line(table.markdown())
    path = config.getoption("--table", None)
    if path is not None and not terminalreporter.stats.get("failed") and not terminalreporter.stats.get("error"):
        table.write(path)


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash.setdefault(_TABLE, Table())


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Pool]:
    if shutil.which("cc") is None:
        pytest.skip("counting calls takes a C compiler")
    pool = Pool(tmp_path_factory.mktemp("zygotes"), request.config.getoption("--zygotes", None))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def world(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model, data, and an artifact of every kind."""
    world = tmp_path_factory.mktemp("world")
    pool.ask("world:build", world=str(world))
    return str(world)


class Campaign:
    """Trials of one kind after another; faults are gathered, and told all at once."""

    def __init__(self, pool: Pool, table: Table) -> None:
        self.pool = pool
        self._table = table
        self.faults: list[str] = []

    def run(
        self,
        fault: str,
        subject: str,
        scenario: str,
        trials: Iterable[Mapping[str, Any]],
        possible: int | None = None,
    ) -> list[Any]:
        """Do trials, and put their outcomes into the table; gives what they gave."""
        results = []
        for arguments, result in self.pool.each(scenario, trials):
            outcomes = result if isinstance(result, list) else [result]
            if isinstance(result, Exception):
                self.faults.append(f"{fault}, {subject}, {dict(arguments)}:\n{result}")
                outcomes = ["**faulty**"]
            elif isinstance(result, dict):
                outcomes = [f"{reader} {outcome}" for reader, outcome in result.items()]
            results.append(result)
            self._table.add(fault, subject, outcomes, possible)
        return results


@pytest.fixture
def campaign(pool: Pool, table: Table) -> Iterator[Campaign]:
    found = Campaign(pool, table)
    yield found
    shown = "\n\n".join(found.faults[:5])
    assert not found.faults, f"{len(found.faults)} faults, the first of them:\n{shown}"

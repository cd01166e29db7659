"""What the campaign stands on: forked commands do what real ones do, and calls go wrong where they are to."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.conftest import Campaign
from tests.campaign.outcome import content
from tests.campaign.pool import ROOT
from tests.campaign.process import FAIL, KILL, TEAR, Fault, command
from tests.campaign.world import COMMANDS, OUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def forked(folder: str, words: list[str], mode: int = 0, at: int = -1, error: int = 0) -> tuple[int, str, str]:
    """Scenario: one command as any trial runs it."""
    place = Path(folder) / "forked"
    place.mkdir(exist_ok=True)
    told = command(words, place, Fault(mode, at, error) if mode else None)
    return told.code, told.out, told.err


def writing(folder: str, mode: int, at: int, error: int = 0) -> tuple[int, list[str], int]:
    """Scenario: a child that opens, writes, closes and renames a file; its end, what lies there, and its size."""
    import ctypes

    place = Path(folder) / "written"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).campaign_arm(mode, ctypes.c_long(at), error, os.fsencode(place), -1)
        try:
            number = os.open(place / "a", os.O_CREAT | os.O_WRONLY)
            os.write(number, b"0" * 1000)
            os.close(number)
            os.rename(place / "a", place / "b")
        except OSError as failed:
            os._exit(failed.errno or 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = sorted(path.name for path in place.iterdir())
    return code, found, sum((place / name).stat().st_size for name in found)


@pytest.mark.parametrize(
    ("mode", "at", "error", "told"),
    [
        (KILL, 0, 0, (-signal.SIGKILL, [], 0)),
        (KILL, 1, 0, (-signal.SIGKILL, ["a"], 0)),
        (TEAR, 1, 0, (-signal.SIGKILL, ["a"], 500)),
        (KILL, 3, 0, (-signal.SIGKILL, ["a"], 1000)),
        (KILL, 4, 0, (0, ["b"], 1000)),
        (FAIL, 1, errno.ENOSPC, (errno.ENOSPC, ["a"], 0)),
        (FAIL, 2, errno.EIO, (errno.EIO, ["a"], 1000)),
    ],
)
def test_a_call_goes_wrong(
    mode: int, at: int, error: int, told: tuple[int, list[str], int], campaign: Campaign
) -> None:
    found = campaign.pool.ask("test_processes:writing", mode=mode, at=at, error=error)
    assert tuple(found) == told


def test_a_forked_command_does_what_a_real_one_does(world: str, campaign: Campaign, tmp_path: Path) -> None:
    words = COMMANDS["quantize db-llm, end to end"].spelled(Path(world), tmp_path / OUT)
    for asked in (words, words, ["inspect", str(tmp_path / "nothing")], ["quantize", "--bits", "x"]):
        told = campaign.pool.ask("test_processes:forked", words=asked)
        made = content(tmp_path / OUT)
        if asked is words and told[0] == 0:
            (tmp_path / OUT).rename(tmp_path / "first")
        real = subprocess.run(
            [sys.executable, "-m", "ulbq", *asked],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert [real.returncode, real.stdout, real.stderr] == told
        assert content(tmp_path / OUT) == made

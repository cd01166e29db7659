"""Runs that are killed: in the middle of their work, and at each single disk operation."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts.sample import check_hashes, quantized, tree
from ulbq.artifacts import ArtifactWriter, is_artifact, read_manifest
from ulbq.errors import InputError

FINGERPRINT = "a" * 64
REPOSITORY = Path(__file__).resolve().parents[2]
OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def run(
    out: Path, *, steps: int = 2, force: bool = False, after_step: Callable[[int], object] = lambda step: None
) -> Path:
    """A run whose steps each write a file and depend on the step before."""
    with ArtifactWriter(out, FINGERPRINT, force=force) as writer:
        state = 1
        for step in range(steps):
            key = f"step-{step}"
            if key not in writer.journal:
                file = writer.path / f"{key}.bin"
                file.write_bytes(bytes([state]) * 1000)
                writer.record(key, state * 3 % 251, files=[file])
                after_step(step)
            state = writer.journal[key]
        # A fixed time, so that two runs of it can be compared byte by byte.
        return writer.finish(quantized(created="2026-01-01T00:00:00.000000Z", versions={}))


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    return tree(run(tmp_path / "expected" / "q"))


CHILD = """
import sys, time
from pathlib import Path
from tests.artifacts.test_store_crash import run

def after_step(step):
    print(step, flush=True)
    if step == 0:
        time.sleep(60)

run(Path(sys.argv[1]), after_step=after_step)
"""


def test_a_killed_process_frees_its_lock_and_is_resumed_to_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "q"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "0\n"
        with pytest.raises(InputError, match="Another process is writing"):
            run(out)
        with pytest.raises(InputError, match="is not finished yet"):
            read_manifest(out)
    finally:
        child.kill()
        child.wait()
    done: list[int] = []
    run(out, after_step=done.append)
    assert done == [1]
    assert tree(out) == expected
    assert sorted(os.listdir(tmp_path)) == ["expected", "q"]


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a child process that SIGKILL hits as it begins its ``operation``-th disk operation.

    Returns whether it was hit; False says that it ended before.
    """
    child = os.fork()
    if child == 0:
        try:
            _arm(operation)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _arm(operation: int) -> None:
    left = operation

    def armed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, armed(getattr(os, name)))
    io.open = armed(io.open)


def test_a_run_killed_anywhere_is_resumed_to_the_same_bytes(tmp_path: Path, expected: dict[str, bytes]) -> None:
    operation = 0
    out = tmp_path / "0" / "q"
    while killed_at(operation, partial(run, out)):
        if is_artifact(out):
            check_hashes(out)
            with pytest.raises(InputError, match="q' exists"):
                run(out)
        else:
            run(out)
            assert os.listdir(out.parent) == ["q"]
        # After the rename into place, the leftovers of the run may lie in the folder; they are no part of the artifact.
        left = tree(out)
        for name in (".journal.jsonl", ".lock"):
            left.pop(name, None)
        assert left == expected, f"killed at operation {operation}"
        operation += 1
        out = tmp_path / str(operation) / "q"
    assert operation > 30
    assert tree(out) == expected


def test_a_replacement_killed_anywhere_keeps_the_old_or_the_new(tmp_path: Path, expected: dict[str, bytes]) -> None:
    old = tree(run(tmp_path / "old" / "q", steps=1))
    operation = 0
    while True:
        out = tmp_path / str(operation) / "q"
        shutil.copytree(tmp_path / "old", out.parent)
        if not killed_at(operation, partial(run, out, force=True)):
            break
        standing = [folder for folder in (out, out.with_name(".q.replaced")) if is_artifact(folder)]
        for folder in standing[:1]:
            check_hashes(folder)
        assert standing, f"killed at operation {operation}: the old artifact is lost"
        if not out.exists():
            # Whatever starts next, even a run that may not replace it, finds the old artifact back in its place.
            with pytest.raises(InputError, match="q' exists"):
                run(out)
            assert tree(out) == old
        run(out, force=True)
        assert tree(out) == expected, f"killed at operation {operation}"
        assert os.listdir(out.parent) == ["q"]
        operation += 1
    assert operation > 30
    assert tree(out) == expected


FULL_DISK = """
import os, sys
from pathlib import Path
import torch
from tests.artifacts.sample import check_hashes, quantized, tree
from ulbq.artifacts import ArtifactWriter
from ulbq.artifacts.shards import write_shard
from ulbq.errors import ResourceError

out = Path(sys.argv[1]) / "q"

def run():
    with ArtifactWriter(out, "a" * 64) as writer:
        for block in range(4):
            if str(block) not in writer.journal:
                shard = writer.path / f"block-{block}.safetensors"
                write_shard(shard, {"codes": torch.full((40_000,), block, dtype=torch.uint8)})
                writer.record(str(block), block, files=[shard])
        return writer.finish(quantized())

ballast = out.with_name("ballast")
ballast.write_bytes(b"0" * 100_000)
try:
    run()
except ResourceError as error:
    print(error.message)
kept = sorted(name for name in tree(out.with_name("q.partial")) if not name.startswith(".lock"))
print(kept)
ballast.unlink()
run()
check_hashes(out)
print(sorted(tree(out)))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=200k none {tmp_path}"
    script = tmp_path.with_suffix(".py")
    script.write_text(FULL_DISK)
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        possible = subprocess.run([*namespace, mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("mounting a small disk in a namespace of its own is not possible here")
    result = subprocess.run(
        [*namespace, f"{mount} && exec {sys.executable} {script} {tmp_path}"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    message, kept, finished = result.stdout.splitlines()
    assert message.startswith("The disk is full: ")
    assert kept == "['.journal.jsonl', 'block-0.safetensors', 'block-1.safetensors']"
    shards = [f"block-{block}.safetensors" for block in range(4)]
    assert finished == str([*shards, "manifest.json"])

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts.sample import FILES, check_hashes, edit, quantized, tree, write_artifact, write_files
from ulbq.artifacts import ArtifactWriter, BlockRecord, fingerprint, free_output, journal, read_manifest, store
from ulbq.errors import DiskFullError, InputError, ResourceError

MINE = "a" * 64
OTHERS = "b" * 64


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "q"


def stop(
    out: Path,
    error: BaseException,
    *,
    fingerprint: str = MINE,
    force: bool = False,
    files: Mapping[str, bytes] = FILES,
    value: Any = 1,
    record: bool = True,
) -> None:
    """A run that writes files, notes that as the step ``first`` (or does not), and stops with an error."""
    with ArtifactWriter(out, fingerprint, force=force) as writer:
        paths = write_files(writer.path, files)
        if record:
            writer.record("first", value, files=paths)
        raise error


def interrupt(out: Path, fingerprint: str = MINE, files: Mapping[str, bytes] = FILES, value: Any = 1) -> None:
    """A run that a person interrupts after its first step."""
    with pytest.raises(KeyboardInterrupt):
        stop(out, KeyboardInterrupt(), fingerprint=fingerprint, files=files, value=value)


def complete(out: Path, before_finish: Callable[[], object] = lambda: None) -> None:
    """A run of one step that finishes."""
    with ArtifactWriter(out, MINE) as writer:
        writer.record("first", 1, files=write_files(writer.path))
        before_finish()
        writer.finish(quantized())


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


class TestFinish:
    def test_leaves_the_files_and_the_manifest_and_nothing_else(self, out: Path) -> None:
        with ArtifactWriter(out, MINE) as writer:
            assert writer.path == partial(out)
            assert not writer.resumed
            (writer.scratch / "activations.bin").write_bytes(b"0" * 99)
            writer.record("step", 1, files=write_files(writer.path))
            assert writer.finish(quantized()) == out
        assert tree(out).keys() == {*FILES, "manifest.json"}
        assert os.listdir(out.parent) == ["q"]
        assert read_manifest(out).fingerprint == MINE
        check_hashes(out)

    def test_returns_the_path_as_it_was_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with ArtifactWriter(Path("q"), MINE) as writer:
            monkeypatch.chdir("/")
            assert writer.finish(quantized()) == Path("q")
        assert read_manifest(tmp_path / "q").files == {}

    def test_fills_an_empty_folder(self, out: Path) -> None:
        out.mkdir(parents=True)
        write_artifact(out)
        check_hashes(out)
        assert tree(out).keys() == {*FILES, "manifest.json"}

    def test_follows_a_link_to_another_place(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "q").symlink_to(tmp_path / "disk" / "q")
        write_artifact(tmp_path / "q")
        assert read_manifest(tmp_path / "disk" / "q") == read_manifest(tmp_path / "q")

    def test_files_are_on_the_disk_before_their_step_is_noted(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[tuple[str, bool]] = []

        def sync(path: Path) -> None:
            synced.append((path.name, "step" in (partial(out) / ".journal.jsonl").read_text()))

        with ArtifactWriter(out, MINE) as writer:
            paths = write_files(writer.path)
            monkeypatch.setattr(store, "sync", sync)
            writer.record("step", 1, files=paths)
        names = {"config.json", "model.safetensors", "adapter.safetensors", "adapter", "q.partial"}
        assert set(synced) == {(name, False) for name in names}


class TestStop:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), SystemExit(3)], ids=repr)
    def test_with_no_step_done_leaves_no_trace(self, out: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            stop(out, error, record=False)
        assert not out.parent.exists()

    def test_removes_no_folder_that_was_there_or_is_used(self, out: Path) -> None:
        out.parent.mkdir()
        with ArtifactWriter(out, MINE):
            pass
        assert os.listdir(out.parent) == []
        deep = out / "a" / "b"
        with ArtifactWriter(deep, MINE):
            (out / "used").touch()
        assert os.listdir(out) == ["used"]

    def test_with_a_step_done_is_resumed(self, out: Path) -> None:
        value = {"block": BlockRecord(index=0, start_error=2, end_error=1, steps=8, seconds=0.5), "shape": (2, 3)}
        interrupt(out, value=value, files={**FILES, ".scratch/activations.bin": b"0"})
        assert not out.exists()
        with ArtifactWriter(out, MINE) as writer:
            assert writer.resumed
            assert writer.journal.keys() == {"first"}
            assert BlockRecord(**writer.journal["first"]["block"]) == value["block"]
            assert writer.journal["first"]["shape"] == [2, 3]
            assert (writer.scratch / "activations.bin").exists()
            writer.record("second", 2)
            writer.finish(quantized())
        assert tree(out).keys() == {*FILES, "manifest.json"}

    def test_a_resumed_run_that_stops_again_loses_nothing(self, out: Path) -> None:
        interrupt(out, value={"loss": 0.5})
        with pytest.raises(ValueError, match="again"):
            stop(out, ValueError("again"), files={}, record=False)
        with ArtifactWriter(out, MINE) as writer:
            assert writer.journal == {"first": {"loss": 0.5}}
            assert tree(partial(out)).keys() >= FILES.keys()

    def test_half_written_files_of_a_killed_run_do_not_get_into_the_artifact(self, out: Path) -> None:
        interrupt(out)
        write_files(partial(out), {".tmpX1yZ": b"half", "adapter/.tmp-adapter.safetensors": b"half"})
        complete(out)
        assert tree(out).keys() == {*FILES, "manifest.json"}

    def test_a_run_killed_before_its_journal_began_starts_anew(self, out: Path) -> None:
        write_files(partial(out), {".lock": b"", ".journal.jsonl": b'{"journal": 1, "finge', "stray.bin": b"?"})
        with ArtifactWriter(out, MINE) as writer:
            assert not writer.resumed
            writer.finish(quantized())
        assert tree(out).keys() == {"manifest.json"}


class TestAnotherRun:
    def test_is_not_mixed_with_this_one(self, out: Path) -> None:
        interrupt(out, OTHERS)
        before = tree(partial(out))
        with pytest.raises(InputError, match=r"q\.partial' holds another run") as caught:
            ArtifactWriter(out, MINE)
        assert "`force=True`" in caught.value.hint
        assert tree(partial(out)) == before

    def test_is_discarded_by_force(self, out: Path) -> None:
        interrupt(out, OTHERS, files={"theirs.bin": b"1", "sub/theirs.bin": b"2"})
        with ArtifactWriter(out, MINE, force=True) as writer:
            assert not writer.resumed
            assert writer.journal == {}
            writer.finish(quantized())
        assert tree(out).keys() == {"manifest.json"}

    def test_force_resumes_its_own(self, out: Path) -> None:
        interrupt(out)
        with ArtifactWriter(out, MINE, force=True) as writer:
            assert writer.resumed

    def test_a_damaged_journal_is_discarded_only_by_force(self, out: Path) -> None:
        interrupt(out)
        file = partial(out) / ".journal.jsonl"
        file.write_bytes(b"scribble\n" + file.read_bytes())
        with pytest.raises(InputError, match="damaged in line 1"):
            ArtifactWriter(out, MINE)
        assert tree(partial(out)).keys() >= FILES.keys()
        with ArtifactWriter(out, MINE, force=True) as writer:
            assert not writer.resumed

    def test_at_the_same_time_is_refused(self, out: Path) -> None:
        with ArtifactWriter(out, MINE) as writer:
            writer.record("step", 1)
            for force in (False, True):
                with pytest.raises(InputError, match="Another process is writing"):
                    ArtifactWriter(out, MINE, force=force)
            writer.finish(quantized())
        check_hashes(out)

    def test_may_start_when_the_first_gave_up(self, out: Path) -> None:
        with ArtifactWriter(out, MINE):
            pass
        with ArtifactWriter(out, OTHERS) as writer:
            writer.finish(quantized())
        assert read_manifest(out).fingerprint == OTHERS
        assert os.listdir(out.parent) == [out.name]

    def test_that_gave_up_while_this_one_reached_for_the_lock(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flock = fcntl.flock

        def flock_late(descriptor: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", flock)
            shutil.rmtree(partial(out))
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock_late)
        with ArtifactWriter(out, MINE) as writer:
            assert (writer.path / ".lock").exists()
            with pytest.raises(InputError, match="Another process is writing"):
                ArtifactWriter(out, MINE)
            writer.finish(quantized())
        check_hashes(out)

    def test_that_was_quicker_to_the_lock_keeps_it(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flock = fcntl.flock
        quicker: list[ArtifactWriter] = []

        def flock_late(descriptor: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", flock)
            shutil.rmtree(partial(out))
            quicker.append(ArtifactWriter(out, OTHERS))
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock_late)
        with pytest.raises(InputError, match="Another process is writing"):
            ArtifactWriter(out, MINE)
        with quicker[0] as writer:
            writer.finish(quantized())
        assert read_manifest(out).fingerprint == OTHERS

    def test_that_finished_between_two_looks_is_seen(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        acquire = store.acquire

        def acquire_late(folder: Path, shown: Path) -> int:
            monkeypatch.setattr(store, "acquire", acquire)
            write_artifact(out)
            return acquire(folder, shown)

        monkeypatch.setattr(store, "acquire", acquire_late)
        with pytest.raises(InputError, match="exists"):
            ArtifactWriter(out, MINE)
        assert os.listdir(out.parent) == ["q"]


class TestOccupiedOutput:
    def test_an_artifact_is_not_overwritten(self, out: Path) -> None:
        write_artifact(out)
        before = tree(out)
        with pytest.raises(InputError, match="q' exists") as caught:
            ArtifactWriter(out, MINE)
        assert "`force=True`" in caught.value.hint
        assert tree(out) == before
        assert os.listdir(out.parent) == ["q"]

    def test_force_swaps_the_old_for_the_complete_new(self, out: Path) -> None:
        write_artifact(out, files={"old.bin": b"old"})
        with ArtifactWriter(out, MINE, force=True) as writer:
            write_files(writer.path, {"new.bin": b"new"})
            writer.plan("new.bin")
            assert (out / "old.bin").exists()
            writer.finish(quantized())
        assert tree(out).keys() == {"new.bin", "manifest.json"}
        assert os.listdir(out.parent) == ["q"]

    @pytest.mark.parametrize("source", ["q", "q/inside"])
    def test_force_does_not_replace_what_the_run_works_on(self, out: Path, source: str) -> None:
        write_artifact(out)
        before = tree(out)
        with pytest.raises(InputError, match="works on"):
            ArtifactWriter(out, MINE, force=True, spare=[out.parent / source])
        assert tree(out) == before
        assert os.listdir(out.parent) == ["q"]

    def test_a_forced_run_that_fails_keeps_the_old(self, out: Path) -> None:
        write_artifact(out)
        before = tree(out)
        with pytest.raises(ValueError, match="failed"):
            stop(out, ValueError("failed"), force=True, record=False)
        assert tree(out) == before
        assert os.listdir(out.parent) == ["q"]

    def test_a_failing_rename_puts_the_old_back(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_artifact(out)
        before = tree(out)
        rename = os.rename

        def fail_for_partial(source: Path, target: Path) -> None:
            if Path(source).name == "q.partial":
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        with ArtifactWriter(out, MINE, force=True) as writer:
            writer.record("step", 1, files=write_files(writer.path, {"new.bin": b"new"}))
            monkeypatch.setattr(os, "rename", fail_for_partial)
            with pytest.raises(ResourceError, match="Input/output error"):
                writer.finish(quantized())
            monkeypatch.undo()
        assert tree(out) == before
        with ArtifactWriter(out, MINE, force=True) as writer:
            assert writer.resumed
            writer.finish(quantized())
        assert "new.bin" in tree(out)

    def test_force_never_replaces_what_is_not_an_artifact(self, out: Path) -> None:
        write_files(out.parent, {"thesis/chapter.tex": b"", "file": b"", "app/manifest.json": b'{"name": "app"}'})
        write_artifact(out)
        (out / "manifest.json").write_text("{")
        before = tree(out.parent)
        for name, what in {"thesis": "a folder", "file": "a file", "app": "a folder", "q": "a folder"}.items():
            with pytest.raises(InputError, match=f"{name}' exists and is {what}"):
                ArtifactWriter(out.parent / name, MINE, force=True)
        with pytest.raises(InputError, match="'/' exists and is a folder"):
            ArtifactWriter(Path("/"), MINE, force=True)
        assert tree(out.parent) == before

    def test_force_replaces_an_artifact_that_this_version_cannot_read(self, out: Path) -> None:
        write_artifact(out)
        edit(out, lambda data: data.update(schema_version=7), reseal=True)
        with pytest.raises(InputError):
            read_manifest(out)
        write_artifact(out, force=True)
        check_hashes(out)
        assert read_manifest(out).fingerprint == "f" * 64

    def test_a_foreign_folder_named_like_a_partial_one_is_left_alone(self, out: Path) -> None:
        write_files(partial(out), {"notes.txt": b"mine"})
        for force in (False, True):
            with pytest.raises(InputError, match=r"q\.partial' is in the way"):
                ArtifactWriter(out, MINE, force=force)
        assert tree(partial(out)) == {"notes.txt": b"mine"}
        (out.parent / "p.partial").touch()
        with pytest.raises(InputError, match=r"p\.partial' is in the way"):
            ArtifactWriter(out.parent / "p", MINE)

    def test_what_appears_during_the_run_is_not_replaced(self, out: Path) -> None:
        with pytest.raises(InputError, match="exists and is a folder"):
            complete(out, before_finish=lambda: write_files(out, {"chapter.tex": b"mine"}))
        assert tree(out) == {"chapter.tex": b"mine"}
        (out / "chapter.tex").unlink()
        with ArtifactWriter(out, MINE) as writer:
            assert writer.resumed
            writer.finish(quantized())
        check_hashes(out)

    def test_what_appears_in_the_last_moment_is_not_replaced(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rename = os.rename

        def rename_late(source: Path, target: Path) -> None:
            write_files(out, {"chapter.tex": b"mine"})
            rename(source, target)

        monkeypatch.setattr(os, "rename", rename_late)
        with pytest.raises(InputError, match="appeared during the run"):
            complete(out)
        assert tree(out) == {"chapter.tex": b"mine"}
        assert partial(out).is_dir()


class TestDisk:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_full(self, out: Path, number: int) -> None:
        with pytest.raises(ResourceError, match="disk is full") as caught:
            stop(out, OSError(number, os.strerror(number)))
        assert caught.value.exit_code == 3
        assert "run the same command again" in caught.value.hint
        assert partial(out).is_dir()

    def test_full_in_the_words_of_numpy(self, out: Path) -> None:
        with pytest.raises(DiskFullError, match="The disk is full: No space left on device"):
            stop(out, OSError("65536 requested and 1856 written"))

    def test_full_before_the_first_step_leaves_no_trace(self, out: Path) -> None:
        with pytest.raises(ResourceError, match="disk is full"):
            stop(out, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), record=False)
        assert not out.parent.exists()

    def test_full_from_the_very_start_leaves_no_trace(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(journal, "sync", fail)
        with pytest.raises(ResourceError, match="disk is full"):
            ArtifactWriter(out, MINE)
        assert not out.parent.exists()

    def test_other_errors_of_the_run_pass_as_they_are(self, out: Path) -> None:
        with pytest.raises(FileNotFoundError), ArtifactWriter(out, MINE):
            (out / "nowhere").read_bytes()

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
    def test_that_may_not_be_written(self, out: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(ResourceError, match=f"artifacts/q' cannot be written: {os.strerror(number)}"):
            ArtifactWriter(out, MINE)

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(ResourceError, match="cannot be written: File name too long"):
            ArtifactWriter(tmp_path / ("q" * 300), MINE)

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for out in (tmp_path / "file" / "q", tmp_path / "file" / "deep" / "q"):
            with pytest.raises(InputError, match="there is a file in the way") as caught:
                ArtifactWriter(out, MINE)
            assert caught.value.hint == "Give another `out`."


class TestFingerprint:
    def test_knows_content_and_not_order(self) -> None:
        parts = {"seed": 0, "source": "ab", "request": quantized().bits, "path": Path("q")}
        assert fingerprint(parts) == fingerprint(dict(reversed(parts.items())))
        assert fingerprint(parts) != fingerprint({**parts, "seed": 1})

    def test_is_the_hash_of_canonical_json(self) -> None:
        # printf '{"a":[1,2.5,"x"],"b":null}' | sha256sum
        golden = "ebeb83367f9695ff5ceeebf14323134c890fc30c03843f006fdfd18fcb15957f"
        assert fingerprint({"b": None, "a": (1, 2.5, "x")}) == golden

    @pytest.mark.parametrize("value", [{"a", "b"}, object(), b"bytes"])
    def test_takes_no_value_without_one_text(self, value: object) -> None:
        with pytest.raises(TypeError):
            fingerprint({"value": value})


class TestFreeOutput:
    def test_counts_on_from_what_is_occupied(self, tmp_path: Path) -> None:
        root = tmp_path / "artifacts"
        assert free_output(root, "tiny", MINE) == root / "tiny"
        write_artifact(root / "tiny")
        assert free_output(root, "tiny", MINE) == root / "tiny-2"
        write_files(root / "tiny-2", {"chapter.tex": b""})
        (root / "tiny-3").touch()
        (root / "tiny-4").mkdir()
        assert free_output(root, "tiny", MINE) == root / "tiny-4"

    def test_returns_to_its_own_unfinished_run_only(self, tmp_path: Path) -> None:
        interrupt(tmp_path / "tiny", OTHERS)
        interrupt(tmp_path / "tiny-2", MINE)
        assert free_output(tmp_path, "tiny", OTHERS) == tmp_path / "tiny"
        assert free_output(tmp_path, "tiny", MINE) == tmp_path / "tiny-2"
        assert free_output(tmp_path, "tiny", "c" * 64) == tmp_path / "tiny-3"

    def test_passes_over_partial_folders_that_cannot_be_used(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"tiny.partial/notes.txt": b"", "tiny-2.partial/.journal.jsonl": b"scribble\n{}\n"})
        assert free_output(tmp_path, "tiny", MINE) == tmp_path / "tiny-3"

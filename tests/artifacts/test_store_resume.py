"""What an interrupted run left is taken over as it was written, or not at all; and nothing else is."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.artifacts.sample import check_hashes, quantized, tree, write_files
from ulbq.artifacts import ArtifactWriter, read_manifest, store
from ulbq.errors import InputError

MINE = "a" * 64
FILES = {"model-0.bin": b"block 0", "adapter/a.bin": b"low rank", ".scratch/state.bin": b"state"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "q"


def stop_after(out: Path, work: Callable[[ArtifactWriter], object], error: type[BaseException] = ValueError) -> None:
    """A run that does something and fails."""

    def run() -> None:
        with ArtifactWriter(out, MINE) as writer:
            work(writer)
            raise ValueError("stop")

    with pytest.raises(error):
        run()


@pytest.fixture
def partial(out: Path) -> Path:
    """An unfinished run of two steps, the first of which wrote files."""

    def work(writer: ArtifactWriter) -> None:
        writer.record("first", 0.25, files=write_files(writer.path, FILES))
        writer.record("second", 2)

    stop_after(out, work)
    return out.with_name("q.partial")


def complete(out: Path, *, force: bool = False) -> Path:
    with ArtifactWriter(out, MINE, force=force) as writer:
        if "first" not in writer.journal:
            writer.record("first", 0.25, files=write_files(writer.path, FILES))
        write_files(writer.path, {"README.md": b"card"})
        writer.plan("README.md")
        return writer.finish(quantized())


class TestTakenOver:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_a_damaged_file_is_refused_by_name(self, out: Path, partial: Path, name: str, damage: str) -> None:
        file = partial / name
        data = file.read_bytes()
        if damage == "remove":
            file.unlink()
        else:
            file.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 4, *data[1:]]))
        with pytest.raises(InputError, match=name) as caught:
            complete(out)
        assert "`force=True`" in caught.value.hint
        check_hashes(complete(out, force=True))

    def test_every_flipped_bit_of_the_journal_is_noticed(self, out: Path, partial: Path) -> None:
        journal = partial / ".journal.jsonl"
        whole = journal.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        kept = shutil.copytree(partial, out.with_name("kept"))
        for at in range(0, len(whole), 3):
            shutil.rmtree(partial)
            shutil.copytree(kept, partial)
            journal.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
            if whole[at : at + 1] == b"\n" and at + 1 >= last:
                continue  # two lines become one: torn off, and done once more
            if at < last:
                with pytest.raises(InputError, match=r"damaged in line|another run"):
                    ArtifactWriter(out, MINE)
            else:
                with ArtifactWriter(out, MINE) as writer:
                    assert writer.journal == {"first": 0.25}

    @pytest.mark.parametrize(
        "stray", ["model.safetensors", "modeling.py", "adapter/b.bin", "more/x.bin", "manifest.json"]
    )
    def test_what_no_step_wrote_is_not_taken(self, out: Path, partial: Path, stray: str) -> None:
        write_files(partial, {stray: b"{}"})
        complete(out)
        assert tree(out).keys() == {"model-0.bin", "adapter/a.bin", "README.md", "manifest.json"}
        assert {path.name for path in out.iterdir() if path.is_dir()} == {"adapter"}

    def test_files_of_a_step_that_was_repeated_or_forgotten_need_not_be_there(self, out: Path) -> None:
        def work(writer: ArtifactWriter) -> None:
            for number in range(3):
                files = write_files(writer.path, {f".scratch/{number}.bin": b"state"})
                writer.record("checkpoint", number, files=files)
                forgets = [f"epoch {number - 1}"] if number else []
                files = write_files(writer.path, {f".scratch/epoch-{number}": b"state"})
                writer.record(f"epoch {number}", number, files=files, forgets=forgets)
            for name in ("0.bin", "1.bin", "epoch-0", "epoch-1"):
                (writer.scratch / name).unlink()

        stop_after(out, work)
        with ArtifactWriter(out, MINE) as writer:
            assert writer.journal["checkpoint"] == 2
        (out.with_name("q.partial") / ".scratch" / "epoch-2").unlink()
        with pytest.raises(InputError, match=r"epoch-2' is missing"):
            ArtifactWriter(out, MINE)

    def test_moves_that_were_cut_short_are_ended(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        replace = os.replace

        def stop_at_second(old: Path, new: Path) -> None:
            if "block-1" in str(new):
                raise ValueError("stop")
            replace(old, new)

        names = [f"block-{number}.bin" for number in range(2)]

        def work(writer: ArtifactWriter) -> None:
            writer.record("old", 1, files=write_files(writer.path, dict.fromkeys(names, b"old")))
            new = write_files(writer.path, {f".scratch/{name}": name.encode() for name in names})
            writer.record("new", 2, files=new)
            monkeypatch.setattr(os, "replace", stop_at_second)
            writer.move("moved", {path: writer.path / path.name for path in new})

        stop_after(out, work)
        monkeypatch.undo()
        with ArtifactWriter(out, MINE) as writer:
            writer.finish(quantized())
        assert {name: data for name, data in tree(out).items() if name in names} == {n: n.encode() for n in names}


class TestLinks:
    def test_a_folder_that_is_a_link_is_left_alone(self, out: Path) -> None:
        theirs = write_files(out.with_name("theirs"), {".lock": b"", "thesis.tex": b"mine"})[0].parent
        out.with_name("q.partial").symlink_to(theirs)
        for force in (False, True):
            with pytest.raises(InputError, match=r"q\.partial' is in the way"):
                ArtifactWriter(out, MINE, force=force)
        assert tree(theirs) == {".lock": b"", "thesis.tex": b"mine"}

    def test_a_folder_with_a_lock_and_no_journal_is_left_alone(self, out: Path) -> None:
        write_files(out.with_name("q.partial"), {".lock": b"", "thesis.tex": b"mine"})
        with pytest.raises(InputError, match=r"q\.partial' is in the way"):
            ArtifactWriter(out, MINE, force=True)

    @pytest.mark.parametrize("name", ["README.md", "adapter", ".scratch"])
    def test_a_link_inside_is_not_written_through(self, out: Path, partial: Path, name: str) -> None:
        theirs = out.with_name("theirs")
        write_files(theirs, {"file": b"mine"})
        if (partial / name).is_dir():
            shutil.rmtree(partial / name)
        (partial / name).symlink_to(theirs / "file" if name == "README.md" else theirs)
        with pytest.raises(InputError, match=f"{name}' is a link"):
            ArtifactWriter(out, MINE)
        complete(out, force=True)
        assert tree(theirs) == {"file": b"mine"}


class TestTheEnd:
    def test_a_run_that_dies_before_its_manifest_has_lost_nothing(
        self, out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(store, "sealed", die)
        with pytest.raises(KeyboardInterrupt):
            complete(out)
        monkeypatch.undo()
        with ArtifactWriter(out, MINE) as writer:
            assert (writer.scratch / "state.bin").read_bytes() == b"state"

    @pytest.mark.parametrize("name", ["model-0.bin", "README.md"])
    def test_a_file_that_disappears_is_missed(self, out: Path, name: str) -> None:
        def remove(writer: ArtifactWriter) -> None:
            (writer.path / name).unlink()

        with pytest.raises(InputError, match=f"{name}' disappeared"):
            self._finish(out, remove)

    def test_a_file_that_is_changed_is_noticed(self, out: Path) -> None:
        with pytest.raises(InputError, match=r"model-0\.bin' was changed"):
            self._finish(out, lambda writer: write_files(writer.path, {"model-0.bin": b"block 1"}))

    def test_a_file_that_appears_is_no_part_of_it(self, out: Path) -> None:
        with pytest.raises(InputError, match=r"model\.safetensors' appeared"):
            self._finish(out, lambda writer: write_files(writer.path, {"model.safetensors": b"?"}))
        assert not out.exists()

    @pytest.mark.parametrize("above", [False, True])
    def test_a_folder_that_is_removed_under_the_run(self, tmp_path: Path, above: bool) -> None:
        out = tmp_path / "deep" / "q"
        with pytest.raises(InputError, match="removed or replaced while this run wrote to it"):
            self._finish(out, lambda writer: shutil.rmtree(writer.path.parent if above else writer.path))
        with pytest.raises(InputError, match="removed or replaced"):
            self._finish(out, lambda writer: (shutil.rmtree(writer.path), write_files(writer.path, FILES)))
        assert not out.exists()

    def test_a_removed_folder_is_said_by_whatever_meets_it_first(self, out: Path) -> None:
        def work(writer: ArtifactWriter) -> None:
            shutil.rmtree(writer.path)
            (writer.path / "file").write_bytes(b"")

        stop_after(out, work, InputError)

    def test_lock_and_journal_that_are_removed_do_no_harm(self, out: Path) -> None:
        def remove(writer: ArtifactWriter) -> None:
            (writer.path / ".lock").unlink()
            (writer.path / ".journal.jsonl").unlink()

        check_hashes(self._finish(out, remove))

    def test_a_check_that_fails_keeps_the_run(self, out: Path) -> None:
        def refuse(folder: Path) -> None:
            assert (folder / "manifest.json").exists()
            raise InputError("it does not load")

        def work(writer: ArtifactWriter) -> None:
            writer.record("first", 1, files=write_files(writer.path, FILES))
            writer.finish(quantized(), check=refuse)

        stop_after(out, work, InputError)
        assert not out.exists()
        assert not (out.with_name("q.partial") / "manifest.json").exists()
        with ArtifactWriter(out, MINE) as writer:
            assert writer.resumed

    def test_leftovers_in_a_finished_artifact_are_cleared_up(self, out: Path) -> None:
        complete(out)
        write_files(out, {".journal.jsonl": b"", ".lock": b"", ".scratch/big.bin": b"0"})
        with pytest.raises(InputError, match="q' exists"):
            ArtifactWriter(out, MINE)
        assert not [path for path in out.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize("force", [False, True])
    def test_a_look_at_the_output_clears_up_too(self, out: Path, force: bool) -> None:
        # Commands look before they open a writer, and go no further where the artifact stands.
        complete(out)
        write_files(out, {".journal.jsonl": b"", ".lock": b""})
        write_files(out.with_name(".q.replaced"), {"manifest.json": b"{}"})
        with contextlib.nullcontext() if force else pytest.raises(InputError, match="q' exists"):
            store.check_output(out, force=force)
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
        assert os.listdir(out.parent) == ["q"]

    def test_what_lies_beside_a_finished_artifact_by_another_hand_stays(self, out: Path) -> None:
        complete(out)
        write_files(out.with_name(".q.replaced"), {"mine": b"1"})
        with pytest.raises(InputError, match="q' exists"):
            store.check_output(out, force=False)
        assert (out.with_name(".q.replaced") / "mine").exists()

    def test_a_path_through_a_folder_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        given = complete(Path("none/../q"))
        assert read_manifest(given).name == "tiny-w2g64"
        assert os.listdir(tmp_path) == ["q"]

    @staticmethod
    def _finish(out: Path, meanwhile: Callable[[ArtifactWriter], object]) -> Path:
        with ArtifactWriter(out, MINE) as writer:
            writer.record("first", 1, files=write_files(writer.path, FILES))
            write_files(writer.path, {"README.md": b"card"})
            writer.plan("README.md")
            meanwhile(writer)
            return writer.finish(quantized())

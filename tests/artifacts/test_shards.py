import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ulbq.artifacts import shards
from ulbq.artifacts.shards import LazyTensors, write_index, write_shard
from ulbq.errors import InputError, ResourceError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint8, torch.bool]


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A folder of two shards and an index; returns what they hold."""
    parts = {
        "model-1.safetensors": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        "model-2.safetensors": {"c": torch.tensor(7, dtype=torch.int32)},
    }
    folder.mkdir(exist_ok=True)
    for file, tensors in parts.items():
        write_shard(folder / file, tensors)
    write_index(folder, {file: list(tensors) for file, tensors in parts.items()})
    return parts["model-1.safetensors"] | parts["model-2.safetensors"]


class TestLazyTensors:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_comes_back_bit_by_bit(self, tmp_path: Path, dtype: torch.dtype) -> None:
        written = torch.arange(12).view(3, 4).to(torch.float32).to(dtype)
        write_shard(tmp_path / "model.safetensors", {"x": written, "empty": torch.zeros(0, 3, dtype=dtype)})
        tensors = LazyTensors.folder(tmp_path)
        assert tensors.names == {"x", "empty"}
        assert (tensors.shape("x"), tensors.dtype("x")) == ((3, 4), dtype)
        assert tensors.nbytes("x") == 12 * dtype.itemsize
        read = tensors.read("x")
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), written.view(torch.uint8))
        assert tensors.read("empty").shape == (0, 3)

    def test_a_tensor_outlives_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        write_shard(path, {"x": torch.arange(1000.0)})
        read = LazyTensors.folder(tmp_path).read("x")
        path.write_bytes(b"")
        assert torch.equal(read, torch.arange(1000.0))

    def test_shards_are_one_set(self, tmp_path: Path) -> None:
        written = sharded(tmp_path)
        for index in (True, False):
            if not index:
                (tmp_path / "model.safetensors.index.json").unlink()
            tensors = LazyTensors.folder(tmp_path)
            assert tensors.names == written.keys()
            assert all(torch.equal(tensors.read(name), tensor) for name, tensor in written.items())

    def test_a_model_of_transformers(self, tiny_llama: Path) -> None:
        expected = load_file(tiny_llama / "model.safetensors")
        tensors = LazyTensors.folder(tiny_llama)
        assert tensors.names == expected.keys()
        assert all(torch.equal(tensors.read(name), tensor) for name, tensor in expected.items())

    def test_the_single_file_goes_before_the_index_as_in_transformers(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        write_shard(tmp_path / "model.safetensors", {"single": torch.zeros(1)})
        assert LazyTensors.folder(tmp_path).names == {"single"}

    def test_files_outside_the_index_are_not_read(self, tmp_path: Path) -> None:
        written = sharded(tmp_path)
        (tmp_path / "consolidated.safetensors").write_bytes(b"rubbish")
        assert LazyTensors.folder(tmp_path).names == written.keys()

    def test_an_unknown_name(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        tensors = LazyTensors.folder(tmp_path)
        for method in (tensors.read, tensors.shape, tensors.dtype, tensors.nbytes):
            with pytest.raises(InputError, match="hold no tensor 'd'"):
                method("d")

    def test_a_file_that_vanishes_later(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        tensors = LazyTensors.folder(tmp_path)
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(InputError, match=r"model-2\.safetensors' changed while it was being read"):
            tensors.read("c")

    def test_a_dtype_that_torch_does_not_have_is_refused_only_when_wanted(self, tmp_path: Path) -> None:
        header = json.dumps(
            {
                "x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
                "y": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
            }
        ).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2\3")
        tensors = LazyTensors.folder(tmp_path)
        assert tensors.read("y").tolist() == [3]
        with pytest.raises(InputError, match=r"'x' in .* has the dtype F4"):
            tensors.read("x")


class TestDamage:
    @pytest.mark.parametrize("keep", [0, 4, 30, -1])
    def test_a_truncated_file(self, tmp_path: Path, keep: int) -> None:
        sharded(tmp_path)
        path = tmp_path / "model-1.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(InputError, match=r"model-1\.safetensors' is not a whole safetensors file"):
            LazyTensors.folder(tmp_path)

    @pytest.mark.parametrize("data", [b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
    def test_a_file_that_is_something_else(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(InputError, match=r"model\.safetensors' is not a whole safetensors file") as caught:
            LazyTensors.folder(tmp_path)
        assert "fetch it again" in caught.value.hint

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(InputError, match=r"model-2\.safetensors' is missing"):
            LazyTensors.folder(tmp_path)

    def test_a_tensor_in_two_files(self, tmp_path: Path) -> None:
        for file in ("one.safetensors", "two.safetensors"):
            write_shard(tmp_path / file, {"x": torch.zeros(1)})
        with pytest.raises(InputError, match=r"'x' is both in '.*one\.safetensors' and in '.*two\.safetensors'"):
            LazyTensors.folder(tmp_path)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{", r"index\.json' is corrupt"),
            ("[]", "has no 'weight_map'"),
            ('{"weight_map": {}}', "has no 'weight_map'"),
            ('{"weight_map": {"a": "../model-1.safetensors"}}', "puts 'a' outside the model's folder"),
            ('{"weight_map": {"a": 1}}', "puts 'a' outside the model's folder"),
            (
                '{"weight_map": {"d": "model-1.safetensors"}}',
                r"says that 'd' is in 'model-1\.safetensors', and it is not",
            ),
            (
                '{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}',
                r"says that 'a' is in 'model-2\.safetensors', and it is not",
            ),
        ],
    )
    def test_an_index_that_is_wrong(self, tmp_path: Path, text: str, sentence: str) -> None:
        sharded(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            LazyTensors.folder(tmp_path)

    def test_pickles_are_refused_and_emptiness_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds no weights"):
            LazyTensors.folder(tmp_path)
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match=r"are pickled \('pytorch_model\.bin'\)"):
            LazyTensors.folder(tmp_path)


class TestWriteShard:
    def test_equal_tensors_give_equal_bytes(self, tmp_path: Path) -> None:
        tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.uint8)}
        write_shard(tmp_path / "1", tensors)
        write_shard(tmp_path / "2", dict(reversed(tensors.items())))
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()

    def test_views_and_parameters_are_stored_as_they_look(self, tmp_path: Path) -> None:
        base = torch.arange(6.0).view(2, 3)
        write_shard(tmp_path / "x", {"t": base.T, "p": torch.nn.Parameter(base[:, 1])})
        read = load_file(tmp_path / "x")
        assert torch.equal(read["t"], base.T)
        assert torch.equal(read["p"], base[:, 1])

    def test_the_file_has_the_permissions_of_any_new_file(self, tmp_path: Path) -> None:
        (tmp_path / "any").touch()
        write_shard(tmp_path / "x", {"x": torch.zeros(1)})
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "any").stat().st_mode

    @pytest.mark.parametrize(
        ("error", "number"),
        [
            (SafetensorError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
            (OSError(errno.EIO, "Input/output error"), errno.EIO),
        ],
    )
    def test_a_failed_write_keeps_the_old_file(
        self, tmp_path: Path, error: Exception, number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
            path.write_bytes(b"half")
            raise error

        write_shard(tmp_path / "x", {"x": torch.zeros(1)})
        monkeypatch.setattr(shards, "save_file", fail)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            write_shard(tmp_path / "x", {"x": torch.ones(1)})
        assert caught.value.errno == number
        assert os.listdir(tmp_path) == ["x"]
        assert load_file(tmp_path / "x")["x"].item() == 0

    def test_tied_tensors_are_not_stored_twice(self, tmp_path: Path) -> None:
        tied = torch.zeros(4)
        with pytest.raises(RuntimeError, match="share memory"):
            write_shard(tmp_path / "x", {"a": tied, "b": tied})
        assert os.listdir(tmp_path) == []


class TestWriteIndex:
    def test_is_what_transformers_loads(self, tiny_llama: Path, tmp_path: Path) -> None:
        whole = LazyTensors.folder(tiny_llama)
        names = sorted(whole.names)
        parts = {"model-outer.safetensors": names[::2], "model-block-00000.safetensors": names[1::2]}
        for file, part in parts.items():
            write_shard(tmp_path / file, {name: whole.read(name) for name in part})
        write_index(tmp_path, parts)
        shutil.copy(tiny_llama / "config.json", tmp_path)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(whole.nbytes(name) for name in names)
        assert list(index["weight_map"]) == names
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
        assert all(torch.equal(loaded[name], whole.read(name)) for name in names)

    def test_shards_must_hold_what_the_index_says(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "1.safetensors", {"a": torch.zeros(1), "b": torch.zeros(1)})
        write_shard(tmp_path / "2.safetensors", {"b": torch.zeros(1)})
        for parts, sentence in [
            ({"1.safetensors": ["a"]}, "'b' is missing or too many"),
            ({"2.safetensors": ["b", "c"]}, "'c' is missing or too many"),
            ({"1.safetensors": ["a", "b"], "2.safetensors": ["b"]}, "'b' would be stored twice"),
            ({"3.safetensors": ["a"]}, r"3\.safetensors' is missing"),
        ]:
            with pytest.raises(InputError, match=sentence):
                write_index(tmp_path, parts)
        assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_file_that_could_not_be_opened_for_lack_of_descriptors_is_not_called_damaged(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.safetensors"
    write_shard(path, {"x": torch.zeros(2)})
    stored = LazyTensors([path])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(ResourceError, match="too few descriptors"):
            stored.read("x")
        with pytest.raises(ResourceError, match="too few descriptors"):
            LazyTensors([path])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_weights_that_change_during_a_run_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_shard(file, {"a": torch.zeros(4)})
    tensors = LazyTensors.folder(tmp_path)
    assert torch.equal(tensors.read("a"), torch.zeros(4))
    write_shard(file, {"a": torch.ones(4)})
    with pytest.raises(InputError, match=r"model\.safetensors' changed while it was being read"):
        tensors.read("a")


def test_weights_that_may_not_be_read_are_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": torch.zeros(4)})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="may not be read: Permission denied") as caught:
        LazyTensors.folder(tmp_path)
    assert "permissions" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_is_read_as_it_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(7 * 3 * 2) % 50
    tensors = {"a": values.view(7, 3, 2), "b": values[:9], "scalar": values[3], "none": values[:0].view(0, 3)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_shard(tmp_path / "m.safetensors", tensors)
    stored = LazyTensors([tmp_path / "m.safetensors"])
    for name, tensor in tensors.items():
        read = stored.read(name)
        assert (read.shape, read.dtype) == (tensor.shape, dtype)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("entry", [["F32", [1], [0, 4]], {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, 7])
def test_an_odd_header_is_no_safetensors_file(entry: object, tmp_path: Path) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        LazyTensors([tmp_path / "m.safetensors"])


def test_a_file_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    large = 1 << 41
    header = {
        "a": {"dtype": "BF16", "shape": [large // 2], "data_offsets": [0, large]},
        "b": {"dtype": "I32", "shape": [2], "data_offsets": [large, large + 8]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + large)
        file.write(bytes([7, 0, 0, 0, 9, 0, 0, 0]))
    stored = LazyTensors([tmp_path / "m.safetensors"])
    assert stored.nbytes("a") == large
    assert stored.read("b").tolist() == [7, 9]

import errno
import hashlib
import itertools
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from tests.data.byte_tokenizer import ByteTokenizer
from tests.data.conftest import text_rows, write_jsonl
from tests.models.tiny import tiny_tokenizer
from ulbq.data import registry
from ulbq.data.calibration import Calibration, calibration_samples, load_calibration, save_calibration, sources
from ulbq.data.windows import token_stream
from ulbq.errors import InputError, ResourceError, UsageError

NUMBERS = " ".join(f"{number:03}" for number in range(300))  # 1,199 bytes, no two windows alike


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text(NUMBERS)
    return path


def drawn(path: Path, *, samples: int = 8, length: int = 16, seed: int = 0, bos: bool = False) -> Calibration:
    return calibration_samples(str(path), ByteTokenizer(bos=bos), samples=samples, length=length, seed=seed)


def test_samples_are_different_windows_of_the_text_in_random_order(numbers: Path) -> None:
    found = drawn(numbers)
    assert (found.name, found.seed) == ("numbers.txt", 0)
    assert found.tokens.dtype == torch.int64
    starts = [NUMBERS.index(ByteTokenizer.read(window)) for window in found.tokens.tolist()]
    assert starts != sorted(starts)
    assert all(later - earlier >= 16 for earlier, later in itertools.pairwise(sorted(starts)))


def test_the_draw_is_this_one_and_leaves_the_global_generator_alone(numbers: Path) -> None:
    state = torch.get_rng_state()
    first = drawn(numbers)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    assert torch.equal(drawn(numbers).tokens, first.tokens)
    assert not torch.equal(drawn(numbers, seed=1).tokens, first.tokens)
    # A new hash after an upgrade of torch: interrupted runs no longer resume, and published results need a word.
    assert first.sha256 == "a26235415e687f756b68f4cb79761c33bc853f48bf19eed131fa81bddde3672b"


def test_another_process_draws_the_same(numbers: Path) -> None:
    script = (
        "from tests.data.byte_tokenizer import ByteTokenizer; from ulbq.data.calibration import calibration_samples\n"
        f"print(calibration_samples({str(numbers)!r}, ByteTokenizer(), samples=8, length=16, seed=0).sha256)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == drawn(numbers).sha256


def test_hash_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 70_000]])
    expected = hashlib.sha256(b"(2, 3)" + struct.pack("<6i", 1, 2, 3, 4, 5, 70_000)).hexdigest()
    assert Calibration("x", tokens, 0).sha256 == expected
    assert Calibration("x", tokens.reshape(3, 2), 0).sha256 != expected
    assert Calibration("x", tokens, 0).record() == {
        "name": "x",
        "samples": 2,
        "sequence_length": 3,
        "seed": 0,
        "sha256": expected,
    }


def test_each_window_begins_as_the_model_expects(numbers: Path) -> None:
    tokens = drawn(numbers, bos=True).tokens
    assert tokens.shape == (8, 16)
    assert (tokens[:, 0] == 256).all()
    assert all(ByteTokenizer.read(window) in NUMBERS for window in tokens[:, 1:].tolist())


def test_every_file_format_gives_the_same_tokens(tmp_path: Path) -> None:
    texts = [NUMBERS[start : start + 100] for start in range(0, 1200, 100)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    write_jsonl(tmp_path / "a.jsonl", text_rows(*texts))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    stream = token_stream(texts, ByteTokenizer(), 10_000)
    save_file({"tokens": stream.to(torch.int32)}, tmp_path / "a.safetensors")
    hashes = {suffix: drawn(tmp_path / f"a.{suffix}").sha256 for suffix in ("txt", "jsonl", "parquet")}
    assert len(set(hashes.values())) == 1
    flat = drawn(tmp_path / "a.safetensors").tokens
    assert Counter(map(tuple, flat.tolist())) == Counter(map(tuple, drawn(tmp_path / "a.txt").tokens.tolist()))


def test_mix_takes_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(name: str, role: str, **options: object) -> Iterator[str]:
        assert role == "train"
        return iter([name[0] * 400])

    monkeypatch.setattr(registry, "texts", texts)
    tokens = calibration_samples("mix", ByteTokenizer(), samples=32, length=8).tokens
    origins = [ByteTokenizer.read(window) for window in tokens.tolist()]
    assert Counter(origins) == {"w" * 8: 11, "c" * 8: 11, "a" * 8: 10}
    assert origins[:11] != ["w" * 8] * 11
    tokens = calibration_samples("mix", ByteTokenizer(), samples=2, length=8).tokens
    assert {ByteTokenizer.read(window)[0] for window in tokens.tolist()} == {"w", "c"}


def test_sources_take_their_weights(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 900)
    spec = f"{tmp_path}/a.txt:3,{tmp_path}/b.txt,{tmp_path}/c.txt:1.5"
    found = calibration_samples(spec, ByteTokenizer(), samples=11, length=8)
    origins = [ByteTokenizer.read(window) for window in found.tokens.tolist()]
    assert Counter(origins) == {"a" * 8: 6, "b" * 8: 2, "c" * 8: 3}
    assert origins != sorted(origins)
    assert found.name == "a.txt:3,b.txt:1,c.txt:1.5"
    assert calibration_samples(f"{tmp_path}/a.txt:2", ByteTokenizer(), samples=2, length=8).name == "a.txt"


def test_a_file_may_be_called_like_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a,b:2.txt"
    path.write_text(NUMBERS)
    assert sources(str(path)) == {str(path): 1.0}
    assert drawn(path).name == "a,b:2.txt"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("wikitext2,c4:2,wikitext2:3", "names 'wikitext2' twice"),
        ("wikitext2,self", "'self' stands alone"),
        ("mix:2,c4", "'mix' stands alone"),
        ("c4,a.safetensors", "'a.safetensors' stands alone"),
        ("mix:2", "'mix' stands alone"),
        (",", "names no source"),
        ("c4:0,ptb", "weight in `calibration` is 0"),
        ("c4:99999999999999999999,ptb", "or above"),
        ("c4:1000,ptb", "Of 8 samples none is left for 'ptb'"),
        ("c4,nonsense:2", "'nonsense' is neither"),
    ],
)
def test_lists_that_make_no_sense(spec: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "texts", lambda *_, **__: iter(["x" * 400]))
    with pytest.raises(UsageError, match=sentence):
        calibration_samples(spec, ByteTokenizer(), samples=8, length=8)


def test_chats_are_written_by_the_tokenizers_template(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a" * 50}, {"from": "gpt", "value": "b" * 50}]
    write_jsonl(tmp_path / "chats.jsonl", [{"conversations": turns}] * 3)
    write_jsonl(tmp_path / "half.jsonl", [{"messages": [{"role": "tool", "content": "c" * 99}]}, {"text": "d" * 99}])
    tokenizer = ByteTokenizer()
    told = [("\n\n".join(["a" * 50, "b" * 50]), None), (f"<user>{'a' * 50}<assistant>{'b' * 50}", "template")]
    for text, template in told:
        tokenizer.chat_template = template
        found = calibration_samples(str(tmp_path / "chats.jsonl"), tokenizer, samples=1, length=len(text) * 3)
        assert ByteTokenizer.read(found.tokens[0].tolist()) in "\n\n".join([text] * 4)
        assert found.contents is not None
        assert found.contents.chats == 1.0
    both = f"{tmp_path}/chats.jsonl:3,{tmp_path}/half.jsonl:1"
    found = calibration_samples(both, tokenizer, samples=4, length=32)
    assert found.contents is not None
    assert found.contents.chats == pytest.approx(3 / 4 + 1 / 4 / 2)


def test_mix_needs_all_its_parts(tmp_path: Path, caches: Path, online: None, no_sockets: None) -> None:
    write_jsonl(tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1/train.jsonl", text_rows(NUMBERS))
    with pytest.raises(ResourceError, match="allenai/c4"):
        calibration_samples("mix", ByteTokenizer(), samples=6, length=8, data_dir=tmp_path, offline=True)


@pytest.mark.parametrize(("name", "read_at_most"), [("c4", 4 * 80 + 40), ("pile", 10**9)])
def test_an_endless_set_is_read_as_far_as_needed(monkeypatch: pytest.MonkeyPatch, name: str, read_at_most: int) -> None:
    monkeypatch.setattr("ulbq.data.windows._PIECE", 8)
    monkeypatch.setattr("ulbq.data.calibration._MOST_READ", 1000)
    read = 0

    def texts(*_: object, **__: object) -> Iterator[str]:
        nonlocal read
        while True:
            read += 18
            yield "sixteen letters."

    monkeypatch.setattr(registry, "texts", texts)
    tokens = calibration_samples(name, ByteTokenizer(), samples=10, length=8).tokens
    assert tokens.shape == (10, 8)
    assert read <= read_at_most
    assert (read >= 1000) == (name == "pile")


def test_saved_samples_come_back(numbers: Path, tmp_path: Path) -> None:
    saved = drawn(numbers, seed=3)
    save_calibration(tmp_path / "s.safetensors", saved)
    loaded = load_calibration(tmp_path / "s.safetensors")
    assert (loaded.name, loaded.seed, loaded.sha256) == ("numbers.txt", 3, saved.sha256)
    assert torch.equal(loaded.tokens, saved.tokens)
    assert loaded.tokens.dtype == torch.int64
    again = drawn(tmp_path / "s.safetensors", samples=4, length=10)
    assert again.name == "s.safetensors"
    assert torch.equal(again.tokens, saved.tokens[:4, :10])
    assert again.tokens.is_contiguous()


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.zeros(3, 16, dtype=torch.int32), "holds 3 samples of 16 tokens, not 4 of 16"),
        (torch.zeros(4, 15, dtype=torch.int32), "holds 4 samples of 15 tokens, not 4 of 16"),
        (torch.full((4, 16), 258), "token 258, outside the vocabulary of 258"),
        (torch.full((4, 16), -1), "token -1, outside"),
        (torch.zeros(4, 16), "holds no samples"),
        (torch.zeros(2, 4, 16, dtype=torch.int32), "holds no samples"),
        (torch.zeros(4, 0, dtype=torch.int32), "holds no samples"),
        (torch.zeros(20, dtype=torch.int32), "holds 20 tokens; 4 samples of 16 need at least 40"),
    ],
)
def test_token_files_that_do_not_fit(tmp_path: Path, tokens: torch.Tensor, sentence: str) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"tokens": tokens}, path)
    with pytest.raises(InputError, match=sentence):
        drawn(path, samples=4, length=16)


def test_saving_again_gives_the_same_bytes(numbers: Path, tmp_path: Path) -> None:
    contents = set()
    for _ in range(8):
        save_calibration(tmp_path / "s.safetensors", drawn(numbers))
        contents.add((tmp_path / "s.safetensors").read_bytes())
    assert len(contents) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"numbers.txt", "s.safetensors"}


def test_a_save_that_fails_leaves_the_old_file(numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"
    save_calibration(path, drawn(numbers))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save_calibration(path, drawn(numbers, seed=1))
    assert path.read_bytes() == before


def test_damaged_token_files(numbers: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_calibration(path, drawn(numbers))
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="not those that were saved"):
        load_calibration(path)
    path.write_bytes(content[:-8])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_calibration(path)
    save_file({"tokens": torch.zeros(4, dtype=torch.int32)}, path, {"calibration": "not JSON"})
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_calibration(path)
    save_file({"tokens": torch.zeros(4, dtype=torch.int32)}, path, {"calibration": "[" * 100_000})
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_calibration(path)
    save_file({"tokens": torch.zeros(4, dtype=torch.int32)}, path, {"calibration": "[1]"})
    assert load_calibration(path).name == path.name
    save_file({"weights": torch.zeros(4, dtype=torch.int32)}, path)
    with pytest.raises(InputError, match="holds no samples"):
        load_calibration(path)
    with pytest.raises(InputError, match="no file"):
        load_calibration(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("spec", ["wikitext", "self", "notes", "data.csv"])
def test_neither_set_nor_file(spec: str) -> None:
    with pytest.raises(UsageError, match="neither a calibration set nor a data file") as caught:
        calibration_samples(spec, ByteTokenizer(), samples=1, length=2)
    assert "wikitext2, c4" in caught.value.hint


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (4, 1)])
def test_nothing_to_draw(numbers: Path, samples: int, length: int) -> None:
    with pytest.raises(UsageError, match="at least one sample of two tokens"):
        drawn(numbers, samples=samples, length=length)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        drawn(tmp_path / "gone.txt")


def test_the_mirror_serves_wikitext2_without_the_network(
    data_dir: Path, caches: Path, online: None, no_sockets: None
) -> None:
    tokenizer = tiny_tokenizer(400)
    found = calibration_samples("wikitext2", tokenizer, samples=4, length=64, data_dir=data_dir, offline=True)
    assert found.record()["name"] == "wikitext2"
    text = "\n\n".join(registry.texts("wikitext2", "train", data_dir=data_dir))
    assert tokenizer.decode(found.tokens[0, 8:56]).strip("\ufffd") in text

"""Nothing of an artifact is loaded but what was written, and what was written is noticed when it changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.artifacts.sample import edit, write_artifact
from tests.models.tiny import save_tiny
from ulbq.artifacts import read_manifest, verify
from ulbq.config.convert import ConvertRequest
from ulbq.config.generate import GenerateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.generate import generate
from ulbq.pipeline.quantize import quantize


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    source = save_tiny("llama", root / "m", tied=False, dtype=torch.bfloat16)
    return quantize(QuantizeRequest(source=str(source), method="rtn", bits=4, group_size=32, out=root / "q"))[0]


@pytest.fixture
def artifact(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "q"))


def flip(file: Path, at: int = -40) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def load(path: Path) -> None:
    load_model(resolve(path), dtype=torch.bfloat16)


def to_dense(path: Path) -> None:
    convert(ConvertRequest(source=str(path), to="dense", out=path.with_name("d")))


def speak(path: Path) -> None:
    generate(GenerateRequest(source=str(path), prompt="a", max_new_tokens=2), lambda text: None)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "more.safetensors", "modeling.py", "adapter/adapter_config.json", "chat_template.json"],
)
@pytest.mark.parametrize("read", [read_manifest, verify, load])
def test_a_file_that_would_be_loaded_and_is_not_listed(
    artifact: Path, name: str, read: Callable[[Path], object]
) -> None:
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).write_bytes(b"{}")
    with pytest.raises(InputError, match=f"{name}' was not written with the artifact"):
        read(artifact)


def test_what_nobody_loads_may_lie_there(artifact: Path) -> None:
    for name in ("notes.txt", ".gitattributes", "scores.html", "._config.json"):
        (artifact / name).write_text("mine")
    load(artifact)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors.index.json", "model-block-00001.safetensors"])
def test_a_list_that_is_cut_short_is_not_whole(artifact: Path, lost: str) -> None:
    edit(artifact, lambda manifest: manifest["files"].pop(lost), reseal=True)
    with pytest.raises(InputError, match=lost):
        verify(artifact)
    (artifact / lost).unlink()
    with pytest.raises(InputError, match=r"lists no|missing"):
        verify(artifact)


def test_a_list_of_nothing_is_not_whole(tmp_path: Path) -> None:
    empty = write_artifact(tmp_path / "q", files={})
    with pytest.raises(InputError, match=r"lists no 'config\.json'"):
        verify(empty)


@pytest.mark.parametrize("use", [load, to_dense, speak])
@pytest.mark.parametrize("name", ["model-block-00000.safetensors", "model-outer.safetensors"])
def test_a_flipped_bit_in_a_shard_is_met_when_it_is_read(
    artifact: Path, name: str, use: Callable[[Path], object]
) -> None:
    flip(artifact / name)
    with pytest.raises(InputError, match=f"{name}' was changed after the artifact was written"):
        use(artifact)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_changed_small_file_is_met_at_once(artifact: Path, name: str) -> None:
    text = (artifact / name).read_text()
    (artifact / name).write_text(text.replace("1", "2", 1))
    with pytest.raises(InputError, match=f"{name}' was changed"):
        resolve(artifact)


def test_no_verify_takes_it_as_it_is(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    text = (artifact / "config.json").read_text()
    (artifact / "config.json").write_text(
        text.replace(f'"rms_norm_eps": {config["rms_norm_eps"]}', '"rms_norm_eps": 2e-06')
    )
    flip(artifact / "model-block-00000.safetensors")
    source = resolve(artifact, verify=False)
    assert source.config.rms_norm_eps == 2e-6
    load_model(source, dtype=torch.bfloat16)

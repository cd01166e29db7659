import json
import shutil
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from tests.models.tiny import FAMILIES, tiny_config, tiny_model
from tests.models.tiny_gguf import write_tiny_gguf
from ulbq.errors import InputError
from ulbq.models.blocks import load_block, skeleton
from ulbq.models.gguf import _Outline, model_name, open_gguf
from ulbq.models.load import load_model
from ulbq.models.skeleton import empty_model
from ulbq.models.source import ModelSource, default_model, resolve


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(tiny_config("llama", tied=False, rms_norm_eps=1e-5))
    return write_tiny_gguf(model, tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf")


def test_every_tensor_equals_that_of_transformers(tiny_gguf: Path) -> None:
    source = resolve(tiny_gguf)
    reference = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    parameters = dict(reference.named_parameters())
    assert source.names == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(source.read(name), parameter, rtol=0, atol=0)


def test_llama_rows_come_back_in_order(tiny_gguf: Path) -> None:
    # Against the model that was written, not against transformers, which could share a mistake.
    original = tiny_model(tiny_config("llama", tied=False, rms_norm_eps=1e-5))
    tokens = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        got, want = load_model(resolve(tiny_gguf), dtype=torch.float32)(tokens).logits, original(tokens).logits
    # Q8_0 loses half a percent; rows in another order would lose everything.
    assert (got - want).norm() < 0.05 * want.norm()


def test_source_says_what_it_is(tiny_gguf: Path) -> None:
    source = resolve(str(tiny_gguf))
    assert (source.kind, source.name, source.given, source.path) == ("gguf", "tiny", str(tiny_gguf), tiny_gguf)
    assert source.packed == {}
    assert source.parent is None
    assert source.side_files() == []
    assert len(source.content_hash) == 64


def test_block_loads_in_the_asked_dtype(tiny_gguf: Path) -> None:
    source = resolve(tiny_gguf)
    block = load_block(skeleton(source), source, 1, torch.bfloat16)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


def same_as_transformers(source: ModelSource, folder: Path) -> None:
    """Compare configuration and tokenizer with those that transformers makes of the file by itself."""
    config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
    # The file says nothing of it, and engines and trainers ask.
    assert source.config.architectures == [type(empty_model(config)).__name__]
    assert source.config.to_dict() == config.to_dict() | {"architectures": source.config.architectures}
    assert source.config.name_or_path == config.name_or_path
    shutil.copyfile(source.path, folder / source.path.name)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=source.path.name)
    ours = source.tokenizer()
    assert type(ours) is type(theirs)
    # But for the split, and a token that it adds behind the vocabulary where the file names no unknown one.
    backend, expected = (json.loads(one.backend_tokenizer.to_str())["model"] for one in (ours, theirs))
    assert (backend["vocab"], backend["merges"]) == (expected["vocab"], expected["merges"])
    assert ours.special_tokens_map.items() <= theirs.special_tokens_map.items()
    assert ours.chat_template == theirs.chat_template


def test_configuration_and_tokenizer_are_those_of_transformers(tiny_gguf: Path, tmp_path: Path) -> None:
    same_as_transformers(resolve(tiny_gguf), tmp_path)


def test_a_vocabulary_whose_size_stands_nowhere_is_counted(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tied=False, vocab=200))
    path = write_tiny_gguf(model, tmp_path / "m.gguf", says_vocabulary=False)
    assert "llama.vocab_size" not in open_gguf(path).values
    source = resolve(path)
    assert source.config.vocab_size == 200
    assert source.read("lm_head.weight").shape[0] == 200
    other = tmp_path / "other"
    other.mkdir()
    same_as_transformers(source, other)


def test_the_header_is_that_of_ggufs_own_reader(tiny_gguf: Path) -> None:
    header, reader = open_gguf(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.kind, ours.offset) == (tensor.tensor_type, tensor.data_offset)
        np.testing.assert_array_equal(
            gguf.dequantize(header.data(tensor.name), ours.kind), gguf.dequantize(tensor.data, tensor.tensor_type)
        )
    values: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    for name, value in header.values.items():
        assert value == pytest.approx(values[name]) if isinstance(value, float) else value == values[name]
    tokens = {name for name in values if name.startswith("tokenizer.") and isinstance(values[name], list)}
    assert header.lengths == {name: len(values[name]) for name in tokens}
    assert header.values.keys() | tokens | {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} == values.keys()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_names_come_without_the_insides_of_blocks(family: str) -> None:
    model = empty_model(tiny_config(family))
    kind = TENSOR_PROCESSORS.get(model.config.model_type.removesuffix("_text"), TensorProcessor)
    processor = kind(config=model.config.to_dict())
    try:
        whole = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError:
        pytest.skip(f"gguf does not know {family}")
    assert len(whole) >= len(model.state_dict()) - 1  # a tied head has no tensor of its own
    assert get_gguf_hf_weights_map(_Outline(model), processor) == whole


@pytest.mark.parametrize("keep", [3, 100, 5000, -1000])
def test_truncated_file_is_refused(tiny_gguf: Path, tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        resolve(cut)


def test_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model(tiny_config("llama", tied=False)), tmp_path / "part.gguf", parts=3)
    with pytest.raises(InputError, match="one of 3 parts"):
        resolve(path)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tied=False))
    path = write_tiny_gguf(model, tmp_path / "alien.gguf", architecture="alien")
    with pytest.raises(InputError, match=r"alien\.gguf") as caught:
        resolve(path)
    assert "original folder" in caught.value.hint


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("not at all")
    with pytest.raises(InputError, match="not a GGUF one"):
        resolve(path)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("llama-3-8b-IQ2_XXS.gguf", "llama-3-8b"),
        ("Qwen3-0.6B-Q4_K_M.gguf", "Qwen3-0.6B"),
        ("model-bf16.gguf", "model"),
        ("model-FP16.gguf", "model"),
        ("model-TQ1_0.gguf", "model"),
        ("Q4.gguf", "Q4"),
        ("opt-125m.gguf", "opt-125m"),
    ],
)
def test_name_has_no_quantization_type(file: str, name: str) -> None:
    assert model_name(Path(file)) == name


@pytest.mark.real
def test_the_default_model(default_source: ModelSource, tmp_path: Path) -> None:
    assert default_source.name == "SmolLM2-135M-Instruct"
    assert default_source.names == dict(skeleton(default_source).named_parameters()).keys()
    norm = default_source.read("model.norm.weight")
    assert norm.dtype == torch.float32
    assert norm.isfinite().all()
    tokenizer = default_source.tokenizer()
    assert tokenizer.chat_template
    text = "Paris is the capital of France. Ünï 123"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    default_source.save_tokenizer_files(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.real
def test_the_default_model_opens_as_transformers_opens_it(default_source: ModelSource, tmp_path: Path) -> None:
    same_as_transformers(default_source, tmp_path)


@pytest.mark.real
def test_the_default_model_opens_in_no_time(default_source: ModelSource) -> None:
    # Of the processor, as others may use it too. Reading the vocabulary token by token takes fifteen seconds.
    started = time.process_time()
    source = default_model(offline=True)
    assert time.process_time() - started < 2
    source.tokenizer()
    assert time.process_time() - started < 4

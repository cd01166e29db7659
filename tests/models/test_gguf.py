from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import tiny_config, tiny_model
from tests.models.tiny_gguf import write_tiny_gguf
from ulbq.errors import InputError
from ulbq.models.blocks import load_block, skeleton
from ulbq.models.gguf import model_name
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve


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

"""What GGUF files say of each family, and which of its models are refused; llama.cpp itself runs in the slow tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.families import GGUF_FAMILIES, LONGROPE
from tests.models.tiny import save_tiny, tiny_config
from ulbq.config.convert import ConvertRequest
from ulbq.export.gguf_models import FAMILIES, unsupported_reason
from ulbq.models.gguf_header import GgufHeader, read_header
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert

SLIDING = {"sliding_window": 8}


def written(family: str, folder: Path, **changes: Any) -> GgufHeader:
    dense = save_tiny(family, folder / "dense", **(GGUF_FAMILIES[family] | changes))
    path, _ = convert(ConvertRequest(source=str(dense), to="gguf", dtype="fp32", out=folder / "g"))
    return read_header(path / "model.gguf")


def values(header: GgufHeader, *names: str) -> list[Any]:
    return [header.values.get(f"{header.architecture}.{name}") for name in names]


def test_every_family_is_run_by_llama_cpp() -> None:
    tried = {tiny_config(family, **_plain(changes)).model_type for family, changes in GGUF_FAMILIES.items()}
    assert tried == FAMILIES.keys()


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name != "tied"}


def test_a_gemma_has_its_windows_and_norms_with_one_added(tmp_path: Path) -> None:
    header = written("gemma3", tmp_path)
    assert values(header, "attention.sliding_window", "rope.freq_base", "rope.freq_base_swa") == [8, 1e6, 1e4]
    source = resolve(tmp_path / "dense")
    for stored, name in (("attn_q_norm", "self_attn.q_norm"), ("post_ffw_norm", "post_feedforward_layernorm")):
        found = torch.from_numpy(header.data(f"blk.1.{stored}.weight").copy()).view(torch.float32)
        assert torch.equal(found, source.read(f"model.layers.1.{name}.weight") + 1)


def test_a_granite_has_its_scales(tmp_path: Path) -> None:
    names = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
    assert values(written("granite", tmp_path), *names) == pytest.approx([3.0, 0.5, 0.3, 2.0])


def test_half_a_head_is_rotated_in_glm4(tmp_path: Path) -> None:
    header = written("glm4", tmp_path)
    assert values(header, "rope.dimension_count", "attention.key_length") == [8, 16]
    assert header.tensors["blk.0.ffn_up.weight"].shape == (256, 64)  # gate and up in one


def test_a_phi3_has_factors_for_short_and_long_text(tmp_path: Path) -> None:
    header = written("phi3", tmp_path, **LONGROPE)
    assert values(header, "rope.scaling.type", "rope.scaling.original_context_length") == ["longrope", 256]
    assert values(header, "rope.dimension_count", "rope.scaling.attn_factor") == pytest.approx([12, 1.25**0.5])
    for name in ("long", "short"):
        stored = torch.from_numpy(header.data(f"rope_factors_{name}.weight").copy()).view(torch.float32)
        torch.testing.assert_close(stored, torch.tensor(LONGROPE["rope_parameters"][f"{name}_factor"]))


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "the blocks that attend to all tokens are not one in 2"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "its query_pre_attn_scalar is 32, and llama.cpp takes 256"),
        ("gemma3", {"use_bidirectional_attention": True, **SLIDING}, "its attention looks ahead"),
        (
            "gemma3",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0, and llama.cpp's 'gemma3_text' None",
        ),
        ("phi3", SLIDING, "slides over 8 tokens"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "other blocks than every fourth go without rotary positions"),
        ("olmo2", {"tied": True}, "tie_word_embeddings=True, and llama.cpp's 'olmo2' False"),
        ("olmo2", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"attention_bias": True}, "output has a bias"),
        ("gemma", {}, "form of 'gemma' is none of those written here"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], why: str) -> None:
    assert why in str(unsupported_reason(tiny_config(family, **(GGUF_FAMILIES.get(family, {}) | changes))))


def test_logits_without_bounds_are_refused() -> None:
    config = tiny_config("gemma2")
    assert unsupported_reason(config) is None
    config.final_logit_softcapping = None
    assert unsupported_reason(config) == "its logits have no bounds, and llama.cpp's do"

"""Rotary frequencies that are divided by factors, as GGUF files hold them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.tiny import tiny_config, tiny_model
from tests.models.tiny_gguf import write_tiny_gguf
from ulbq.errors import InputError
from ulbq.models.load import load_model
from ulbq.models.rope_factors import ROPE_FACTORS, scale_frequencies
from ulbq.models.source import resolve

LLAMA_31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WIDTH, BASE = 128, 500_000.0


def config(**scaling: Any) -> LlamaConfig:
    rope = {"rope_theta": BASE, "rope_type": "llama3" if scaling else "default", **scaling}
    return LlamaConfig(hidden_size=4 * WIDTH, num_attention_heads=4, head_dim=WIDTH, rope_parameters=rope)


def frequencies(scaled: LlamaConfig) -> torch.Tensor:
    return ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]


def factors(scaled: LlamaConfig) -> torch.Tensor:
    return 1.0 / BASE ** (torch.arange(0, WIDTH, 2) / WIDTH) / frequencies(scaled)


class TestScaleFrequencies:
    @pytest.mark.parametrize(
        "scaling",
        [
            LLAMA_31,
            LLAMA_31 | {"factor": 32.0},
            LLAMA_31 | {"factor": 3.5, "original_max_position_embeddings": 4096, "high_freq_factor": 8.0},
            LLAMA_31 | {"low_freq_factor": 2.0, "high_freq_factor": 6.0},
        ],
    )
    def test_finds_the_scaling_that_gave_the_factors(self, scaling: dict[str, float]) -> None:
        expected, found = config(**scaling), config()
        assert scale_frequencies(found, factors(expected))
        assert found.rope_parameters["rope_type"] == "llama3"
        torch.testing.assert_close(frequencies(found), frequencies(expected), rtol=1e-3, atol=0)

    def test_typical_bounds_are_found_to_the_number(self) -> None:
        found = config()
        assert scale_frequencies(found, factors(config(**LLAMA_31)))
        assert {key: found.rope_parameters[key] for key in LLAMA_31} == LLAMA_31

    def test_factors_of_one_scale_nothing(self) -> None:
        found = config()
        before = dict(found.rope_parameters)
        assert scale_frequencies(found, torch.ones(WIDTH // 2))
        assert found.rope_parameters == before

    @pytest.mark.parametrize(
        "odd",
        [
            torch.linspace(1, 2, WIDTH // 2),
            torch.ones(WIDTH // 2).index_fill(0, torch.tensor([3]), 1e30),
            torch.full((WIDTH // 2,), float("nan")),
            torch.zeros(WIDTH // 2),
            torch.full((WIDTH // 4,), 2.0),
        ],
        ids=["steady", "partial", "nan", "zeros", "width"],
    )
    def test_others_are_not_taken(self, odd: torch.Tensor) -> None:
        found = config()
        before = dict(found.rope_parameters)
        assert not scale_frequencies(found, odd)
        assert found.rope_parameters == before

    @pytest.mark.parametrize("base", [0.0, -1.0, float("inf"), float("nan")])
    def test_a_base_that_gives_no_frequencies(self, base: float) -> None:
        found = config()
        found.rope_parameters = {"rope_theta": base, "rope_type": "default"}
        assert not scale_frequencies(found, factors(config(**LLAMA_31)))


class TestGgufFile:
    def test_computes_what_the_scaled_model_computes(self, tmp_path: Path) -> None:
        plain = tiny_config("llama", tied=False)
        scaled = tiny_config("llama", tied=False)
        scaled.rope_parameters = plain.rope_parameters | LLAMA_31 | {"rope_type": "llama3"}
        model = tiny_model(scaled)
        width = scaled.head_dim
        unscaled = 1.0 / plain.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)
        path = write_tiny_gguf(
            model, tmp_path / "tiny.gguf", more={ROPE_FACTORS: unscaled / frequencies(scaled).float()}
        )
        opened = load_model(resolve(path), dtype=torch.float32)
        tokens = torch.arange(16).unsqueeze(0)
        own = tiny_model(plain)
        own.load_state_dict(opened.state_dict())
        torch.testing.assert_close(opened.model.rotary_emb.inv_freq, frequencies(scaled), rtol=1e-3, atol=0)
        assert not torch.allclose(opened(tokens).logits, own(tokens).logits, rtol=1e-5)

    def test_factors_that_transformers_cannot_apply_are_refused(self, tmp_path: Path) -> None:
        model = tiny_model(tiny_config("llama", tied=False))
        path = write_tiny_gguf(
            model, tmp_path / "tiny.gguf", more={ROPE_FACTORS: torch.tensor([1.0, 5, 2, 7, 1, 1, 1, 1])}
        )
        with pytest.raises(InputError, match=r"scales its rotary frequencies \('rope_freqs\.weight'\)"):
            resolve(path)

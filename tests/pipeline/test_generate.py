"""What a model writes, how it comes out, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.config.adapter import AdapterConfig
from ulbq.config.generate import GenerateRequest
from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.formats import AffineScheme
from ulbq.models.load import load_model, model_memory
from ulbq.models.source import ModelSource, resolve
from ulbq.models.spread import load_spread
from ulbq.pipeline.generate import Generation, generate

PROMPT = "once upon a time"
AFFINE = AffineScheme(bits=4, group_size=32)


@pytest.fixture
def parent(tmp_path: Path) -> ModelSource:
    return resolve(save_tiny("llama", tmp_path / "parent", tied=False))


def written(source: Path, **changes: Any) -> Generation:
    values: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 12, "dtype": "fp32", "device": "cpu", **changes}
    return generate(GenerateRequest(source=str(source), **values))


def expected(source: ModelSource, count: int, prompt: str = PROMPT, **options: Any) -> str:
    """What transformers writes, greedily unless told otherwise."""
    model = load_model(source, dtype=torch.float32)
    tokens = source.tokenizer()(prompt, return_tensors="pt").input_ids
    torch.manual_seed(0)
    out = model.generate(tokens, max_new_tokens=count, **{"do_sample": False, **options})
    return source.tokenizer().decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def test_it_writes_what_transformers_writes_piece_by_piece(parent: ModelSource) -> None:
    pieces: list[str] = []
    request = GenerateRequest(source=str(parent.path), prompt=PROMPT, max_new_tokens=12, dtype="fp32", device="cpu")
    done = generate(request, pieces.append)
    assert done.text == "".join(pieces) == expected(parent, 12)
    assert len(pieces) > 3
    assert (done.prompt_tokens, done.new_tokens) == (len(parent.tokenizer().encode(PROMPT)), 12)
    assert done.tokens_per_second == pytest.approx(11 / done.decode_seconds, rel=0.05)
    assert done.peak_memory > done.weight_memory > 0
    assert (done.cache_memory, done.device_memory) == (0, None)


def test_a_models_own_generation_settings_do_not_draw(parent: ModelSource) -> None:
    text = '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 9.0, "min_new_tokens": 8, "eos_token_id": 1}'
    greedy = written(parent.path)
    (parent.path / "generation_config.json").write_text(text)
    assert written(parent.path).text == greedy.text


def test_it_ends_where_the_model_says(parent: ModelSource) -> None:
    tokens = parent.tokenizer()(PROMPT, return_tensors="pt").input_ids
    out = load_model(parent, dtype=torch.float32).generate(tokens, max_new_tokens=12, do_sample=False)
    third = int(out[0, tokens.shape[1] + 2])
    (parent.path / "generation_config.json").write_text(f'{{"eos_token_id": [1, {third}]}}')
    assert written(parent.path).new_tokens <= 3


def test_packed_models_with_their_adapter_or_without(parent: ModelSource, tmp_path: Path) -> None:
    path = write_quantized(parent, tmp_path / "q", AFFINE, AdapterConfig(rank=4, alpha=6))
    both, base = written(path), written(path, adapter=False)
    assert both.text == expected(resolve(path), 12)
    assert both.text != base.text
    assert base.weight_memory < both.weight_memory < written(parent.path).weight_memory


def test_the_prefill_cache_is_filled_by_long_prompts_alone(parent: ModelSource, tmp_path: Path) -> None:
    path = write_quantized(parent, tmp_path / "q", AFFINE)
    long = {"prompt": "ab " * 60, "prefill_cache": True}
    assert written(path, prefill_cache=True).cache_memory == 0
    done = written(path, **long)
    blocks = sum(tensor.numel() for name, tensor in _weights(parent).items() if "proj" in name)
    assert done.cache_memory == 4 * blocks
    assert done.text == written(path, prompt=long["prompt"]).text


def _weights(source: ModelSource) -> dict[str, torch.Tensor]:
    return dict(load_model(source, dtype=torch.float32).named_parameters())


def test_tied_weights_count_once(tmp_path: Path) -> None:
    sizes = [
        model_memory(load_model(resolve(save_tiny("llama", tmp_path / str(tied), tied=tied)), dtype=torch.float32))
        for tied in (True, False)
    ]
    assert sizes[1].weights - sizes[0].weights == 256 * 64 * 4


def test_sampling_follows_the_seed(parent: ModelSource) -> None:
    texts = [written(parent.path, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert written(parent.path, top_p=1.0, seed=1).text != written(parent.path).text
    # Next to nothing to draw from, and next to no temperature: the likeliest token.
    greedy = written(parent.path).text
    assert written(parent.path, top_p=1e-6).text == written(parent.path, temperature=1e-4).text == greedy
    assert written(parent.path, temperature=0).text == greedy


def test_chat_puts_the_template_around_the_prompt(parent: ModelSource) -> None:
    done = written(parent.path, chat=True, repetition_penalty=1)
    assert done.text == expected(parent, 12, f"user: {PROMPT}\n")


def test_repetitions_are_penalized_in_a_chat(parent: ModelSource) -> None:
    question = f"user: {PROMPT}\n"
    text = {penalty: expected(parent, 12, question, repetition_penalty=penalty) for penalty in (1.0, 1.1, 2.5)}
    assert len(set(text.values())) > 1
    assert written(parent.path, chat=True).text == text[1.1]
    assert written(parent.path, chat=True, repetition_penalty=2.5).text == text[2.5]
    assert written(parent.path).text == written(parent.path, repetition_penalty=1).text
    assert written(parent.path).text != written(parent.path, repetition_penalty=2.5).text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "\udcff"}, "not UTF-8"),
        ({"temperature": 0, "top_p": 0.5}, "nothing to draw from"),
        ({"max_new_tokens": 500}, "more than the 256"),
        ({"prompt": "ab " * 400}, "more than the 256"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(parent: ModelSource, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        written(parent.path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}),
        *({"repetition_penalty": 0}, {"repetition_penalty": -1}, {"repetition_penalty": 11}),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest(prompt=PROMPT, **changes)


def test_a_model_without_a_chat_template(parent: ModelSource) -> None:
    (parent.path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        written(parent.path, chat=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predictions_that_are_not_finite(
    parent: ModelSource, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        model = load_spread(*args, **options)
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr("ulbq.serving.generator.load_spread", broken)
    with pytest.raises(NumericsError, match="not finite"):
        written(parent.path, temperature=temperature)

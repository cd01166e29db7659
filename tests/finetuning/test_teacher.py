"""Teachers against the model that they stand for."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.models.tiny import save_tiny, tiny_config, tiny_model
from ulbq.blockwise.streamed import StreamedModel
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.losses import Predicted, divergence
from ulbq.finetuning.teacher import CachedTeacher, PassedTeacher, StreamedTeacher, Targets
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.training.precision import Precision

TOKENS = torch.randint(3, 250, (5, 12), generator=torch.Generator().manual_seed(1))
PRECISION = Precision(torch.device("cpu"), torch.float32)
SOME = torch.tensor([3, 0])
EXAMPLES = Examples(TOKENS, 3)


def said(targets: Targets) -> Predicted:
    """The targets of two whole samples."""
    flat = targets.predict(torch.arange(2 * TOKENS.shape[1]))
    ids = None if flat.ids is None else flat.ids.unflatten(0, (2, -1))
    return Predicted(flat.values.unflatten(0, (2, -1)), ids)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


def test_a_streamed_targets_is_what_the_model_says(model: PreTrainedModel) -> None:
    targets = StreamedTeacher(model, EXAMPLES, PRECISION, hidden=True).targets(SOME)
    with torch.no_grad():
        expected = model(TOKENS[SOME], output_hidden_states=True)
    torch.testing.assert_close(said(targets).values, expected.logits.log_softmax(-1))
    assert targets.hidden is not None
    assert len(targets.hidden) == 3
    for ours, theirs in zip(targets.hidden[:-1], expected.hidden_states[1:], strict=False):
        torch.testing.assert_close(ours, theirs)
    assert StreamedTeacher(model, EXAMPLES, PRECISION).targets(SOME).hidden is None


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_cache_gives_back_the_best_guesses(limit: int, model: PreTrainedModel, tmp_path: Path) -> None:
    asked = StreamedTeacher(model, EXAMPLES, PRECISION)
    heard: list[int] = []
    cached = CachedTeacher(
        asked,
        EXAMPLES,
        top_k=7,
        device=PRECISION.device,
        limit=limit,
        directory=tmp_path,
        on_sample=lambda: heard.append(1),
    )
    assert len(heard) == len(TOKENS)
    targets, full = said(cached.targets(SOME)), said(asked.targets(SOME))
    best = full.values.topk(7, dim=-1)
    assert targets.ids is not None
    assert torch.equal(targets.ids, best.indices)
    torch.testing.assert_close(targets.values[..., :-1], best.values)
    torch.testing.assert_close(targets.values.exp().sum(-1), torch.ones(2, 12))


def test_a_cache_of_the_whole_vocabulary_teaches_the_same(model: PreTrainedModel, tmp_path: Path) -> None:
    asked = StreamedTeacher(model, EXAMPLES, PRECISION)
    cached = CachedTeacher(asked, EXAMPLES, top_k=9999, device=PRECISION.device, limit=1 << 30, directory=tmp_path)
    student = torch.randn(2, 12, 256, generator=torch.Generator().manual_seed(2))
    whole = divergence(said(asked.targets(SOME)), student)
    torch.testing.assert_close(divergence(said(cached.targets(SOME)), student), whole)


@pytest.mark.parametrize("masks", [None, "ragged"])
def test_all_examples_pass_a_model_that_is_not_loaded_before_it_is_asked(masks: str | None, tmp_path: Path) -> None:
    source = resolve(save_tiny("llama", tmp_path / "m"))
    loaded = StreamedTeacher(load_model(source, dtype=torch.float32), EXAMPLES, PRECISION)
    model = StreamedModel(source, dtype=torch.float32, device=PRECISION.device, directory=tmp_path)
    examples, exact = EXAMPLES, True
    if masks is not None:
        kept = torch.arange(12) < torch.tensor([12, 5, 9, 12, 7]).unsqueeze(1)
        examples, exact = Examples(TOKENS, 3, kept), False
        loaded = StreamedTeacher(load_model(source, dtype=torch.float32), examples, PRECISION)
    asked = PassedTeacher(model, examples)
    for index in range(len(TOKENS)):
        (values, ids), (expected, names) = asked.guesses(index, 7), loaded.guesses(index, 7)
        assert torch.equal(ids, names)
        torch.testing.assert_close(values, expected, atol=0 if exact else 1e-5, rtol=0)

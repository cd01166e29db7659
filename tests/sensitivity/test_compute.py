"""Scores against the whole model's own gradients and inputs; storage, resumption, the reader."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.models.tiny import FAMILIES, save_tiny
from ulbq.artifacts import BlockScores
from ulbq.blockwise.samples import Samples
from ulbq.errors import InputError, NumericsError
from ulbq.models.blocks import materialize, skeleton, structure
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.sensitivity import Saliency, SaliencySettings, Spectrum, block_file, compute_saliency, head, stored
from ulbq.sensitivity.passing import Passing, kept_every, kept_stores
from ulbq.training.precision import Precision

TOKENS = torch.randint(3, 250, (3, 32), generator=torch.Generator().manual_seed(7))
FP32 = Precision(torch.device("cpu"), torch.float32)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are stored in float32, so that only the computation is compared."""
    monkeypatch.setitem(stored._CEILING, "bf16", (torch.float32, 1.0))


def compute(source: ModelSource, folder: Path, kind: str = "fisher", **changes: Any) -> tuple[BlockScores, ...]:
    model = skeleton(source)
    names = {"dtype", "precision", "batch_size", "activation_memory"}
    settings: dict[str, Any] = {"kind": kind, "precision": FP32, **{k: v for k, v in changes.items() if k in names}}
    rest = {"tokens": None if kind == "magnitude" else TOKENS, "scratch": folder / "scratch", **changes}
    tokens = rest.pop("tokens")
    return compute_saliency(
        model,
        source,
        structure(model),
        None if tokens is None else Samples(tokens),
        SaliencySettings(**settings),
        folder,
        **{name: value for name, value in rest.items() if name not in names},
    )


def reader(folder: Path, blocks: Iterable[BlockScores]) -> Saliency:
    return Saliency(folder, [layer for block in blocks for layer in block.layers])


def gradients(source: ModelSource, kind: str) -> tuple[dict[str, torch.Tensor], float]:
    """What plain autograd on the whole model says, one sequence at a time; and the mean loss."""
    model = skeleton(source)
    materialize(model, source, torch.float32)
    model.requires_grad_(True)
    linears = [linear.name for block in structure(skeleton(source)).linears for linear in block]
    sums = {name: torch.zeros_like(model.get_submodule(name).weight) for name in linears}
    losses = []
    for row in TOKENS:
        model.zero_grad()
        loss = model(row[None], labels=row[None]).loss
        loss.backward()
        losses.append(loss.item())
        for name in linears:
            gradient = model.get_submodule(name).weight.grad
            if gradient is not None:
                sums[name] += gradient.square() if kind == "fisher" else gradient.abs() / len(TOKENS)
    return {name: value.detach() for name, value in sums.items()}, sum(losses) / len(losses)


def assert_equal(found: Saliency, expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found.score(name), value, rtol=tolerance, atol=tolerance * value.abs().max().item(), msg=name
        )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "deepseek"])
def test_fisher_is_that_of_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    source = resolve(save_tiny(family, tmp_path / "model", tied=tied))
    expected, loss = gradients(source, "fisher")
    blocks = compute(source, tmp_path)
    assert_equal(reader(tmp_path, blocks), expected)
    assert blocks[0].loss == pytest.approx(loss, rel=1e-5)
    for layer in (layer for block in blocks for layer in block.layers):
        assert layer.total == pytest.approx(expected[layer.name].double().sum().item(), rel=1e-5)
        assert layer.largest == pytest.approx(expected[layer.name].max().item(), rel=1e-4)


@pytest.mark.usefixtures("exact")
def test_gradient_is_the_mean_absolute_gradient(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    assert_equal(reader(tmp_path, compute(source, tmp_path, "gradient")), gradients(source, "gradient")[0])


@pytest.mark.usefixtures("exact")
def test_a_head_in_chunks_and_activations_on_disk_change_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(tiny_llama)
    monkeypatch.setattr(head, "HEAD_MEMORY", 1)  # sixteen positions, the least
    blocks = compute(source, tmp_path, activation_memory=0, batch_size=2)
    assert_equal(reader(tmp_path, blocks), gradients(source, "fisher")[0])
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.usefixtures("exact")
def test_inputs_that_are_computed_again_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(save_tiny("llama", tmp_path / "m", num_hidden_layers=9))
    kept, most, backward = tmp_path / "kept", [0, 0], Passing.backward

    def counted(walk: Passing, index: int, block: nn.Module) -> None:
        most[1] = max(most[1], len(walk._stores))
        backward(walk, index, block)

    monkeypatch.setattr(Passing, "backward", counted)
    for folder in (kept, tmp_path / "again"):
        folder.mkdir()
    whole = compute(source, kept)
    most[:] = [most[1], 0]
    again = compute(source, tmp_path / "again", activation_memory=0)
    assert most == [10, kept_stores(9, kept_every(9, fits=False))]
    names = [layer.name for block in whole for layer in block.layers]
    scores = [reader(tmp_path / name, blocks) for name, blocks in (("kept", whole), ("again", again))]
    assert all(torch.equal(scores[0].score(name), scores[1].score(name)) for name in names)
    # Llama-3-70B: 18 stores and not 81.
    assert kept_stores(80, kept_every(80, fits=False)) == 18


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_kinds_that_look_at_inputs(family: str, tmp_path: Path) -> None:
    source = resolve(save_tiny(family, tmp_path / "model"))
    model = load_model(source, dtype=torch.float32)
    linears = [linear.name for block in structure(skeleton(source)).linears for linear in block]
    squares: dict[str, torch.Tensor] = {}
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: squares.__setitem__(name, arguments[0].square().sum((0, 1)))
        )
    with torch.no_grad():
        model(TOKENS)
    weights = {name: model.get_submodule(name).weight.detach().abs() for name in linears}
    hessian = reader(tmp_path, compute(source, tmp_path, "hessian", batch_size=2))
    assert hessian.row(linears[0]).shape == (1, 64)
    assert_equal(hessian, {name: squares[name].expand_as(weights[name]) for name in linears})
    expected = {name: weights[name] * squares[name].sqrt() for name in linears}
    assert_equal(reader(tmp_path, compute(source, tmp_path, "wanda")), expected)
    assert_equal(reader(tmp_path, compute(source, tmp_path, "magnitude")), weights)


def test_a_layer_that_nobody_calls_scores_zero(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    for kind in ("fisher", "hessian", "wanda"):
        scores = reader(tmp_path, compute(resolve(tiny_llama), tmp_path, kind))
        assert not scores.score("model.layers.1.mlp.up_proj").any(), kind
        assert scores.score("model.layers.1.mlp.down_proj").any(), kind


@pytest.mark.usefixtures("exact")
def test_a_weight_that_the_model_uses_by_itself_counts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_itself(self: Any, x: torch.Tensor) -> torch.Tensor:
        again = nn.functional.linear(self.up_proj(x).tanh() @ self.gate_proj.weight, self.up_proj.weight)
        return self.down_proj(self.up_proj(x) * again)

    monkeypatch.setattr(LlamaMLP, "forward", by_itself)
    source = resolve(tiny_llama)
    assert_equal(reader(tmp_path, compute(source, tmp_path)), gradients(source, "fisher")[0])


def test_a_run_goes_on_where_it_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    straight = compute(source, tmp_path)
    whole = {index: (tmp_path / block_file(index)).read_bytes() for index in range(3)}
    for done in ({2}, {1}, {0, 2}, {0, 1, 2}):
        folder = tmp_path / "".join(map(str, done))
        folder.mkdir()
        written: list[int] = []
        again = compute(
            source,
            folder,
            done={index: straight[index] for index in done},
            on_block=lambda scores, written=written: written.append(scores.index),
        )
        assert written == sorted({0, 1, 2} - done, reverse=True)
        assert again == straight
        for index in written:
            assert (folder / block_file(index)).read_bytes() == whole[index]


@pytest.mark.parametrize(("dtype", "least", "most"), [("bf16", 5e-4, 2.5e-3), ("fp16", 5e-5, 3e-4)])
def test_what_storage_loses_is_told(dtype: str, least: float, most: float, tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    expected = gradients(source, "fisher")[0]
    blocks = compute(source, tmp_path, dtype=dtype)
    scores = reader(tmp_path, blocks)
    for layer in (layer for block in blocks for layer in block.layers):
        difference = (scores.score(layer.name) - expected[layer.name]).abs().sum() / expected[layer.name].sum()
        assert least < layer.rounding < most
        assert difference.item() == pytest.approx(layer.rounding, rel=0.02)
        assert layer.vanished < 1e-3


def test_float16_reaches_twelve_powers_of_ten_down() -> None:
    values = torch.tensor([[1e4, 1e-5, 1e-7, 1e-12, 0.0]])
    for dtype, kept in (("bf16", 4), ("fp16", 3)):
        held, scale = stored._encode(values, dtype)
        assert int((held.float() * scale > 0).sum()) == kept
        assert held.isfinite().all()
        assert (held[0, 0].float() * scale).item() == pytest.approx(1e4, rel=1e-6)


def test_bf16_products_give_nearly_the_same_scores(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    expected = gradients(source, "fisher")[0]
    found = reader(tmp_path, compute(source, tmp_path, precision=Precision(torch.device("cpu"), torch.bfloat16)))
    for name, value in expected.items():
        assert 1e-3 < ((found.score(name) - value).norm() / value.norm()).item() < 0.1, name


def test_the_reader_names_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    scores = reader(tmp_path, compute(resolve(tiny_llama), tmp_path, "magnitude"))
    with pytest.raises(InputError, match="no scores for 'lm_head'"):
        scores.score("lm_head")
    with pytest.raises(InputError):
        Saliency.open(tiny_llama)


def test_a_loss_that_is_not_finite_is_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)) * torch.inf)
    with pytest.raises(NumericsError):
        compute(resolve(tiny_llama), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("times", [1, 3])
def test_the_spectrum_agrees_with_sorting(times: int) -> None:
    scores = torch.randn(300, 100, generator=torch.Generator().manual_seed(1)).pow(4)
    spectrum = Spectrum()
    spectrum.add(scores, times=times)
    ordered = scores.flatten().sort(descending=True).values.double()
    assert spectrum.total == pytest.approx(times * ordered.sum().item(), rel=1e-9)
    for fraction in (0.001, 0.01, 0.1, 1.0):
        share = (ordered[: round(fraction * 30000)].sum() / ordered.sum()).item()
        assert spectrum.share(fraction) == pytest.approx(share, rel=1e-3)


def test_the_spectrum_of_nothing_and_of_equals() -> None:
    assert Spectrum().share(0.1) == 0
    flat = Spectrum()
    flat.add(torch.full((50, 20), 0.3))
    assert flat.share(0.1) == pytest.approx(0.1)

"""What errors at outputs cost, against the whole model's own gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import save_tiny
from ulbq.blockwise.samples import Samples
from ulbq.models.blocks import skeleton, structure
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.progress import Silent
from ulbq.sensitivity import outputs
from ulbq.sensitivity.outputs import OutputCosts, OutputSettings, read_outputs, weigh_outputs
from ulbq.training.precision import Precision

TOKENS = torch.randint(3, 250, (3, 32), generator=torch.Generator().manual_seed(7))
CPU = torch.device("cpu")


def compute(
    source: ModelSource, folder: Path, done: frozenset[int] = frozenset(), **changes: Any
) -> dict[str, OutputCosts]:
    model = skeleton(source)
    found = structure(model)
    given = {"precision": Precision(CPU, torch.float32), "groups": 4, "between": True, "seed": None}
    folder.mkdir(exist_ok=True)
    settings = OutputSettings(**{**given, **changes})
    weigh_outputs(
        model,
        source,
        found,
        Samples(TOKENS),
        settings,
        folder,
        scratch=folder,
        progress=Silent(),
        done=done,
        on_block=lambda index: None,
    )
    costs: dict[str, OutputCosts] = {}
    for index, linears in enumerate(found.linears):
        prefix = f"{found.blocks_prefix}.{index}."
        names = tuple(linear.name.removeprefix(prefix) for linear in linears)
        costs |= {prefix + name: one for name, one in read_outputs(folder, index, names, CPU).items()}
    return costs


def seen(source: ModelSource, layers: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs ``[samples, length, in]`` and gradients ``[samples, length, out]`` of layers, by plain autograd."""
    model = load_model(source, dtype=torch.float32).requires_grad_(True)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            inputs[name].append(arguments[0].detach())
            output.register_hook(lambda gradient: gradients[name].append(gradient.detach()))

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_hook(watch(name))
    for row in TOKENS:
        model(row[None], labels=row[None]).loss.backward()
    return {name: (torch.cat(inputs[name]), torch.cat(gradients[name])) for name in layers}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_they_are_those_of_the_whole_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_shrunk", lambda total, fourth, count: total)
    source = resolve(save_tiny(family, tmp_path / "model"))
    costs = compute(source, tmp_path / "costs")
    for name, (inputs, gradients) in seen(source, list(costs)).items():
        groups = torch.stack([part.square().mean(2) for part in gradients.tensor_split(4, 2)], 2)
        mean = (groups * inputs.square().mean(2, keepdim=True)).mean((0, 1))
        torch.testing.assert_close(costs[name].tokens, groups / mean, rtol=1e-3, atol=1e-3, msg=name)
        sizes, rows = inputs.square().mean(2).flatten(), gradients.flatten(0, 1)
        expected = (rows * sizes.unsqueeze(1)).T @ rows
        tolerance = 1e-3 * expected.abs().max().item()
        torch.testing.assert_close(costs[name].between, expected, rtol=1e-3, atol=tolerance, msg=name)


def test_the_models_own_tokens_are_drawn_by_the_seed(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    text, one, again, other = (
        compute(source, tmp_path / str(place), seed=seed) for place, seed in enumerate([None, 1, 1, 2])
    )
    for name, costs in one.items():
        assert torch.equal(costs.tokens, again[name].tokens)
        assert not torch.equal(costs.tokens, other[name].tokens)
        assert not torch.equal(costs.tokens, text[name].tokens)


def test_blocks_that_are_done_are_passed_through(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    compute(source, tmp_path / "costs", groups=1, between=False)
    files = sorted((tmp_path / "costs").iterdir())
    written = [path.read_bytes() for path in files]
    files[0].unlink()
    kept = files[1].stat().st_mtime_ns
    compute(source, tmp_path / "costs", frozenset({1}), groups=1, between=False)
    assert [path.read_bytes() for path in files] == written
    assert files[1].stat().st_mtime_ns == kept


def test_noise_is_shrunk_away_and_structure_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 64, generator=generator)
    structure = torch.randn(20000, 1, generator=generator) * torch.linspace(-1, 1, 64) + 0.1 * torch.randn(
        20000, 64, generator=generator
    )

    def shrunk(rows: torch.Tensor) -> torch.Tensor:
        return outputs._shrunk(rows.T @ rows, rows.double().square().sum(1).square().sum().item(), len(rows))

    def off_diagonal(matrix: torch.Tensor) -> float:
        return (matrix - matrix.diagonal().diag()).norm().item()

    assert off_diagonal(shrunk(noise)) < 0.2 * off_diagonal(noise.T @ noise / 200)
    assert off_diagonal(shrunk(structure)) > 0.95 * off_diagonal(structure.T @ structure / 20000)

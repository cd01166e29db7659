"""States of a training run come back to the bit, from files that hold no pickle."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ulbq.errors import InputError
from ulbq.training.checkpoint import load_generators, load_optimizer, save_generators, save_optimizer


def training() -> tuple[nn.Linear, torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    groups = [{"params": [layer.weight], "lr": 0.1, "weight_decay": 0.3}, {"params": [layer.bias], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    return layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (3 + step))


def steps(layer: nn.Linear, optimizer: torch.optim.AdamW, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    for number in range(3):
        layer(torch.full((2, 4), number + 0.3)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_an_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    layer, optimizer, schedule = training()
    steps(layer, optimizer, schedule)
    save_optimizer(tmp_path, optimizer, schedule)
    values = [parameter.detach().clone() for parameter in layer.parameters()]
    steps(layer, optimizer, schedule)

    other, fresh, anew = training()
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), values, strict=True):
            parameter.copy_(value)
    load_optimizer(tmp_path, fresh, anew)
    assert fresh.param_groups[0]["betas"] == (0.8, 0.95)
    steps(other, fresh, anew)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)
    assert anew.state_dict() == schedule.state_dict()


def test_generators_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), random.random(), float(np.random.standard_normal()), torch.rand(()).item()

    draw()  # an odd number of normal ones: the second of a pair waits
    save_generators(tmp_path, 1)
    wanted = [draw() for _ in range(3)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    load_generators(tmp_path, 1)
    assert [draw() for _ in range(3)] == wanted


def test_nothing_is_pickled(tmp_path: Path) -> None:
    layer, optimizer, schedule = training()
    steps(layer, optimizer, schedule)
    save_optimizer(tmp_path, optimizer, schedule)
    save_generators(tmp_path, 0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("text", ["", "[1]", '{"groups": []}'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    layer, optimizer, schedule = training()
    steps(layer, optimizer, schedule)
    save_optimizer(tmp_path, optimizer, schedule)
    (tmp_path / "optimizer.json").write_text(text)
    with pytest.raises(InputError, match=r"optimizer\.json"):
        load_optimizer(tmp_path, optimizer, schedule)

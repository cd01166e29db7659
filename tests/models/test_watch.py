from contextlib import suppress

import torch
from torch import nn

from ulbq.models.watch import Enough, Input, distinct_inputs, watching


class Block(nn.Module):
    """q and k read the same tensor, o its own, down is called twice, spare never."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.down, self.spare = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.o(self.k(x) + self.q(x))
        return self.down(self.down(x))


def layers(block: Block) -> dict[str, nn.Module]:
    return dict(block.named_children())


def test_layers_that_are_called_with_the_very_same_tensor_share_an_input() -> None:
    block = Block()
    found = distinct_inputs(layers(block), lambda: block(torch.ones(1, 5, 4)))
    assert found == [Input(("k", "q"), 1, 5), Input(("o",), 1, 5), Input(("down",), 2, 10), Input(("spare",), 0, 0)]


def test_equal_values_are_not_the_same_tensor() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def run() -> None:
        first(torch.ones(1, 4))
        second(torch.ones(1, 4))

    assert len(distinct_inputs({"first": first, "second": second}, run)) == 2


def test_watching_ends_with_its_context_and_where_enough_is_seen() -> None:
    block, seen = Block(), list[str]()

    def see(name: str, tensor: torch.Tensor) -> None:
        seen.append(name)
        if name == "o":
            raise Enough

    with watching(layers(block), see), suppress(Enough):
        block(torch.ones(1, 4))
    block(torch.ones(1, 4))
    assert seen == ["k", "q", "o"]

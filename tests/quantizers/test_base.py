"""One cast for all layers that read a tensor."""

import torch

from ulbq.quantizers.base import cast_once

HALF = torch.bfloat16


def test_it_is_made_once_and_anew_for_other_values() -> None:
    x = torch.ones(3)
    first = cast_once(x, HALF)
    assert cast_once(x, HALF) is first
    assert cast_once(x, torch.float32) is x
    x.add_(1)
    assert torch.equal(cast_once(x, HALF), torch.full((3,), 2, dtype=HALF))
    assert cast_once(x, torch.float16).dtype == torch.float16


def test_one_without_a_gradient_does_not_serve_where_one_is_wanted() -> None:
    x = torch.ones(3, requires_grad=True) * 1
    with torch.no_grad():
        assert not cast_once(x, HALF).requires_grad
    assert cast_once(x, HALF).requires_grad
    with torch.no_grad():
        assert not cast_once(x, HALF).requires_grad


def test_gradients_of_all_readers_arrive() -> None:
    x = torch.ones(3, requires_grad=True)
    read = x * 1
    (cast_once(read, HALF).sum() + 2 * cast_once(read, HALF).sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 3.0))

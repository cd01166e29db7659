"""The compiled attention against float64, in every shape that it takes: values and gradients."""

import pytest
import torch

from ulbq.kernels import attention, build

pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None or not build.has_pairs(),
    reason=str(build.unavailable_reason()) or "no products of pairs",
)

TOLERANCE = 8e-3
"""Of the relative norm: results are rounded by 2⁻⁹ at most, and so are probabilities; gradients take differences."""


def inputs(heads: int, shared: int, length: int, width: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, n, width) for n in (heads, shared, shared, heads)]
    # As models have them: heads and positions are transposed views.
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    )


def assert_near(found: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    """Outputs and gradients are those of float64."""
    *double, incoming = (x.detach().double().requires_grad_() for x in given)
    wanted = exact(*double)
    for one, other in zip(found, [wanted, *torch.autograd.grad(wanted, double, incoming)], strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all()
        # A few tokens have little choice: gradients near 0, as differences of larger numbers.
        assert (one.double() - other).norm() <= TOLERANCE * torch.maximum(other.norm(), 0.5 * incoming.norm())


def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
    *tensors, incoming = given
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = attention.attend(*leaves, 0.2)
    return [output, *torch.autograd.grad(output, leaves, incoming)]


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
def test_values_and_gradients(heads: int, shared: int, length: int, width: int) -> None:
    given = inputs(heads, shared, length, width)
    assert attention.takes(*given[:3])
    assert_near(run(given), given)


def test_any_number_of_threads_gives_the_same() -> None:
    given, before = inputs(6, 2, 130, 64), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_it_does_not_take() -> None:
    query, key, value, _ = inputs(2, 2, 5, 16)
    assert not attention.takes(query.float(), key, value)
    assert not attention.takes(query, key, value[..., :8])
    assert not attention.takes(*(x[..., :8] for x in (query, key, value)))


def test_large_scores_do_not_overflow() -> None:
    given = inputs(2, 2, 70, 32)
    given[0] = given[0] * 100
    found = run(given)
    assert all(x.isfinite().all() for x in found)
    wanted = exact(*(x.double() for x in given[:3]))
    assert (found[0].double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("broken", ["mask", "head", "scale"])
def test_a_broken_kernel_does_not_pass(broken: str) -> None:
    given = inputs(4, 2, 70, 32)
    spoiled = list(given)
    if broken == "mask":  # a token looks at the one behind it
        spoiled[1], spoiled[2] = given[1].roll(-1, 2), given[2].roll(-1, 2)
    if broken == "head":  # heads take keys in turns
        spoiled[1] = given[1].flip(1)
    if broken == "scale":
        spoiled[0] = given[0] * 1.05
    with pytest.raises(AssertionError):
        assert_near(run(spoiled), given)

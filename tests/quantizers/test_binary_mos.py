import pytest
import torch

from ulbq import formats
from ulbq.config.groups import Zeros
from ulbq.formats import AffineScheme, BinaryMosScheme, binary_mos
from ulbq.quantizers.binary_mos import STE_BOUND, BinaryMosQuantizer, closed_form_start, rank_one

ROWS, COLUMNS = 24, 40
SCHEMES = [
    BinaryMosScheme(experts=4),
    BinaryMosScheme(experts=1),
    BinaryMosScheme(experts=3, zeros="output"),
    BinaryMosScheme(experts=2, zeros="input"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def weights(seed: int = 0) -> torch.Tensor:
    """Rows and columns of different sizes, and a mean that is not 0."""
    rows = draw(ROWS, 1, seed=seed + 1).exp()
    columns = draw(COLUMNS, seed=seed + 2).mul(0.5).exp()
    return (draw(ROWS, COLUMNS, seed=seed) + 0.3) * rows * columns * 0.05


def importance() -> torch.Tensor:
    return draw(COLUMNS, seed=9).exp() * 4


def quantizer(scheme: BinaryMosScheme, *, train_weights: bool = True, moved: bool = False) -> BinaryMosQuantizer:
    """With ``moved``, at some distance from its start, as after training."""
    generator = torch.Generator().manual_seed(4)
    start = closed_form_start(weights(), scheme, importance=importance(), generator=generator)
    made = BinaryMosQuantizer(weights(), start, scheme, train_weights=train_weights)
    if moved:
        with torch.no_grad():
            for i, parameter in enumerate(made.parameters()):
                parameter += 0.3 * draw(*parameter.shape, seed=20 + i)
    return made


def error(weight: torch.Tensor, scheme: BinaryMosScheme, cost: torch.Tensor) -> float:
    start = closed_form_start(weight, scheme, importance=cost)
    made = BinaryMosQuantizer(weight, start, scheme)
    return ((made.dense(made()) - weight).square() * cost).sum().item()


class TestStart:
    def test_rank_one_is_the_first_singular_pair(self) -> None:
        u, v = rank_one(weights())
        left, sigma, right = torch.linalg.svd(weights().abs().double())
        torch.testing.assert_close(u.double(), sigma[0].sqrt() * left[:, 0].abs(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v.double(), sigma[0].sqrt() * right[0].abs(), rtol=1e-5, atol=1e-6)
        assert u.min() > 0
        assert v.min() > 0

    def test_weighted_rank_one_solves_the_weighted_problem(self) -> None:
        cost = importance().double()
        u, v = (factor.double() for factor in rank_one(weights(), importance()))
        left, sigma, right = torch.linalg.svd(weights().abs().double() * cost.sqrt())
        expected = sigma[0] * torch.outer(left[:, 0], right[0]) / cost.sqrt()
        torch.testing.assert_close(torch.outer(u, v), expected, rtol=1e-5, atol=1e-6)

    def test_a_column_or_a_layer_that_is_never_used_still_has_scales(self) -> None:
        cost = importance()
        cost[::3] = 0
        assert rank_one(weights(), cost)[1].min() > 0
        unused, plain = rank_one(weights(), torch.zeros(COLUMNS)), rank_one(weights())
        torch.testing.assert_close(unused, plain)

    def test_the_experts_are_copies_and_the_router_is_that_of_a_linear_layer(self) -> None:
        scheme = BinaryMosScheme(experts=64)
        first = closed_form_start(weights(), scheme, generator=torch.Generator().manual_seed(1))
        again = closed_form_start(weights(), scheme, generator=torch.Generator().manual_seed(1))
        assert first.router is not None
        assert torch.equal(first.router, again.router)
        assert torch.equal(first.in_scales, first.in_scales[:1].expand(64, -1))
        # nn.Linear draws from ±1/√in.
        assert 0.95 < first.router.abs().max() * COLUMNS**0.5 <= 1
        assert abs(first.router.mean()) * COLUMNS**0.5 < 0.05

    def test_the_router_knows_the_size_of_the_inputs(self) -> None:
        scheme = BinaryMosScheme(experts=2)
        small, large = (
            closed_form_start(
                weights(), scheme, importance=torch.full((COLUMNS,), size), generator=torch.Generator().manual_seed(1)
            ).router
            for size in (1.0, 100.0)
        )
        torch.testing.assert_close(small, 10 * large)

    @pytest.mark.parametrize("zeros", ["output", "input"])
    def test_zeros_are_least_squares_and_lower_the_error(self, zeros: Zeros) -> None:
        cost = importance()
        plain, shifted = (error(weights(), BinaryMosScheme(experts=1, zeros=z), cost) for z in ("none", zeros))
        assert shifted < 0.98 * plain

    @pytest.mark.parametrize("zeros", ["output", "input"])
    def test_zeros_are_found_where_they_are(self, zeros: Zeros) -> None:
        scheme = BinaryMosScheme(experts=1, zeros=zeros)
        signs = torch.where(draw(64, 64) >= 0, 1.0, -1.0)
        shifts = torch.full((64,), 0.4)
        weight = 0.1 * binary_mos.shift(scheme, signs, shifts)
        start = closed_form_start(weight, scheme)
        assert start.zeros is not None
        assert torch.equal(start.signs, signs)
        assert (start.zeros - 0.4).abs().max() < 0.15

    def test_a_row_and_a_matrix_of_zeros_stay_finite(self) -> None:
        weight = weights()
        weight[3] = 0
        for matrix in (weight, torch.zeros_like(weight)):
            for scheme in SCHEMES:
                made = BinaryMosQuantizer(matrix, closed_form_start(matrix, scheme), scheme)
                packed = made.finalize()
                assert all(torch.isfinite(tensor).all() for tensor in packed.values())
                assert all(torch.isfinite(parameter).all() for parameter in made.parameters())
                assert formats.dequantize(scheme, packed, COLUMNS)[3].abs().max() < 1e-6


@every_scheme
def test_gradients_are_those_of_the_plain_equation(scheme: BinaryMosScheme) -> None:
    made = quantizer(scheme, moved=True)
    x, incoming = draw(5, COLUMNS, seed=5), draw(5, ROWS, seed=6)
    (made.multiply(x, made()) * incoming).sum().backward()

    own = {name: p.detach().double().requires_grad_() for name, p in made.named_parameters()}
    signs = torch.where(own["latents"].detach() >= 0, 1.0, -1.0).double().requires_grad_()
    zeros = own.get("zeros")
    factor = signs if zeros is None else signs + (zeros[:, None] if scheme.zeros == "output" else zeros[None])
    inner, outer = own["in_scales"] * made.in_unit.double(), own["out_scales"] * made.out_unit.double()
    gates = torch.ones(5, 1, dtype=torch.float64)
    if scheme.experts > 1:
        gates = (x.double() @ (own["router"] * made.router_unit.double()).T).softmax(-1)
    y = ((x.double() * (gates @ inner)) @ factor.T) * (gates @ outer)
    (y * incoming.double()).sum().backward()

    torch.testing.assert_close(made.multiply(x, made()).double(), y, rtol=1e-4, atol=1e-5)
    for name, parameter in made.named_parameters():
        expected = own[name].grad
        if name == "latents":
            inside = own["latents"].detach().abs() < STE_BOUND
            assert 0.2 < inside.float().mean() < 0.9
            expected = signs.grad * inside
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-3, atol=1e-4)
        assert parameter.grad.abs().max() > 0


@every_scheme
def test_what_is_packed_is_what_was_trained(scheme: BinaryMosScheme) -> None:
    made = quantizer(scheme, moved=True)
    packed = made.finalize()
    x = draw(2, 7, COLUMNS, seed=5)
    simulated = made.multiply(x, made())
    stored = formats.multiply(scheme, packed, x, formats.matrix(scheme, packed, COLUMNS))
    assert (stored - simulated).abs().max() < 2**-9 * simulated.abs().max()
    dense = formats.dequantize(scheme, packed, COLUMNS)
    torch.testing.assert_close(dense, made.dense(made()).detach(), rtol=5e-3, atol=1e-4)


@every_scheme
@pytest.mark.parametrize("train_weights", [True, False])
def test_an_artifact_goes_on_where_it_ended(scheme: BinaryMosScheme, train_weights: bool) -> None:
    packed = quantizer(scheme, moved=True).finalize()
    packed["in_scales"][0, 3] = 0
    packed["in_scales"][:, 5] = 6e-8
    packed["out_scales"][-1, 2] = -0.5
    again = BinaryMosQuantizer.from_packed(weights(), packed, scheme, train_weights=train_weights)
    found = again.finalize()
    assert found.keys() == packed.keys()
    assert all(torch.equal(found[name], packed[name]) for name in packed)
    signs = binary_mos.unpack(scheme, packed, COLUMNS).signs
    assert torch.equal(again.latents >= 0, signs > 0)
    assert torch.isfinite(again.latents).all()


def test_latents_of_an_artifact_are_as_near_to_the_weight_as_their_codes_allow() -> None:
    scheme = BinaryMosScheme(experts=2)
    start = quantizer(scheme)
    again = BinaryMosQuantizer.from_packed(weights(), start.finalize(), scheme)
    torch.testing.assert_close(again.latents, start.latents, rtol=5e-3, atol=2e-3)
    flipped = start.finalize()
    flipped["codes"] = ~flipped["codes"]
    assert BinaryMosQuantizer.from_packed(weights(), flipped, scheme).latents.abs().max() < 2e-3


def test_another_format_is_no_start() -> None:
    with pytest.raises(TypeError, match="affine"):
        BinaryMosQuantizer.from_packed(weights(), {}, AffineScheme())


@every_scheme
def test_roles(scheme: BinaryMosScheme) -> None:
    made, frozen = quantizer(scheme), quantizer(scheme, train_weights=False)
    count = 2 if scheme.zeros == "none" else 3
    routers = 1 if scheme.experts > 1 else 0
    assert {role: len(found) for role, found in made.trainable().items()} == {
        "weights": 1,
        "scales": count,
        "router": routers,
    }
    assert frozen.trainable()["weights"] == []
    owned = {id(p) for found in made.trainable().values() for p in found}
    assert owned == {id(p) for p in made.parameters()}
    frozen.multiply(draw(3, COLUMNS), frozen()).sum().backward()
    assert all(p.grad is not None for p in frozen.parameters())


@every_scheme
def test_scales_start_at_one_whatever_the_size_of_the_weight(scheme: BinaryMosScheme) -> None:
    for size in (1e-3, 1.0, 100.0):
        start = closed_form_start(weights() * size, scheme)
        made = BinaryMosQuantizer(weights() * size, start, scheme)
        assert torch.equal(made.in_scales, torch.ones_like(made.in_scales))
        assert torch.equal(made.out_scales, torch.ones_like(made.out_scales))
        assert 0.5 < made.latents.abs().median() < 2


def test_training_beats_the_start_and_more_experts_fit_more() -> None:
    """Tokens of two kinds that want different output scales: only a router can tell them apart."""
    kind = (torch.arange(256) % 2).float()
    x = draw(256, COLUMNS, seed=7)
    x[:, 0] = 6 * kind - 3
    wanted = (x @ weights().T) * (1 + kind).unsqueeze(1)
    rates = {"weights": 0.02, "scales": 0.02, "router": 0.05}

    def trained(experts: int) -> tuple[float, float]:
        made = quantizer(BinaryMosScheme(experts=experts))
        optimizer = torch.optim.Adam([{"params": p, "lr": rates[role]} for role, p in made.trainable().items() if p])
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = (made.multiply(x, made()) - wanted).square().mean() / wanted.square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    start, one = trained(1)
    _, four = trained(4)
    assert one < 0.9 * start
    assert four < 0.85 * one


def test_autocast_and_half_precision_give_nearly_the_same() -> None:
    made = quantizer(BinaryMosScheme(experts=4, zeros="output"), moved=True)
    x = draw(5, COLUMNS, seed=5)
    exact = made.multiply(x, made())
    with torch.autocast("cpu", torch.bfloat16):
        rough = made.multiply(x, made(torch.bfloat16))
    plain = made.multiply(x.bfloat16(), made(torch.bfloat16))
    assert rough.dtype == plain.dtype == torch.bfloat16
    for found in (rough, plain):
        assert (found - exact).norm() / exact.norm() < 0.02

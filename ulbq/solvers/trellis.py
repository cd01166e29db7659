"""Trellis codes tile by tile, the error of each 16 inputs made good in those after them (block LDLQ, QTIP).

The weight is searched where the format stores it, between the two transforms (:mod:`ulbq.formats.trellis`), and the
Hessian goes along: ``H' = H_in · diag(su) · H · diag(su) · H_in``. With ``H'⁻¹ = UᵀU`` and a block of 16 columns
``B``, the error ``E`` of its tiles is made good by ``W_j −= E · U_BB⁻¹ U_Bj`` in all later columns, which is what GPTQ
does with blocks of one. Within a tile the search takes plain squares: the transforms leave little between neighbours.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ulbq.formats import trellis
from ulbq.formats.bits import stored_bits
from ulbq.formats.trellis import TILE, Trellis, TrellisScheme
from ulbq.kernels import solvers, trellis_launch
from ulbq.solvers.hessian import HessianFactor, factorize, make_good

_BEST_SCALE = {1: 1.1, 2: 0.96, 3: 0.91, 4: 0.88}
"""Standard deviation of what is coded, by the bits: the values of the states have 1, and a Gaussian's error is least
there (``benchmarks/trellis_codes.py``)."""
_ERRORS = {1: 0.33, 2: 0.0724, 3: 0.0187, 4: 0.0052}
"""Mean squared error of a Gaussian of variance 1, by the bits, with states of 12 bits (the same script). A single bit's
is 0.28; what it hands on to later tiles, which are coded too, adds a sixth. With states of 16 bits all are a few
percent less, which changes no allocation."""
_TINY = 1e-12
_RIDGE = 1e-6
_MOST_ORIGINS = 1 << 28
"""Bytes of back pointers that the search with torch holds at once."""


class Demand(NamedTuple):
    """What bits would do for one matrix.

    Attributes:
        shape: rows and columns.
        loss: of codes without any error made smaller by bits: times :data:`_ERRORS`, what codes of so many bits cost.
    """

    shape: tuple[int, int]
    loss: float


class TrellisSolution(NamedTuple):
    """What :func:`solve` found.

    Attributes:
        trellis: codes, ``su`` and ``sv``.
        weight: ``[out, in]`` float32, what they stand for.
        damping: the one that was used, above the one asked for where that left the Hessian singular.
    """

    trellis: Trellis
    weight: torch.Tensor
    damping: float


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: TrellisScheme,
    generator: torch.Generator,
    damping: float = 0.01,
    outputs: torch.Tensor | None = None,
) -> TrellisSolution:
    """Codes and scales of one matrix.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``[in, in]`` of the layer's squared output error, in the matrix's own coordinates.
        scheme: bits and states.
        generator: of the signs, on the CPU.
        damping: share of the mean diagonal that is added to the diagonal.
        outputs: ``[out, out]``, what errors of two outputs cost together; None for nothing.
    """
    su, sv = scales(weight, scheme.bits, generator)
    factor, inner = _factored(hessian, su, damping), inverse_between(weight, su, sv)
    if outputs is None:
        codes, found = _by_blocks(inner, factor, scheme)
    else:
        codes, found = _by_tiles(inner, factor, _factored(outputs, sv, damping), scheme)
    sv = fitted(weight, hessian, found, su, sv, outputs)
    return TrellisSolution(Trellis(codes, su, sv), trellis.between(found, su, sv), factor.damping)


def scales(weight: torch.Tensor, bits: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs and scales ``su [in]`` and ``sv [out]`` that leave blocks of one variance between the transforms.

    With the same rate everywhere, the error of a mixture of columns is least where all have one norm; that of a
    mixture of rows, which all cost the same, where their norms are the roots of what they were. Both are rounded to
    float16, as they will be stored.
    """
    rows, columns = weight.shape
    sv = weight.square().mean(1).sqrt().clamp_min(_TINY).sqrt()
    su = (weight / sv.unsqueeze(1)).square().mean(0).sqrt()
    su = torch.where(su > 1e-4 * su.mean(), su, su.mean().clamp_min(_TINY))
    width = trellis.block_width(rows)
    left = (weight / su).square().mean(1) / sv.square()
    sv = sv * left.unflatten(0, (-1, width)).mean(1).sqrt().clamp_min(_TINY).repeat_interleave(width)
    signs = [(torch.rand(count, generator=generator) < 0.5).to(weight.device) for count in (columns, rows)]
    norm = su.square().mean().sqrt()
    su, sv = su / norm, sv * norm / _BEST_SCALE[bits]
    su, sv = (torch.where(sign, -one, one) for sign, one in zip(signs, (su, sv), strict=True))
    return su.half().float(), sv.half().float()


@torch.no_grad()
def demand(weight: torch.Tensor, hessian: torch.Tensor, cost: float, damping: float = 0.01) -> Demand:
    """What bits would do for a matrix ``[out, in]``, from the factor alone.

    Args:
        weight: float32.
        hessian: ``[in, in]``.
        cost: of a squared output error, in a unit that all layers share.
        damping: as :func:`solve` takes it.
    """
    su, sv = scales(weight, 1, torch.Generator().manual_seed(0))
    upper = _factored(hessian, su, damping).upper
    blocks = [upper[i : i + TILE, i : i + TILE] for i in range(0, len(upper), TILE)]
    identity = torch.eye(TILE, device=weight.device).expand(len(blocks), -1, -1)
    shared = torch.linalg.solve_triangular(torch.stack(blocks), identity, upper=True).square().sum().item()
    variance = (inverse_between(weight, su, sv).square().mean() * sv.square().sum()).item()
    return Demand((weight.shape[0], weight.shape[1]), cost * shared * variance)


def allocate(demands: Sequence[Demand], scheme: TrellisScheme, budget: float) -> list[TrellisScheme]:
    """Widths of some matrices that lower their common loss most: always the bit that pays best and still fits.

    Args:
        demands: of the matrices; their losses are in one unit.
        scheme: what all have at least.
        budget: stored bits of all of them together.
    """
    widths: list[int] = [scheme.bits] * len(demands)
    left = budget - sum(sum(stored_bits(scheme.tensors(*one.shape)).values()) for one in demands)
    waiting = [(-_gain(one, scheme.bits), index) for index, one in enumerate(demands)]
    heapq.heapify(waiting)
    while waiting:
        _, index = heapq.heappop(waiting)
        rows, columns = demands[index].shape
        if rows * columns <= left:
            left -= rows * columns
            widths[index] += 1
            if widths[index] < max(_ERRORS):
                heapq.heappush(waiting, (-_gain(demands[index], widths[index]), index))
    return [scheme.model_copy(update={"bits": width}) for width in widths]


def _gain(one: Demand, bits: int) -> float:
    """Loss that one bit more saves, for each bit that is stored."""
    return one.loss * (_ERRORS[bits] - _ERRORS[bits + 1]) / (one.shape[0] * one.shape[1])


def inverse_between(weight: torch.Tensor, su: torch.Tensor, sv: torch.Tensor) -> torch.Tensor:
    """``T`` of a weight ``[out, in]``: what :func:`ulbq.formats.trellis.between` makes the weight of."""
    return trellis.transform(trellis.transform(weight / su / sv.unsqueeze(1)).T).T


def _factored(hessian: torch.Tensor, su: torch.Tensor, damping: float) -> HessianFactor:
    """The Hessian between the transforms, ``[in, in]``, factored in the order in which tiles are solved."""
    moved = trellis.transform(trellis.transform(hessian * su * su.unsqueeze(1)).T)
    return factorize(moved, damping=damping, order=_order(moved))


def _order(hessian: torch.Tensor) -> torch.Tensor:
    """Columns ``[in]``, those of the tiles with the largest inputs first: later tiles make good what they leave."""
    energy = hessian.diagonal().unflatten(0, (-1, TILE)).sum(1)
    within = torch.arange(TILE, device=hessian.device)
    order: torch.Tensor = TILE * energy.argsort(descending=True, stable=True).unsqueeze(1) + within
    return order.flatten()


def _by_blocks(inner: torch.Tensor, factor: HessianFactor, scheme: TrellisScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[in/16, out/16, 256]`` of ``T``, and what they stand for, ``[out, in]``."""
    codes, found = [], []

    def solve(columns: torch.Tensor) -> torch.Tensor:
        own, values = search(trellis.sequences(columns.T)[0], scheme)
        codes.append(own)
        found.append(values)
        return trellis.from_sequences(values.unsqueeze(0)).T

    make_good(inner.T, factor, TILE, solve)
    places = _places(factor)
    return torch.stack(codes)[places], trellis.from_sequences(torch.stack(found)[places])


def _by_tiles(
    inner: torch.Tensor, factor: HessianFactor, outputs: HessianFactor, scheme: TrellisScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same tile by tile, errors made good in later outputs as well (YAQA)."""
    codes, found = [], []

    def solve(rows: torch.Tensor) -> torch.Tensor:
        own, values = _by_blocks(rows, factor, scheme)
        codes.append(own)
        found.append(values)
        return values

    make_good(inner, outputs, TILE, solve)
    places = _places(outputs)
    return torch.cat(codes, 1)[:, places], torch.stack(found)[places].flatten(0, 1)


def _places(factor: HessianFactor) -> torch.Tensor:
    """``[tiles]`` when each tile's turn came."""
    return (factor.order[::TILE] // TILE).argsort()


def fitted(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    inner: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    outputs: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sv`` ``[out]`` that leaves the least error at the layer's outputs with these codes, rounded to float16."""
    unscaled = trellis.between(inner, su, torch.ones_like(sv))
    moved = unscaled @ hessian
    if outputs is None:
        best = (weight * moved).sum(1) / (unscaled * moved).sum(1).clamp_min(_TINY)
    else:
        # The error diag(sv) N − W has tr(H_out E H Eᵀ) least where (H_out ∘ N H Nᵀ) sv = diag(H_out W H Nᵀ).
        coupled = (outputs * (unscaled @ moved.T)).double()
        wanted = (outputs * (moved @ weight.T)).sum(1).double()
        # What the errors do not depend on stays where it is.
        ridge = _RIDGE * coupled.diagonal().mean()
        coupled.diagonal().add_(ridge)
        best = torch.linalg.solve(coupled, wanted + ridge * sv).float()
    return torch.where(best.isfinite() & (best != 0), best, sv).half().float()


def search(sequences: torch.Tensor, scheme: TrellisScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[n, 256]`` uint8 of sequences ``[n, 256]`` float32, and the values that they stand for.

    They are the nearest of all whose bits wrap around and whose ends have the same bits in common. Which bits these are
    is found first, by a search with free ends on the sequence turned by half; so that others would now and then be a
    little better (Viterbi; QTIP, section 3.2).
    """
    values = trellis.values(scheme.state_bits)
    if solvers.take(sequences):
        return solvers.trellis_codes(sequences.contiguous(), scheme.bits, scheme.state_bits, values)
    values = values.to(sequences.device)
    find = trellis_launch.search if trellis_launch.searches(sequences) else search_with_torch
    parts = sequences.contiguous().split(max(1, _MOST_ORIGINS // (sequences.shape[1] * len(values) >> scheme.bits)))
    codes, found = zip(*(find(part, scheme.bits, scheme.state_bits, values) for part in parts), strict=True)
    return torch.cat(codes), torch.cat(found)


def search_with_torch(
    sequences: torch.Tensor, bits: int, state_bits: int, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of the compiled searches: codes and what they stand for, ``[n, length]`` both."""
    length = sequences.shape[1]
    half = length // 2
    costs, origins = _forward(sequences.roll(-half, 1), bits, values, torch.zeros(len(sequences), len(values)))
    state = _backward(costs.argmin(1), origins[length - half :], bits, state_bits)[0]
    closed = torch.full_like(costs, torch.inf).scatter_(1, state.unsqueeze(1), 0.0)
    _, origins = _forward(sequences, bits, values, closed)
    path = _backward(state, origins, bits, state_bits)[1]
    return (path & ((1 << bits) - 1)).to(torch.uint8), values[path]


def _forward(
    sequences: torch.Tensor, bits: int, values: torch.Tensor, costs: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Costs of all states after the last element, and where each head came from at every element."""
    origins = []
    costs = costs.to(sequences.device)
    for element in sequences.T:
        best = costs.unflatten(1, (1 << bits, -1)).min(1)
        origins.append(best.indices.to(torch.uint8))
        costs = best.values.repeat_interleave(1 << bits, 1) + (values - element.unsqueeze(1)).square()
    return costs, origins


def _backward(
    state: torch.Tensor, origins: list[torch.Tensor], bits: int, state_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before the first of some elements, and the states ``[n, elements]`` at each of them."""
    path = []
    for origin in reversed(origins):
        path.append(state)
        head = (state >> bits).unsqueeze(1)
        state = ((origin.gather(1, head).long() << (state_bits - bits)) | head).squeeze(1)
    return state, torch.stack(path[::-1], 1)

"""Trellis codes tile by tile, the error of each 16 inputs made good in those after them (block LDLQ, QTIP).

The weight is searched where the format stores it, between the two transforms (:mod:`ulbq.formats.trellis`), and the
Hessian goes along: ``H' = H_in · diag(su) · H · diag(su) · H_in``. With ``H'⁻¹ = UᵀU`` and a block of 16 columns
``B``, the error ``E`` of its tiles is made good by ``W_j −= E · U_BB⁻¹ U_Bj`` in all later columns, which GPTQ does
with blocks of one. Rows are coupled too: an error in a row of the weight costs what ``sv`` makes of it. Between the
transforms that is ``H_out · diag(sv²) · H_out``, and later rows make errors good in the same way where that is asked
for. Within a tile the search takes plain squares: the transforms leave little between neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ulbq import formats
from ulbq.formats import trellis
from ulbq.formats.trellis import LENGTH, TILE, Trellis, TrellisScheme
from ulbq.kernels import solvers, trellis_launch
from ulbq.solvers.allocation import Priced, give_out
from ulbq.solvers.hessian import HessianFactor, damped_diagonal, factorize

_BEST_SCALE = {1: 1.1, 2: 0.96, 3: 0.91, 4: 0.88}
"""Standard deviation of what is coded, by the bits: the values of the states have 1, and a Gaussian's error is least
there (``benchmarks/trellis_codes.py``)."""
_ERRORS = {1: 0.33, 2: 0.0724, 3: 0.0187, 4: 0.0052}
"""Mean squared error of a Gaussian of variance 1, by the bits, with states of 12 bits (the same script). A single bit's
is 0.28; what it hands on to later tiles, which are coded too, adds a sixth. With states of 16 bits all are a few
percent less, which changes no allocation."""
_COUPLED = 1 / 3
"""How far scales go by columns, and by rows, that know nothing of each other where errors are made good in both. On
other text the errors of the default model's layers at 2 bits are least from 1/4 to 1/2
(``benchmarks/layer_errors.py``)."""
_TINY = 1e-12
_LEAST_COST = 0.01
"""Of a column beside the mean, where scales are chosen."""
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
    row_feedback: bool = False,
) -> TrellisSolution:
    """Codes and scales of one matrix.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``[in, in]`` of the layer's squared output error, in the matrix's own coordinates.
        scheme: bits and states.
        generator: of the signs, on the CPU.
        damping: share of the mean diagonal that is added to the diagonal.
        outputs: ``[out, out]``, what errors of two outputs cost together; None for nothing.
        row_feedback: make errors good in later rows too, as far as the scales of rows couple them.
    """
    su, sv = scales(weight, hessian, scheme.bits, generator, coupled=row_feedback)
    factor, inner = _factored(hessian, su, damping), inverse_between(weight, su, sv)
    rows = _between_rows(sv, damping, outputs) if row_feedback or outputs is not None else _apart(sv)
    codes, found = _by_tiles(inner, factor, rows, scheme)
    sv = fitted(weight, hessian, found, su, sv, outputs)
    return TrellisSolution(Trellis(codes, su, sv), trellis.between(found, su, sv), factor.damping)


def scales(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, generator: torch.Generator, *, coupled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs and scales ``su [in]`` and ``sv [out]`` that leave blocks of one variance between the transforms.

    All that is coded has the same error there. With columns of norm ``n`` whose squared errors cost ``h``, that of the
    layer is least with ``su = n`` where all errors are made good in other columns, and with ``su = n^½ h^−¼`` where
    none is; the same holds of rows, which cost the same. So ``su = n`` and ``sv = n^½``. ``coupled``, where rows make
    errors good too, takes both a third of the way from the first to the second (:data:`_COUPLED`). Both are rounded to
    float16, as they will be stored.
    """
    of_columns, of_rows = (_COUPLED, _COUPLED) if coupled else (0.0, 1.0)
    sv = weight.square().mean(1).sqrt().clamp_min(_TINY).pow(1 - of_rows / 2)
    squares = (weight / sv.unsqueeze(1)).square().mean(0)
    su = squares.sqrt().pow(1 - of_columns / 2)
    if coupled:
        costs = damped_diagonal(hessian, _LEAST_COST).float()
        su = su * (costs / costs.mean()).pow(-of_columns / 4)
    su = torch.where(su > 1e-4 * su.mean(), su, su.mean().clamp_min(_TINY))
    if coupled:
        su = _even(su, squares, _reach(len(su)))
    sv = _even(sv, (weight / su).square().mean(1), _reach(len(sv)) if coupled else trellis.block_width(len(sv)))
    signs = [(torch.rand(len(one), generator=generator) < 0.5).to(weight.device) for one in (su, sv)]
    norm = su.square().mean().sqrt()
    su, sv = su / norm, sv * norm / _BEST_SCALE[bits]
    su, sv = (torch.where(sign, -one, one) for sign, one in zip(signs, (su, sv), strict=True))
    return su.half().float(), sv.half().float()


def _reach(count: int) -> int:
    """How many of so many elements the transform mixes with each other."""
    return count if trellis.is_mixed(count) else trellis.block_width(count)


def _even(scales: torch.Tensor, squares: torch.Tensor, width: int) -> torch.Tensor:
    """Scales ``[n]`` that leave one variance in all blocks of so many, of elements of these mean squares."""
    left: torch.Tensor = (squares / scales.square()).unflatten(0, (-1, width)).mean(1).sqrt()
    return scales * left.masked_fill(left < _TINY, 1.0).repeat_interleave(width)


@torch.no_grad()
def demand(
    weight: torch.Tensor, hessian: torch.Tensor, cost: float, damping: float = 0.01, *, row_feedback: bool = False
) -> Demand:
    """What bits would do for a matrix ``[out, in]``, from the factor alone.

    Args:
        weight: float32.
        hessian: ``[in, in]``.
        cost: of a squared output error, in a unit that all layers share.
        damping, row_feedback: as :func:`solve` takes them.
    """
    su, sv = scales(weight, hessian, 1, torch.Generator().manual_seed(0), coupled=row_feedback)
    shared = _left(_factored(hessian, su, damping).upper)
    rows = _left(_between_rows(sv, damping).upper) if row_feedback else sv.square().sum().item()
    variance = inverse_between(weight, su, sv).square().mean().item()
    return Demand((weight.shape[0], weight.shape[1]), cost * shared * rows * variance)


def _left(upper: torch.Tensor) -> float:
    """What errors of variance 1 in all rows cost when those after them have made good what they can."""
    blocks = torch.stack([upper[..., i : i + TILE, i : i + TILE] for i in range(0, upper.shape[-1], TILE)])
    identity = torch.eye(TILE, device=upper.device).expand_as(blocks)
    inverse: torch.Tensor = torch.linalg.solve_triangular(blocks, identity, upper=True)
    return inverse.square().sum().item()


def allocate(demands: Sequence[Demand], scheme: TrellisScheme, budget: float) -> list[TrellisScheme]:
    """Widths of some matrices that lower their common loss most: always the bit that pays best and still fits.

    Args:
        demands: of the matrices; their losses are in one unit.
        scheme: what all have at least.
        budget: stored bits of all of them together.
    """
    schemes = [scheme.model_copy(update={"bits": bits}) for bits in range(scheme.bits, max(_ERRORS) + 1)]
    choices = [
        [Priced(formats.total_bits(s, one.shape), one.loss * _ERRORS[s.bits]) for s in schemes] for one in demands
    ]
    return [schemes[taken] for taken in give_out(choices, budget)]


def inverse_between(weight: torch.Tensor, su: torch.Tensor, sv: torch.Tensor) -> torch.Tensor:
    """``T`` of a weight ``[out, in]``: what :func:`ulbq.formats.trellis.between` makes the weight of.

    A row whose scale float16 stores as 0 is one of zeros.
    """
    scaled = (weight / su / sv.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)
    return trellis.transform(trellis.transform(scaled).T).T


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


class _Rows(NamedTuple):
    """What errors of rows of ``T`` cost together.

    Attributes:
        upper: ``[blocks, n, n]``, the factors of blocks of rows that know nothing of each other.
        order: ``[out]``, the rows in processing order, block by block.
    """

    upper: torch.Tensor
    order: torch.Tensor


def _between_rows(sv: torch.Tensor, damping: float, outputs: torch.Tensor | None = None) -> _Rows:
    """The costs of errors of outputs, ``diag(sv) · H_out · diag(sv)``, between the transforms, factored.

    Where outputs cost nothing together they all cost the same; then the blocks of the transform are left.
    """
    if outputs is not None:
        factor = _factored(outputs, sv, damping)
        return _Rows(factor.upper.unsqueeze(0), factor.order)
    moved = trellis.transform(trellis.transform(sv.square().unflatten(0, (-1, _reach(len(sv)))).diag_embed()).mT)
    factors = [factorize(block, damping=damping).upper for block in moved]
    return _Rows(torch.stack(factors), torch.arange(len(sv), device=sv.device))


def _apart(sv: torch.Tensor) -> _Rows:
    """Rows of which no tile makes errors of another good."""
    upper = torch.eye(TILE, device=sv.device).expand(len(sv) // TILE, -1, -1)
    return _Rows(upper, torch.arange(len(sv), device=sv.device))


def _by_tiles(
    inner: torch.Tensor, factor: HessianFactor, rows: _Rows, scheme: TrellisScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[in/16, out/16, 256]`` of ``T``, and what they stand for, ``[out, in]``.

    A tile waits for those before it in its rows and in its columns. All whose turn it is are searched at once: those
    of the first rows of every block lead, and each step they are a tile ahead of the next ones (YAQA's order, along
    diagonals).
    """
    blocks, size, _ = rows.upper.shape
    turns, steps = size // TILE, inner.shape[1] // TILE
    tile = torch.arange(size, device=inner.device) // TILE
    lower = rows.upper.mT
    inside = lower * (tile == tile.unsqueeze(1))
    # [blocks, n, n]: what is added to a row for the errors of the rows before it.
    later = torch.linalg.solve_triangular(lower, inside, upper=False, left=False)
    # [turns, in, blocks · 16]: what is still to be made, and the errors of what has been.
    work = inner[rows.order][:, factor.order].unflatten(0, (blocks, turns, TILE)).permute(1, 3, 0, 2).flatten(2)
    codes = torch.empty(steps, blocks, turns, LENGTH, dtype=torch.uint8, device=inner.device)
    found = torch.empty(codes.shape, device=inner.device)
    for ahead in range(steps + turns - 1):
        front = [(turn, ahead - turn) for turn in range(max(0, ahead - steps + 1), min(turns, ahead + 1))]
        wanted = [_wanted(work[: turn + 1, TILE * step : TILE * (step + 1)], later) for turn, step in front]
        own, values = search(torch.cat([trellis.sequences(tiles.T)[0] for tiles in wanted]), scheme)
        for (turn, step), one, value in zip(front, own.split(blocks), values.split(blocks), strict=True):
            codes[step, :, turn], found[step, :, turn] = one, value
            first, last = TILE * step, TILE * (step + 1)
            errors = work[turn, first:last].sub_(trellis.from_sequences(value.unsqueeze(0)).T)
            shared = torch.linalg.solve_triangular(factor.upper[first:last, first:last].T, errors, upper=False)
            work[turn, last:].addmm_(factor.upper[first:last, last:].T, shared, alpha=-1)
    columns, places = _places(factor.order), _places(rows.order)
    return codes.flatten(1, 2)[columns][:, places], trellis.from_sequences(found.flatten(1, 2)[columns][:, places])


def _wanted(tiles: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The last of ``[turns, 16, blocks · 16]`` with the errors of those before it made good in it."""
    if len(tiles) == 1:
        return tiles[0]
    blocks, done = len(later), TILE * (len(tiles) - 1)
    errors = tiles[:-1].unflatten(2, (blocks, TILE)).permute(2, 1, 0, 3).flatten(2)
    made: torch.Tensor = errors @ later[:, done : done + TILE, :done].mT
    return tiles[-1] + made.transpose(0, 1).flatten(1)


def _places(order: torch.Tensor) -> torch.Tensor:
    """``[tiles]`` when each tile's turn came."""
    return (order[::TILE] // TILE).argsort()


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

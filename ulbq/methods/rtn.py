"""Round to nearest: no calibration, no training, seconds for a whole model."""

from typing import ClassVar, Self

import torch

from ulbq.config.groups import AffineOptions, MethodOptions
from ulbq.config.methods import RtnOptions
from ulbq.formats import affine
from ulbq.formats.affine import AffineScheme
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed, check_packed
from ulbq.solvers.rtn import AffineCodes, round_to_nearest

PACKING_BYTES = 10.5
"""Of each weight, as a layer is packed: codes and what they were packed to, and as float32 before and after that."""


class Rtn:
    """Rounds every weight to an affine grid whose range is searched by squared error.

    Args:
        scheme: any affine scheme.
        search: shrink each group's range where that lowers its error; without it, plain min-max rounding.
    """

    name: ClassVar[str] = "rtn"
    Options: ClassVar[type[MethodOptions]] = RtnOptions

    def __init__(self, scheme: AffineScheme, *, search: bool = True) -> None:
        self.scheme = scheme
        self._search = search
        self.needs = Needs(searches=search, layer_bytes=PACKING_BYTES)

    @classmethod
    def from_options(cls, options: RtnOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(affine_scheme(options, group_size), search=options.search)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block; only its weights are looked at."""
        packed: dict[str, Packed] = {}
        for linear in task.linears:
            scheme = affine_of(task, linear, self.scheme)
            found = round_to_nearest(task.weight(linear), scheme, search=self._search)
            packed[linear] = pack_codes(linear, scheme, found)
        return BlockResult(packed, schemes=task.schemes)


def affine_of(task: BlockTask, linear: str, scheme: AffineScheme) -> AffineScheme:
    """How a layer is stored: by a scheme of its own, if its task has one."""
    own = task.schemes.get(linear, scheme)
    if not isinstance(own, AffineScheme):
        raise TypeError(f"'{linear}' is {own.format}")
    return own


def affine_scheme(options: AffineOptions, group_size: int) -> AffineScheme:
    """The affine format that a method's options ask for."""
    return AffineScheme(
        bits=options.bits, group_size=group_size, symmetric=options.symmetric, mid_rise=options.mid_rise
    )


def pack_codes(linear: str, scheme: AffineScheme, found: AffineCodes) -> Packed:
    """Pack what a solver found. Raises NumericsError where what is stored is not what was found."""
    codes, scales, zeros = found
    packed = affine.pack(scheme, codes, scales, None if scheme.symmetric else zeros)
    stored = affine.unpack(scheme, packed, codes.shape[1])
    # Codes take a quarter of the weights that they stand for; those are made to say how far off they are.
    if not (scales.isfinite().all() and all(map(torch.equal, found, stored))):
        steps = codes.view(*scales.shape, -1) - zeros.unsqueeze(-1)
        check_packed(linear, scheme, packed, steps.mul_(scales.unsqueeze(-1)).flatten(1))
    return packed

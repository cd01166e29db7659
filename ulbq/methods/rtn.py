"""Round to nearest: no calibration, no training, seconds for a whole model."""

from typing import ClassVar, Self

import torch

from ulbq import distributed
from ulbq.config.groups import AffineOptions, MethodOptions, UniformOptions
from ulbq.config.methods import RtnOptions
from ulbq.formats import AffineScheme, KQuantScheme, UniformScheme, affine, k_quant
from ulbq.formats.k_quant import KQuant
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed, check_packed
from ulbq.solvers.k_quant import UniformCodes, find_grids
from ulbq.solvers.rtn import AffineCodes

PACKING_BYTES = 10.5
"""Of each weight, as a layer is packed: codes and what they were packed to, and as float32 before and after that."""


class Rtn:
    """Rounds every weight to an affine grid whose range is searched by squared error.

    Args:
        scheme: any affine scheme, or one with scales in two levels.
        search: shrink each group's range where that lowers its error; without it, plain min-max rounding.
    """

    name: ClassVar[str] = "rtn"
    Options: ClassVar[type[MethodOptions]] = RtnOptions

    def __init__(self, scheme: UniformScheme, *, search: bool = True) -> None:
        self.scheme = scheme
        self._search = search
        self.needs = Needs(searches=search, layer_bytes=PACKING_BYTES)

    @classmethod
    def from_options(cls, options: RtnOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(uniform_scheme(options, group_size), search=options.search)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block; only its weights are looked at."""

        def rounded(linear: str) -> Packed:
            scheme = uniform_of(task, linear, self.scheme)
            return pack_codes(linear, scheme, find_grids(task.weight(linear), scheme, search=self._search))

        packed = distributed.shared(task.linears, rounded, task.precision.device)
        return BlockResult(dict(zip(task.linears, packed, strict=True)), schemes=task.schemes)


def uniform_of(task: BlockTask, linear: str, scheme: UniformScheme) -> UniformScheme:
    """How a layer is stored: by a scheme of its own, if its task has one."""
    own = task.schemes.get(linear, scheme)
    if not isinstance(own, UniformScheme):
        raise TypeError(f"'{linear}' is {own.format}")
    return own


def affine_scheme(options: AffineOptions, group_size: int) -> AffineScheme:
    """The affine format that a method's options ask for."""
    return AffineScheme(
        bits=options.bits, group_size=group_size, symmetric=options.symmetric, mid_rise=options.mid_rise
    )


def uniform_scheme(options: UniformOptions, group_size: int) -> UniformScheme:
    """The format that a method's options ask for, with scales of one level or of two."""
    return (
        KQuantScheme.model_validate({"bits": options.bits}) if options.k_quant else affine_scheme(options, group_size)
    )


def pack_codes(linear: str, scheme: UniformScheme, found: UniformCodes) -> Packed:
    """Pack what a solver found. Raises NumericsError where what is stored is not what was found."""
    match scheme, found:
        case KQuantScheme(), KQuant():
            packed = k_quant.pack(scheme, found)
            check_packed(linear, scheme, packed, found.values())
        case AffineScheme(), AffineCodes(codes, scales, zeros):
            packed = affine.pack(scheme, codes, scales, None if scheme.symmetric else zeros)
            stored = affine.unpack(scheme, packed, codes.shape[1])
            # Codes take a quarter of the weights that they stand for; those are made to say how far off they are.
            if not (scales.isfinite().all() and all(map(torch.equal, found, stored))):
                steps = codes.view(*scales.shape, -1) - zeros.unsqueeze(-1)
                check_packed(linear, scheme, packed, steps.mul_(scales.unsqueeze(-1)).flatten(1))
        case _:
            raise TypeError(f"a grid that is not {scheme.format}")
    return packed

"""Random packed matrices, and how far a product may be from the exact one."""

from collections.abc import Mapping
from typing import Any

import torch

from ulbq import formats, kernels
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
)
from ulbq.formats.bits import pack_planes

# Relative norm of the error, and its largest element over the largest result: about three times what was measured.
# With 16-bit floats nearly all of it is the rounding of the result.
TOLERANCE = {torch.float32: (5e-7, 2e-6), torch.bfloat16: (4e-3, 6e-3), torch.float16: (6e-4, 1e-3)}


def random_matrix(scheme: AnyScheme, outs: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors of a matrix, as a format's ``pack`` would leave them."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size

    def codes(bits: int, *shape: int) -> torch.Tensor:
        return pack_planes(torch.randint(1 << bits, shape, generator=generator), bits)

    def floats(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 0.1 + 0.05).half()

    if isinstance(scheme, AffineScheme):
        tensors = {"codes": codes(scheme.bits, outs, columns), "scales": floats(outs, groups)}
        tensors["scales"][::3] *= -1
        return tensors if scheme.symmetric else tensors | {"zeros": codes(scheme.bits, outs * groups)}
    if isinstance(scheme, DualBinaryScheme):
        scales = torch.stack([2 * floats(outs, groups), -floats(outs, groups)])
        return {"codes": codes(2, outs, columns), "scales": scales}
    if isinstance(scheme, CodebookScheme):
        raise TypeError("see tests.formats.columns")
    if isinstance(scheme, TrellisScheme):
        words = scheme.tensors(outs, columns)["codes"].shape
        tensors = {"codes": torch.randint(256, words, generator=generator, dtype=torch.uint8)}
        for name, count in (("su", columns), ("sv", outs)):
            tensors[name] = floats(count) * (1 - 2 * torch.randint(2, (count,), generator=generator)).half()
        return tensors
    tensors = {"codes": codes(1, outs, columns)}
    for name, spec in scheme.tensors(outs, columns).items():
        if name != "codes":
            # A router that is sure of itself would make much of a bfloat16 gate's rounding.
            size = 0.05 if name == "router" else 1
            tensors[name] = (size * torch.randn(spec.shape, generator=generator)).half()
    return tensors


def exact(scheme: AnyScheme, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    wide = x.double()
    if isinstance(scheme, BinaryMosScheme):
        doubles = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        factor = formats.matrix(scheme, tensors, x.shape[-1], torch.float64)
        return formats.multiply(scheme, doubles, wide, factor)
    if isinstance(scheme, CodebookScheme):
        return wide @ codebook.dequantize(scheme, tensors, x.shape[-1], torch.float64).T
    return wide @ formats.dequantize(scheme, tensors, x.shape[-1], torch.float64).T


def assert_near(result: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Fail where the relative norm of the error, or its largest element, is beyond what this dtype explains."""
    assert result.shape == wanted.shape
    error = result.double() - wanted.double()
    by_norm, by_element = (slack * bound for bound in TOLERANCE[dtype])
    assert error.norm() <= by_norm * wanted.double().norm(), (error.norm() / wanted.double().norm()).item()
    largest = wanted.double().abs().max()
    assert error.abs().max() <= by_element * largest, (error.abs().max() / largest).item()


def changed(tensors: dict[str, torch.Tensor], name: str, value: Any) -> dict[str, torch.Tensor]:
    """The same tensors with one element of one of them replaced."""
    copy = tensors[name].clone()
    copy.view(-1)[0] = value
    return tensors | {name: copy}


def named(name: str) -> kernels.Layout:
    """The layout of a name."""
    return next(layout for layout in kernels.LAYOUTS if layout.name == name)


def in_layout(
    name: str, scheme: AnyScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int
) -> kernels.Ready:
    """A matrix in a layout, whichever is the best."""
    return kernels.Ready(named(name), named(name).pack(scheme, stored, outs, columns))


def multiply(scheme: AnyScheme, ready: kernels.Ready, x: torch.Tensor, outs: int) -> torch.Tensor:
    """The product."""
    return ready.layout.multiply(scheme, ready.tensors, x, outs)


def unpacked(scheme: AnyScheme, ready: kernels.Ready, outs: int, columns: int) -> Mapping[str, torch.Tensor]:
    """The stored tensors."""
    return ready.layout.unpack(scheme, ready.tensors, outs, columns)


def matrix(scheme: AnyScheme, ready: kernels.Ready, outs: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight."""
    return ready.layout.matrix(scheme, ready.tensors, outs, columns, dtype)

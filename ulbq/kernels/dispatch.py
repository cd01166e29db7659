"""Which code multiplies a packed matrix, and why no other: one table, read from the top.

A layout takes a case or tells why it does not. ``dense`` takes all, so there is always an answer.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ulbq.formats import AnyScheme
from ulbq.kernels.banks import Bank
from ulbq.kernels.layouts.base import Case, Layout, StoredLayout
from ulbq.kernels.layouts.byte_codes import BytesLayout
from ulbq.kernels.layouts.columns import ColumnsLayout
from ulbq.kernels.layouts.humming import HummingLayout
from ulbq.kernels.layouts.int4 import Int4Layout
from ulbq.kernels.layouts.super_blocks import SuperBlocksLayout
from ulbq.kernels.layouts.tiles import TilesLayout
from ulbq.kernels.layouts.trellis import TrellisLayout
from ulbq.kernels.layouts.words import WordsLayout

STORED = StoredLayout()
LAYOUTS: tuple[Layout, ...] = (
    TilesLayout(),
    ColumnsLayout(),
    TrellisLayout(),
    SuperBlocksLayout(),
    Int4Layout(),
    HummingLayout(),
    WordsLayout(),
    BytesLayout(),
    STORED,
)


class Choice(NamedTuple):
    """The first layout that takes a case, and why each one above it does not, by name."""

    layout: Layout
    passed_over: dict[str, str]


class Ready(NamedTuple):
    """A matrix in the layout that products take: its tensors by name."""

    layout: Layout
    tensors: dict[str, torch.Tensor]


def choose(case: Case) -> Choice:
    """Which layout a product is made from."""
    passed: dict[str, str] = {}
    for layout in LAYOUTS:
        reason = unsupported_reason(layout, case.scheme, case.out_features, case.in_features, case.device)
        reason = reason or layout.unavailable_reason() or layout.call_reason(case)
        if reason is None:
            return Choice(layout, passed)
        passed[layout.name] = reason
    raise TypeError("the last layout takes everything")


def best(scheme: AnyScheme, out_features: int, in_features: int, device: str) -> Layout:
    """The layout that a matrix is brought into when it is made ready: the first that takes it at all."""
    found = (
        layout for layout in LAYOUTS if unsupported_reason(layout, scheme, out_features, in_features, device) is None
    )
    return next(layout for layout in found if layout.unavailable_reason() is None)


def prepare(scheme: AnyScheme, stored: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> Ready:
    """Bring stored tensors into the layout of the best backend for this matrix and machine."""
    layout = best(scheme, out_features, in_features, next(iter(stored.values())).device.type)
    return Ready(layout, layout.pack(scheme, stored, out_features, in_features))


def gathered(matrices: Sequence[tuple[AnyScheme, Ready]], outs: int, columns: int) -> list[Bank]:
    """Banks of matrices of one shape, whose products are made in one call; none where one of them can be in no bank."""
    found: list[tuple[AnyScheme, Layout, dict[int, Mapping[str, torch.Tensor]]]] = []
    for number, (scheme, (layout, tensors)) in enumerate(matrices):
        same = next((each for each in found if each[:2] == (scheme, layout)), None)
        if same is None:
            found.append(same := (scheme, layout, {}))
        same[2][number] = tensors
    kinds = [layout.bank(scheme) for scheme, layout, _ in found]
    if any(kind is None or (kind.lone and len(kinds) > 1) for kind in kinds):
        return []
    return [
        kind(scheme, tensors, outs, columns)
        for kind, (scheme, _, tensors) in zip(kinds, found, strict=True)
        if kind is not None
    ]


def unsupported_reason(
    layout: Layout, scheme: AnyScheme, out_features: int, in_features: int, device: str
) -> str | None:
    """Why a layout does not take a matrix on a device; None where it does."""
    if layout.device not in (None, device):
        return f"runs on {'the CPU' if layout.device == 'cpu' else 'CUDA GPUs'}, not on {device}"
    if layout.formats is not None and scheme.format not in layout.formats:
        return f"{', '.join(layout.formats)} only"
    return layout.unsupported_reason(scheme, out_features, in_features)

"""Column codebooks, trainable: every column's levels learn, its codes stay or follow the weights.

Levels are kept in *grid steps* of their column, the mean distance of its neighbouring levels at the start, so that one
rate means the same in every column. Outliers are stored values and do not train.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from ulbq.formats import AnyScheme, codebook
from ulbq.formats.bits import pack_planes, unpack_planes
from ulbq.formats.codebook import CodebookScheme, Columns, Outliers
from ulbq.formats.levels import assign, sum_by_level
from ulbq.quantizers.base import CELL_MARGIN, SCALE_FLOOR, Quantizer


class _Lookup(torch.autograd.Function):
    """Values ``[n, out]`` of levels ``[n, k]`` by codes; straight-through to the latents inside the levels' reach.

    Codes are asked for anew in the backward pass, so that packed ones lie in memory as bits between the two.

    Gradients: to a level the sum over the values that have its code; to a latent the incoming one, 0 beyond half a
    distance outside the outermost levels.
    """

    @staticmethod
    def forward(
        ctx: Any, levels: torch.Tensor, codes: Callable[[], torch.Tensor], latents: torch.Tensor | None
    ) -> torch.Tensor:
        inside = None
        if latents is not None:
            low = 1.5 * levels[:, :1] - 0.5 * levels[:, 1:2]
            high = 1.5 * levels[:, -1:] - 0.5 * levels[:, -2:-1]
            inside = (latents >= low) & (latents <= high)
        ctx.save_for_backward(inside)
        ctx.codes, ctx.shape = codes, levels.shape
        return levels.gather(1, codes().long())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        (inside,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        levels = sum_by_level(gradient, ctx.codes().long(), ctx.shape[1])
        return levels, None, gradient * inside if inside is not None else None


class CodebookQuantizer(Quantizer):
    """One weight matrix under training.

    Args:
        weight: ``[out, in]``, the full-precision weight; the latents, where weights train.
        columns: the matrix as a pass left it.
        scheme: the format's parameters for this matrix.
        train_weights: let the weights move, and codes with them; otherwise the codes are fixed and levels train alone.

    Attributes:
        levels: ``[Σ 2^b_j]`` float32 in grid steps, columns in sorted order (the format's), widest first.
        packed: codes of the columns of each width, widest first, in sorted order: buffers ``packed_4`` uint8
            ``[4, n, ceil(out/8)]`` and so on; none where weights train.
        latents: ``[in, out]`` float32 weights in grid steps, columns in sorted order; None where codes are fixed.
        step: ``[in, 1]`` grid step of each column, in sorted order.
    """

    step: torch.Tensor
    place: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    scheme: CodebookScheme

    def __init__(
        self, weight: torch.Tensor, columns: Columns, scheme: CodebookScheme, *, train_weights: bool = True
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self._counts = scheme.columns(weight.shape[1])
        widths = columns.widths.long()
        order = widths.argsort(descending=True, stable=True)
        self.register_buffer("place", order.argsort())
        columns = codebook.ascending(columns)
        books, top = columns.codebooks[order], (1 << widths[order]) - 1
        span = books.gather(1, top.unsqueeze(1)) - books[:, :1]
        self.register_buffer("step", (span / top.unsqueeze(1)).clamp_min(SCALE_FLOOR))
        present = codebook.levels_of(self._counts, weight.device)
        self.levels = nn.Parameter((books / self.step)[present])
        self._out_features = weight.shape[0]
        outliers = columns.outliers or Outliers(widths.new_empty(0), weight.new_empty(0))
        self.register_buffer("positions", outliers.positions)
        self.register_buffer("values", outliers.values.float())
        self.latents: nn.Parameter | None = None
        codes = columns.codes[order].split(list(self._counts.values()))
        if train_weights:
            self.latents = nn.Parameter(self._in_cells(weight.T[order].float() / self.step, codes))
            return
        for width, part in zip(self._counts, codes, strict=True):
            self.register_buffer(f"packed_{width}", pack_planes(part, width))

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in levels and latents."""
        parts = []
        for width, levels, latents in self._groups():
            if latents is not None:
                levels, _ = levels.sort(1)
            value: torch.Tensor = _Lookup.apply(levels, self._codes(width, levels, latents), latents)  # type: ignore[no-untyped-call]
            parts.append(value)
        columns = (torch.cat(parts) if len(parts) > 1 else parts[0]) * self.step
        if len(parts) > 1:
            columns = columns[self.place]
        columns = columns.to(dtype)
        if len(self.positions):
            columns = columns.flatten().scatter(0, self.positions, self.values.to(dtype)).view(columns.shape)
        return columns.T

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights`` (none where codes are fixed) and ``scales``, the levels."""
        return {"weights": [] if self.latents is None else [self.latents], "scales": [self.levels]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; levels are rounded to float16 only here."""
        widest = 2 ** max(self._counts)
        books, codes = self.levels.new_zeros(len(self.step), widest), []
        first = 0
        for width, levels, latents in self._groups():
            if latents is not None:
                levels, _ = levels.sort(1)
            books[first : first + len(levels), : levels.shape[1]] = levels
            codes.append(self._codes(width, levels, latents)())
            first += len(levels)
        widths = torch.cat([self.place.new_full((count,), width) for width, count in self._counts.items()])
        outliers = Outliers(self.positions, self.values) if len(self.positions) else None
        made = Columns(
            torch.cat(codes)[self.place], widths[self.place], (books * self.step)[self.place].half().float(), outliers
        )
        return codebook.pack(self.scheme, codebook.ascending(made))

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says."""
        if not isinstance(scheme, CodebookScheme):
            raise TypeError(f"{scheme.format} has no codebooks")
        return cls(weight, codebook.unpack(scheme, tensors, weight.shape[1]), scheme, train_weights=train_weights)

    def _groups(self) -> list[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Each width, levels ``[n, 2^b]`` and latents ``[n, out]`` of its columns, widest first."""
        counts = list(self._counts.items())
        levels = self.levels.split([count << width for width, count in counts])
        sizes = [count for _, count in counts]
        latents = [None] * len(counts) if self.latents is None else list(self.latents.split(sizes))
        return [(width, levels[i].view(-1, 1 << width), latents[i]) for i, (width, _) in enumerate(counts)]

    def _codes(self, width: int, levels: torch.Tensor, latents: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        """Gives codes ``[n, out]`` uint8: the latents' nearest levels, which ascend, or those that are fixed."""
        if latents is None:
            return lambda: unpack_planes(self.get_buffer(f"packed_{width}"), self._out_features)
        nearest = assign(latents.detach(), levels.detach())
        return lambda: nearest

    @torch.no_grad()
    def _in_cells(self, latents: torch.Tensor, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Latents moved as little as gives each its stored code back."""
        parts = []
        split = latents.split(list(self._counts.values()))
        for (_, levels, _), given, own in zip(self._groups(), codes, split, strict=True):
            ends = levels.new_full((len(levels), 1), torch.inf)
            limits = torch.cat([-ends, (levels[:, 1:] + levels[:, :-1]) / 2, ends], 1)
            index = given.long()
            low, high = limits.gather(1, index), limits.gather(1, index + 1)
            # Levels that nearly coincide have cells narrower than two margins.
            margin = ((high - low) / 4).clamp_max(CELL_MARGIN)
            parts.append(own.clamp(low + margin, high - margin))
        return torch.cat(parts)

"""A method of the tests' own that stores layers in the codebook format, each with widths of its own."""

from typing import Any, ClassVar, Self

import torch

from ulbq.config.groups import MethodOptions
from ulbq.formats import CodebookScheme, codebook
from ulbq.formats.codebook import Columns, Outliers
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed, check_packed


class ColumnsOptions(MethodOptions):
    """None at all: the format has no groups either."""

    grouped: ClassVar[bool] = False


class ByColumns:
    """Levels at even quantiles; the columns with the largest inputs get 4 bits, as many as the layer's name asks for.

    With calibration samples, which it needs, a block depends on how those before it were stored.
    """

    name: ClassVar[str] = "columns"
    Options: ClassVar[type[MethodOptions]] = ColumnsOptions
    needs = Needs()
    scheme = CodebookScheme(bits=2)

    @classmethod
    def from_options(cls, options: Any, group_size: int) -> Self:
        """The method."""
        return cls()

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block by the mean of the quantized stream's absolute values."""
        assert task.data is not None
        size = task.data.inputs.get(slice(0, 1)).abs().mean().item()
        made = {linear: self._pack(task, linear, size) for linear in task.linears}
        packed = {linear: tensors for linear, (_, tensors) in made.items()}
        return BlockResult(packed, schemes={linear: scheme for linear, (scheme, _) in made.items()})

    def _pack(self, task: BlockTask, linear: str, size: float) -> tuple[CodebookScheme, Packed]:
        weight = task.weight(linear) * (1 + size / 100)
        widths = torch.full((weight.shape[1],), 2)
        wide = task.importance[linear].topk((task.index + len(linear)) % 5).indices
        widths[wide] = torch.tensor([3, 4])[wide % 2]
        levels = torch.zeros(len(widths), 16)
        for width in widths.unique().tolist():
            quantiles = weight.quantile((torch.arange(2**width) + 0.5) / 2**width, dim=0).T
            levels[widths == width, : 2**width] = quantiles[widths == width]
        distance = (weight.T.unsqueeze(2) - levels.unsqueeze(1)).abs()
        distance.masked_fill_((torch.arange(16) >= 2 ** widths.unsqueeze(1)).unsqueeze(1), torch.inf)
        codes = distance.argmin(2)
        outliers = Outliers.where(weight.abs() > 2.5 * weight.std(), weight) if "q" in linear else None
        count = 0 if outliers is None else len(outliers.positions)
        scheme = CodebookScheme.of(2, widths, count)
        packed = codebook.pack(scheme, Columns(codes, widths, levels, outliers))
        simulated = levels.gather(1, codes)
        if outliers is not None:
            simulated.view(-1)[outliers.positions] = outliers.values
        check_packed(linear, scheme, packed, simulated.T)
        return scheme, packed

"""Products with column codebooks, of a matrix as stored and of one in words."""

from typing import NamedTuple

import torch

from ulbq.formats import CodebookScheme, codebook
from ulbq.kernels import columns, tiles, triton_launch, words
from ulbq.kernels.ops.operands import Operands

# Stored tensors, and those of :func:`ulbq.kernels.columns.derive`, which lookups want beside them.
_STORED = ("codes", "tail_codes", "codebooks", "columns", "outlier_values", "outlier_low", "outlier_high")
_DERIVED = ("column_order", "outlier_starts", "outlier_columns", "outlier_deltas")
IN_WORDS = ("word_codes", "word_levels", "word_order", "outlier_starts", "outlier_columns", "outlier_deltas")


class _ByColumn(NamedTuple):
    """A matrix with levels of its own for every column; ``tensors`` are those of the form, in order."""

    scheme: CodebookScheme
    form: str
    tensors: list[torch.Tensor]
    out_features: int
    in_features: int

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if self.form == "words" and rows.dtype in triton_launch.FLOATS:
            sections = triton_launch.sections(self.tensors, self._counts, self.out_features)
            return triton_launch.multiply(rows, sections, self.out_features, outliers=self.tensors[3:])
        if self.form != "words":
            stored = self._stored()
            if (derived := self.tensors[len(stored) :]) and columns.takes(rows.dtype, len(rows)):
                return columns.multiply(rows, self.scheme, stored["codes"], stored["codebooks"], derived)
        return torch.nn.functional.linear(rows, self._dense(rows.dtype))

    def input_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        if self.form != "words" or rows.dtype not in triton_launch.FLOATS:
            return rows @ self._dense(rows.dtype)
        sections = triton_launch.sections(self.tensors, self._counts, self.out_features)
        found = triton_launch.input_gradient(rows, sections, self.in_features, torch.float32)
        _add_outlier_gradient(found, rows, dict(zip(IN_WORDS, self.tensors, strict=False)))
        return found

    @property
    def _counts(self) -> dict[int, int]:
        return self.scheme.columns(self.in_features)

    def _stored(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.scheme.tensors(self.out_features, self.in_features), self.tensors, strict=False))

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        if self.form == "words":
            in_words = dict(zip(IN_WORDS, self.tensors, strict=False))
            return words.column_weight(in_words, self._counts, self.out_features, self.in_features, dtype)
        return codebook.dequantize(self.scheme, self._stored(), self.in_features, dtype)


def _add_outlier_gradient(total: torch.Tensor, grad: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
    """Add to float32 ``[rows, in]`` what outliers make of a gradient ``[rows, out]``, a slab of them at a time."""
    if "outlier_starts" not in packed:
        return
    outputs, places, deltas = words.outlier_outputs(packed), packed["outlier_columns"], packed["outlier_deltas"]
    step = max(1, tiles.SLAB // (4 * max(1, len(grad))))
    for begin in range(0, len(deltas), step):
        some = slice(begin, begin + step)
        total.index_add_(1, places[some], grad[:, outputs[some]].float() * deltas[some])


def _numbers(scheme: CodebookScheme, in_features: int) -> list[int]:
    """Outliers, then each width, the widest first, with the columns that have it."""
    return [scheme.outliers, *(number for pair in scheme.columns(in_features).items() for number in pair)]


def _matrix(
    numbers: list[int], form: str, tensors: list[torch.Tensor], out_features: int, in_features: int
) -> _ByColumn:
    outliers, *pairs = numbers
    scheme = CodebookScheme(widths=dict(zip(pairs[::2], pairs[1::2], strict=True)), outliers=outliers)
    return _ByColumn(scheme, form, tensors, out_features, in_features)


OPERANDS = Operands(lambda form: IN_WORDS if form == "words" else (*_STORED, *_DERIVED), _numbers, _matrix)

"""Column codebooks (CLAQ, https://arxiv.org/abs/2405.17233): every input column has levels and a bit width of its own.

``Ŵ[i, j] = C_j[code_ij]`` with ``2^b_j`` levels ``C_j``, save for *outliers*, whose values are stored instead. Columns
are sorted widest first, among equals in ascending order; plane ``p`` holds bit ``p`` of the codes of the columns that
have one, which are the first ``n_p`` of them. Stored tensors of an ``[out, in]`` matrix with ``P = Σ b_j`` planes:

* ``codes``      uint8 ``[P, out // 8]``: plane 0 of all columns, then plane 1 of those that have it, and so on, each
  packed along the outputs, bit ``k`` of a byte for output ``8·byte + k``; a column of an output count that eight
  divides costs ``b·out`` bits exactly, whatever its neighbours cost;
* ``tail_codes`` uint8 ``[out % 8, ceil(P/8)]``: the same bits of the outputs that fill no byte, packed along the
  planes; absent where eight divides ``out``;
* ``codebooks``  float16 ``[Σ 2^b_j]``: the levels of one column after the other, in sorted order;
* ``columns``    uint8 ``[1 or 2, ceil(in/8)]``: for each column, in the matrix's order, which of the widths present
  it has (0 for the smallest); absent where there is one width. It is all that the order needs: one or two bits a
  column, where the permutation itself would take ``log2(in)``;
* ``outlier_values`` float16 ``[n]``, and ``outlier_low`` and ``outlier_high``, their positions
  ``column · out + row`` in ascending order as :mod:`~ulbq.formats.positions` packs them; absent without outliers.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator

from ulbq.formats.bits import BaseScheme, Format, TensorSpec, pack_planes, packed_length, unpack_planes
from ulbq.formats.positions import pack_positions, position_shapes, unpack_positions

Width = Annotated[int, Field(ge=2, le=4)]


class CodebookScheme(BaseScheme):
    """Parameters of the codebook format.

    Attributes:
        bits: width of a column that the method has not widened; what a matrix has without ``widths``.
        widths: how many columns of one matrix have which width, ascending; empty for a matrix whose columns all have
            ``bits``. Each layer has counts of its own.
        outliers: number of weights of the matrix that are stored as values.
    """

    format: Literal["codebook"] = "codebook"
    bits: Literal[2, 3, 4] = 2
    widths: dict[Width, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    outliers: int = Field(default=0, ge=0)

    @field_validator("widths")
    @classmethod
    def _one_form(cls, widths: dict[int, int]) -> dict[int, int]:
        return {width: widths[width] for width in sorted(widths) if widths[width]}

    @classmethod
    def of(cls, bits: Literal[2, 3, 4], widths: torch.Tensor, outliers: int = 0) -> Self:
        """Scheme of a matrix whose columns have ``widths`` ``[in]``, of any integer dtype."""
        found, counts = widths.unique(return_counts=True)
        return cls(bits=bits, widths=dict(zip(found.tolist(), counts.tolist(), strict=True)), outliers=outliers)

    def __hash__(self) -> int:
        return hash((self.bits, *self.widths.items(), self.outliers))

    @property
    def group_size(self) -> int:
        """-1: a column's levels serve all its outputs, and nothing is shared along the inputs."""
        return -1

    @property
    def label(self) -> str:
        """Short name, as in ``cb2``; ``cb2.1`` is the mean width of the columns, ``-o`` stands for outliers."""
        columns = sum(self.widths.values())
        mean = sum(width * count for width, count in self.widths.items()) / columns if columns else self.bits
        return f"cb{round(mean, 2):g}" + ("-o" if self.outliers else "")

    @property
    def nominal(self) -> Self:
        """The scheme without what counts the columns of one matrix: what matrices of one model have in common."""
        return type(self)(bits=self.bits)

    def columns(self, in_features: int) -> dict[int, int]:
        """Columns of each width in a matrix of so many inputs, widest first. ValueError where they do not add up."""
        columns = self.widths or {self.bits: in_features}
        if sum(columns.values()) != in_features:
            raise ValueError(f"widths of {sum(columns.values())} columns do not fit a matrix of {in_features}")
        return dict(sorted(columns.items(), reverse=True))

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the stored tensors of one matrix."""
        columns = self.columns(in_features)
        planes = sum(width * count for width, count in columns.items())
        octets, rest = divmod(out_features, 8)
        specs = {"codes": TensorSpec(dtype="uint8", shape=(planes, octets), role="codes")}
        if rest:
            specs["tail_codes"] = TensorSpec(dtype="uint8", shape=(rest, packed_length(planes)), role="codes")
        levels = sum(count << width for width, count in columns.items())
        specs["codebooks"] = TensorSpec(dtype="float16", shape=(levels,), role="codebooks")
        if len(columns) > 1:
            shape = ((len(columns) - 1).bit_length(), packed_length(in_features))
            specs["columns"] = TensorSpec(dtype="uint8", shape=shape, role="columns")
        if self.outliers:
            low, high = position_shapes(self.outliers, out_features * in_features)
            specs["outlier_values"] = TensorSpec(dtype="float16", shape=(self.outliers,), role="outliers")
            specs["outlier_low"] = TensorSpec(dtype="uint8", shape=low, role="outliers")
            specs["outlier_high"] = TensorSpec(dtype="uint8", shape=high, role="outliers")
        return specs


class Outliers(NamedTuple):
    """Weights stored as values: int64 ``[n]`` ascending positions ``column · out + row``, and values ``[n]``."""

    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def where(cls, mask: torch.Tensor, weight: torch.Tensor) -> Self:
        """Those of a weight ``[out, in]`` that a boolean mask ``[out, in]`` picks."""
        positions = mask.T.flatten().nonzero().flatten()
        return cls(positions, weight.T.flatten()[positions])


class Columns(NamedTuple):
    """A matrix by its columns, in the matrix's own order.

    Attributes:
        codes: ``[in, out]`` uint8, those of column ``j`` below ``2**widths[j]``; an outlier's counts for nothing.
        widths: ``[in]`` any integer dtype.
        codebooks: ``[in, k]`` levels of each column, stored as float16; what is beyond ``2**widths[j]`` is not.
        outliers: None where there are none.
    """

    codes: torch.Tensor
    widths: torch.Tensor
    codebooks: torch.Tensor
    outliers: Outliers | None = None


def ascending(columns: Columns) -> Columns:
    """The same matrix with every column's levels in ascending order: fitting or training may let levels pass others."""
    codes, widths, books, outliers = columns
    slots = torch.arange(books.shape[1], device=books.device)
    absent = slots >= (1 << widths.long()).unsqueeze(1)
    ordered, order = books.masked_fill(absent, torch.inf).sort(1)
    ranks = order.argsort(1).to(torch.uint8)
    return Columns(ranks.gather(1, codes.long()), widths, ordered.masked_fill(absent, 0), outliers)


def pack(scheme: CodebookScheme, columns: Columns) -> dict[str, torch.Tensor]:
    """Pack one matrix.

    Returns:
        The stored tensors, named as in :meth:`CodebookScheme.tensors`.

    Raises:
        ValueError: widths or outliers are not those that the scheme counts, a code has no level, or positions do not
            ascend.
    """
    codes, widths, codebooks, outliers = columns
    in_features = len(codes)
    counts = scheme.columns(in_features)
    count = 0 if outliers is None else len(outliers.positions)
    if CodebookScheme.of(scheme.bits, widths).columns(in_features) != counts or count != scheme.outliers:
        raise ValueError("the matrix has other widths or outliers than its scheme says")
    if bool((codes.int() >> widths.int().unsqueeze(1)).any()):
        raise ValueError("a code is beyond its column's levels")
    order = widths.argsort(descending=True, stable=True)
    levels = codebooks[order][:, : 2 ** max(counts)]
    tensors = pack_codes(codes.to(torch.uint8)[order], counts)
    tensors["codebooks"] = levels[levels_of(counts, codes.device)].to(torch.float16)
    if len(counts) > 1:
        ranks = torch.searchsorted(torch.tensor(sorted(counts), device=codes.device), widths.long())
        tensors["columns"] = pack_planes(ranks.to(torch.uint8), (len(counts) - 1).bit_length())
    if outliers is not None and count:
        tensors["outlier_values"] = outliers.values.to(torch.float16).contiguous()
        low, high = pack_positions(outliers.positions, codes.numel())
        tensors |= {"outlier_low": low, "outlier_high": high}
    return tensors


def pack_codes(codes: torch.Tensor, counts: Mapping[int, int]) -> dict[str, torch.Tensor]:
    """``codes`` and ``tail_codes`` of uint8 codes ``[in, out]`` in sorted order, of so many columns of each width."""
    rows = torch.cat([(codes[:wide] >> plane) & 1 for plane, wide in enumerate(_wider(counts))])
    whole = rows.shape[1] - rows.shape[1] % 8
    tensors = {"codes": pack_planes(rows[:, :whole].contiguous(), 1)[0]}
    if whole < rows.shape[1]:
        tensors["tail_codes"] = pack_planes(rows[:, whole:].T.contiguous(), 1)[0]
    return tensors


def unpack(scheme: CodebookScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> Columns:
    """Undo :func:`pack`: codebooks and values float32, codebooks padded with zeros to the widest column's."""
    counts = scheme.columns(in_features)
    device = tensors["codes"].device
    widths = torch.cat([torch.full((count,), width, dtype=torch.uint8) for width, count in counts.items()]).to(device)
    codebooks = torch.zeros(in_features, 2 ** max(counts), device=device)
    codebooks[levels_of(counts, device)] = tensors["codebooks"].float()
    place = _places(tensors, in_features)
    codes = _codes(counts, tensors)
    if place is not None:
        codes, widths, codebooks = codes[place], widths[place], codebooks[place]
    outliers = None
    if scheme.outliers:
        outliers = Outliers(_outlier_positions(scheme, tensors), tensors["outlier_values"].float())
    return Columns(codes, widths, codebooks, outliers)


def dequantize(
    scheme: CodebookScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights in ``dtype``: the stored float16 values, rounded once where ``dtype`` holds less."""
    counts = scheme.columns(in_features)
    codes, levels = _codes(counts, tensors), tensors["codebooks"].to(dtype)
    sizes = torch.tensor([1 << width for width, count in counts.items() for _ in range(count)], dtype=torch.int32)
    first = (sizes.cumsum(0, dtype=torch.int32) - sizes).to(codes.device)
    columns = levels.index_select(0, (codes + first.unsqueeze(1)).flatten()).view(codes.shape)
    place = _places(tensors, in_features)
    if place is not None:
        columns = columns.index_select(0, place)
    if scheme.outliers:
        positions = _outlier_positions(scheme, tensors)
        columns.view(-1).scatter_(0, positions, tensors["outlier_values"].to(dtype))
    weight: torch.Tensor = columns.T.contiguous()
    return weight


def _wider(counts: Mapping[int, int]) -> list[int]:
    """How many columns have plane 0, plane 1, …: the first so many in sorted order."""
    return [sum(count for width, count in counts.items() if width > plane) for plane in range(max(counts))]


def levels_of(counts: Mapping[int, int], device: torch.device) -> torch.Tensor:
    """Mask ``[in, 2^widest]``, in sorted order, of the levels that each column has."""
    slots = torch.arange(2 ** max(counts))
    return torch.cat([(slots < 2**width).expand(count, -1) for width, count in counts.items()]).to(device)


def _codes(counts: Mapping[int, int], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Codes ``[in, out]`` uint8, columns in sorted order."""
    stored = tensors["codes"]
    rows = unpack_planes(stored.unsqueeze(0), 8 * stored.shape[1])
    if "tail_codes" in tensors:
        tail = unpack_planes(tensors["tail_codes"].unsqueeze(0), len(stored))
        rows = torch.cat([rows, tail.T], 1)
    parts = rows.split(_wider(counts))
    codes: torch.Tensor = parts[0].clone()
    for plane, part in enumerate(parts[1:], 1):
        codes[: len(part)] |= part << plane
    return codes


def _places(tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor | None:
    """``[in]`` where each column stands in sorted order; None where that is its own place."""
    if "columns" not in tensors:
        return None
    order = unpack_planes(tensors["columns"], in_features).argsort(descending=True, stable=True)
    return order.argsort()


def _outlier_positions(scheme: CodebookScheme, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return unpack_positions(tensors["outlier_low"], tensors["outlier_high"], scheme.outliers)


FORMAT = Format(CodebookScheme, dequantize)

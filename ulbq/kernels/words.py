"""The layout of codes that the GPU kernels read: words of 32 columns, with the outputs side by side.

Neighbouring threads take neighbouring outputs, so every load of theirs is one run of memory, and what belongs to a
column (its activation, its levels) is the same for all of them. ``bits`` words int32 hold 32 columns of an output:

* 1, 2 and 4 bits: column ``k`` of the 32 stands in word ``k // (32/bits)`` at bit ``bits · (k % (32/bits))``;
* 3 bits: with ``m = k // 8`` and ``i = k % 8`` the two low bits stand in word ``m // 2`` at bit ``4i + 2·(m % 2)``, the
  high one in word 2 at bit ``4i + m``. Two masks and an OR make eight codes of four bits out of it.

A matrix ``[out, in]`` is ``[in/32, bits, out]`` words; columns and outputs are padded with zeros to multiples of 64.
Scales and zero points lie ``[G, out]``, padded alike. The layout replaces the stored tensors in memory, and gives them
back exactly. All of it is plain torch and runs where the tensors are.
"""

from collections.abc import Iterator, Mapping

import torch

from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
)
from ulbq.formats.bits import pack_planes, unpack_planes
from ulbq.kernels.columns import outliers_by_output

CHUNK = 32
"""Columns of a word."""
PAD = 64
"""Columns and outputs are padded to multiples of it."""
# Outputs that are repacked at a time: the codes take a byte each, and shifted ones four, while that is done.
_SLAB = 1024


def padded(count: int) -> int:
    """The next multiple of :data:`PAD`."""
    return -(-count // PAD) * PAD


def unsupported_reason(scheme: AnyScheme) -> str | None:
    """Why a matrix has no words, whatever the machine; None where it has."""
    if scheme.bits > 4:
        return f"{scheme.bits} bits: at most 4"
    if scheme.group_size != -1 and scheme.group_size % CHUNK:
        return f"groups of {scheme.group_size}: a multiple of {CHUNK}"
    return None


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 ``[out, columns]`` as ``[padded columns / 32, bits, padded out]`` int32."""
    outs, columns = codes.shape
    words = codes.new_zeros(padded(columns) // CHUNK, bits, padded(outs), dtype=torch.int32)
    for begin in range(0, outs, _SLAB):
        part = torch.nn.functional.pad(codes[begin : begin + _SLAB], (0, padded(columns) - columns)).int()
        chunks = part.unflatten(1, (-1, CHUNK))
        target = words[:, :, begin : begin + len(part)]
        low, place, shift, high = _places(bits, codes.device)
        shifted = (chunks & low) << shift
        for word in range(bits - (bits == 3)):
            target[:, word] = shifted[..., place == word].sum(-1, dtype=torch.int32).T
        if bits == 3:
            target[:, 2] = (chunks >> 2 << high).sum(-1, dtype=torch.int32).T
    return words


def from_words(words: torch.Tensor, outs: int, columns: int) -> torch.Tensor:
    """Undo :func:`to_words`: codes uint8 ``[out, columns]``."""
    bits = words.shape[1]
    low, place, shift, high = _places(bits, words.device)
    codes = torch.empty(outs, columns, dtype=torch.uint8, device=words.device)
    for begin in range(0, outs, _SLAB):
        part = words[:, :, begin : min(begin + _SLAB, outs)]
        found = (part[:, place] >> shift.unsqueeze(-1)) & low
        if bits == 3:
            found |= ((part[:, 2:] >> high.unsqueeze(-1)) & 1) << 2
        codes[begin : begin + _SLAB] = found.flatten(0, 1)[:columns].T.to(torch.uint8)
    return codes


def pack(scheme: AnyScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int) -> dict[str, torch.Tensor]:
    """The tensors of a matrix in words, in place of its codes, scales and zero points.

    Args:
        scheme: one that :func:`unsupported_reason` has nothing against.
        stored: its tensors; of the affine format zero points may also be floating ``[out, G]``.
        outs, columns: the matrix's dimensions.

    Returns:
        ``word_codes`` int32 ``[chunks, bits, padded out]``, of dual binary ``[2, chunks, 1, padded out]``; of column
        codebooks those of the widest columns first, flat. ``word_scales`` ``[G, padded out]``, of dual binary
        ``[2, G, padded out]``; ``word_zeros`` uint8 or floating ``[G, padded out]`` where there are zero points. Of
        codebooks ``word_levels`` float16 ``[Σ 2^bits]``, ``word_order`` int32 the column of each place, −1 for none,
        and with outliers ``outlier_starts``, ``outlier_columns`` and ``outlier_deltas`` by output. Trellis codes are
        words as they are stored: ``word_codes`` int32 ``[in/16, out/16, 8·bits]``.
    """
    if isinstance(scheme, TrellisScheme):
        return {"word_codes": stored["codes"].view(torch.int32)}
    if isinstance(scheme, CodebookScheme):
        return _pack_columns(scheme, stored, outs, columns)
    if isinstance(scheme, DualBinaryScheme):
        planes = [to_words(unpack_planes(plane.unsqueeze(0), columns), 1) for plane in stored["codes"]]
        scales = torch.stack([_by_group(each) for each in stored["scales"]])
        return {"word_codes": torch.stack(planes), "word_scales": scales}
    packed = {"word_codes": to_words(unpack_planes(stored["codes"], columns), scheme.bits)}
    if isinstance(scheme, BinaryMosScheme):  # a sign is 2 · (code − 1/2)
        two = torch.full((1, padded(outs)), 2.0, dtype=torch.float16, device=stored["codes"].device)
        return packed | {"word_scales": two}
    packed["word_scales"] = _by_group(stored["scales"])
    zeros = stored.get("zeros")
    if zeros is not None and not zeros.is_floating_point():
        zeros = unpack_planes(zeros, stored["scales"].numel()).view_as(stored["scales"])
    return packed if zeros is None else packed | {"word_zeros": _by_group(zeros)}


def unpack(scheme: AnyScheme, packed: Mapping[str, torch.Tensor], outs: int, columns: int) -> dict[str, torch.Tensor]:
    """Undo :func:`pack`: codes, scales and zero points as stored."""
    words = packed["word_codes"]
    if isinstance(scheme, TrellisScheme):
        return {"codes": words.view(torch.uint8)}
    if isinstance(scheme, CodebookScheme):
        return _unpack_columns(scheme, words, outs, columns)
    if isinstance(scheme, DualBinaryScheme):
        planes = torch.cat([pack_planes(from_words(plane, outs, columns), 1) for plane in words])
        return {"codes": planes, "scales": packed["word_scales"][..., :outs].transpose(1, 2).contiguous()}
    stored = {"codes": pack_planes(from_words(words, outs, columns), scheme.bits)}
    if isinstance(scheme, AffineScheme):
        stored["scales"] = packed["word_scales"][:, :outs].T.contiguous()
        if "word_zeros" in packed:
            zeros = packed["word_zeros"][:, :outs].T
            stored["zeros"] = (
                zeros.contiguous() if zeros.is_floating_point() else pack_planes(zeros.flatten(), scheme.bits)
            )
    return stored


def _places(bits: int, device: torch.device) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask of the low bits; for each of 32 columns their word and shift, and the shift of the high bit of three."""
    k = torch.arange(CHUNK, dtype=torch.int32, device=device)
    high = 4 * (k % 8) + k // 8
    if bits == 3:
        return 3, k // 16, 4 * (k % 8) + 2 * (k // 8 % 2), high
    return (1 << bits) - 1, k * bits // 32, k * bits % 32, high


def _by_group(values: torch.Tensor) -> torch.Tensor:
    """``[out, G]`` as ``[G, padded out]``."""
    return torch.nn.functional.pad(values.T, (0, padded(len(values)) - len(values))).contiguous()


def _pack_columns(
    scheme: CodebookScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int
) -> dict[str, torch.Tensor]:
    found = codebook.unpack(scheme, stored, columns)
    order = found.widths.argsort(descending=True, stable=True)
    words, levels, places = [], [], []
    begin = 0
    for bits, count in scheme.columns(columns).items():
        some, missing = order[begin : begin + count], padded(count) - count
        words.append(to_words(found.codes[some].T, bits).flatten())
        books = found.codebooks[some, : 1 << bits].half()
        levels.append(torch.nn.functional.pad(books, (0, 0, 0, missing)).flatten())
        places.append(torch.nn.functional.pad(some.int(), (0, missing), value=-1))
        begin += count
    packed = {"word_codes": torch.cat(words), "word_levels": torch.cat(levels), "word_order": torch.cat(places)}
    return packed | outliers_by_output(found, outs, padded(outs))


def _unpack_columns(scheme: CodebookScheme, words: torch.Tensor, outs: int, columns: int) -> dict[str, torch.Tensor]:
    counts, parts, begin = scheme.columns(columns), [], 0
    for bits, count in counts.items():
        size = padded(count) // CHUNK * bits * padded(outs)
        one = words[begin : begin + size].view(-1, bits, padded(outs))
        parts.append(from_words(one, outs, count).T)
        begin += size
    return codebook.pack_codes(torch.cat(parts), counts)


Slabs = Iterator[tuple[slice, torch.Tensor]]


def slabs(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outs: int,
    columns: int,
    centre: float,
    dtype: torch.dtype,
) -> Slabs:
    """The dense weight of affine codes or of dual binary ones, some outputs at a time, as the stored tensors give it.

    Args:
        codes, scales, zeros: as :func:`pack` makes them.
        outs, columns: the matrix's dimensions.
        centre: the zero point, where none are given.
        dtype: of the weight; the arithmetic is float32, or float64 where that is asked for.
    """
    exact = torch.promote_types(torch.float32, dtype)
    planes = [(codes, scales)] if codes.ndim == 3 else list(zip(codes, scales, strict=True))
    for begin in range(0, outs, _SLAB):
        part = slice(begin, min(begin + _SLAB, outs))
        count = part.stop - begin
        weight = codes.new_zeros(count, columns, dtype=exact)
        for words, scale in planes:
            found = from_words(words[..., part], count, columns).to(exact).unflatten(1, (len(scale), -1))
            zero = centre if zeros is None else zeros[:, part].T.to(exact).unsqueeze(-1)
            weight += ((found - zero) * scale[:, part].T.to(exact).unsqueeze(-1)).flatten(1)
        yield part, weight.to(dtype)


def column_weight(
    packed: Mapping[str, torch.Tensor], counts: Mapping[int, int], outs: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The dense weight ``[out, in]`` of column codebooks as :func:`pack` made them, ``counts`` of them by width."""
    weight = torch.zeros(columns, outs, dtype=dtype, device=packed["word_codes"].device)
    code = level = place = 0
    for bits, count in counts.items():
        size = padded(count) // CHUNK * bits * padded(outs)
        codes = from_words(packed["word_codes"][code : code + size].view(-1, bits, padded(outs)), outs, count).T
        levels = packed["word_levels"][level : level + (count << bits)].view(count, -1).to(dtype)
        weight[packed["word_order"][place : place + count].long()] = levels.gather(1, codes.long())
        code, level, place = code + size, level + (padded(count) << bits), place + padded(count)
    if "outlier_starts" in packed:
        weight.index_put_(
            (packed["outlier_columns"].long(), outlier_outputs(packed)), packed["outlier_deltas"].to(dtype), True
        )
    return weight.T


def outlier_outputs(packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Output int64 ``[n]`` of each outlier."""
    starts = packed["outlier_starts"]
    numbers = torch.arange(len(packed["outlier_columns"]), device=starts.device)
    return torch.searchsorted(starts, numbers, right=True) - 1

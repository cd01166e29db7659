"""What a GGUF file says of itself before its data, read in one walk.

gguf's own reader makes a numpy array of every token and merge of the vocabulary, which takes seconds. The tokenizer's
arrays are stepped over here: only who builds the tokenizer wants them.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from ulbq.models.gguf_types import SIZES, AnyType, type_of

MAGIC = b"GGUF"
_TOKENIZER = "tokenizer."
_VOCABULARY = "tokenizer.ggml.tokens"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where the file names none
_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

Value = int | float | str | list[int | float | str]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how: ``offset`` in bytes from the file's start, ``shape`` in torch's order."""

    kind: AnyType
    shape: tuple[int, ...]
    offset: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of its bytes. Raises ValueError where rows are no whole blocks."""
        weights, size = SIZES[self.kind]
        if self.shape[-1] % weights:
            raise ValueError(f"a row of {self.shape[-1]} weights is no whole number of {self.kind.name} blocks")
        return (*self.shape[:-1], self.shape[-1] // weights * size)


@dataclass
class GgufHeader:
    """Metadata and tensor table of a file.

    Attributes:
        blob: the whole file, mapped.
        values: the metadata, but for the tokenizer's arrays.
        lengths: of these arrays.
        tensors: by their stored names.
    """

    blob: npt.NDArray[np.uint8]
    values: dict[str, Value] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    _extents: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture. Raises KeyError where the file tells none."""
        return str(self.values["general.architecture"])

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Bytes of a tensor, a view of the file, as :func:`~ulbq.models.gguf_types.dequantize` takes them."""
        tensor = self.tensors[name]
        shape = tensor.byte_shape
        return self.blob[tensor.offset : tensor.offset + prod(shape)].reshape(shape)

    def array(self, key: str) -> list[int | float | str]:
        """Values of one of the tokenizer's arrays; none where the file has no such. Raises ValueError: damaged ones."""
        if key not in self.lengths:
            return []
        walk = _Walk(self.blob.data, self._extents[key][0])
        walk.text()
        _, code, count = walk.unpack("IIQ")
        return _values(walk, GGUFValueType(code), count)

    @property
    def uncounted(self) -> int | None:
        """Tokens in the vocabulary, where no value of the file says it."""
        return None if f"{self.architecture}.vocab_size" in self.values else self.lengths.get(_VOCABULARY)

    def without_vocabulary(self) -> bytes:
        """A GGUF file with the same metadata but the size of the vocabulary for itself, and the same tensors, empty."""
        kept = [extent for key, extent in self._extents.items() if key not in self.lengths]
        metadata = [self.blob[slice(*extent)].tobytes() for extent in kept]
        if self.uncounted is not None:
            metadata.append(
                _text(f"{self.architecture}.vocab_size") + struct.pack("<II", GGUFValueType.UINT32, self.uncounted)
            )
        head = MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(self.tensors), len(metadata))
        # One dimension of nothing, as float32, at the start of no data.
        table = [_text(name) + struct.pack("<IQIQ", 1, 0, GGMLQuantizationType.F32, 0) for name in self.tensors]
        return b"".join([head, *metadata, *table])


def read_header(path: Path) -> GgufHeader:
    """Read what stands before the data.

    Raises:
        ValueError, KeyError, struct.error: the file is damaged, or of another version.
    """
    header = GgufHeader(np.memmap(path, dtype=np.uint8, mode="r"))
    walk = _Walk(header.blob.data)
    if walk.take(4).tobytes() != MAGIC:
        raise ValueError("it does not start as a GGUF file does")
    version, tensors, entries = walk.unpack("IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"it is of version {version}, not of {' or '.join(map(str, _VERSIONS))}")
    for _ in range(entries):
        _read_entry(header, walk)
    table = [_read_tensor(walk) for _ in range(tensors)]
    alignment = header.values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"its data cannot be aligned to {alignment} bytes")
    start = -(-walk.at // alignment) * alignment
    for name, kind, shape, offset in table:
        tensor = StoredTensor(kind, shape, start + offset)
        if name in header.tensors:
            raise ValueError(f"two tensors are called '{name}'")
        if tensor.offset + prod(tensor.byte_shape) > len(header.blob):
            raise ValueError(f"it ends before the tensor '{name}' does")
        header.tensors[name] = tensor
    return header


class _Walk:
    """A place in a file that moves on with what is read; all numbers are little-endian."""

    def __init__(self, blob: memoryview, at: int = 0) -> None:
        self.at = at
        self._blob = blob

    def unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + layout, self._blob, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self._blob):
            raise ValueError("it ends in its header")
        self.at += size
        return self._blob[self.at - size : self.at]

    def text(self) -> str:
        return self.take(*self.unpack("Q")).tobytes().decode()

    def skip_texts(self, count: int) -> None:
        read, blob, at = struct.Struct("<Q").unpack_from, self._blob, self.at
        for _ in range(count):
            at += 8 + read(blob, at)[0]
        self.at = at


def _read_entry(header: GgufHeader, walk: _Walk) -> None:
    """One key and its value."""
    start, key = walk.at, walk.text()
    if key in header._extents:
        raise ValueError(f"it has two values for '{key}'")
    kind = GGUFValueType(*walk.unpack("I"))
    if kind != GGUFValueType.ARRAY:
        header.values[key] = walk.text() if kind == GGUFValueType.STRING else walk.unpack(_FORMATS[kind])[0]
    else:
        code, count = walk.unpack("IQ")
        _read_array(header, walk, key, GGUFValueType(code), count)
    header._extents[key] = (start, walk.at)


def _read_array(header: GgufHeader, walk: _Walk, key: str, element: GGUFValueType, count: int) -> None:
    """The values of a key; of the tokenizer's, only how many there are."""
    if not key.startswith(_TOKENIZER):
        header.values[key] = _values(walk, element, count)
        return
    header.lengths[key] = count
    if element == GGUFValueType.STRING:
        walk.skip_texts(count)
    else:
        walk.take(count * struct.calcsize("<" + _FORMATS[element]))


def _values(walk: _Walk, element: GGUFValueType, count: int) -> list[int | float | str]:
    if element == GGUFValueType.STRING:
        return [walk.text() for _ in range(count)]
    return [*walk.unpack(f"{count}{_FORMATS[element]}")]


def _read_tensor(walk: _Walk) -> tuple[str, AnyType, tuple[int, ...], int]:
    """One row of the tensor table, its offset from the start of the data."""
    name = walk.text()
    shape = walk.unpack(f"{walk.unpack('I')[0]}Q")[::-1]  # the file has the fastest dimension first
    kind, offset = walk.unpack("IQ")
    return name, type_of(kind), shape or (1,), offset


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded

"""Tensors of a GGUF file under the model's own parameter names, dequantized one at a time.

llama.cpp permutes some weights when it writes a GGUF file (the query and key rows of Llama, the norms of Gemma).
transformers knows how to undo that, architecture by architecture; its tables do the work here too, so that every
tensor equals the one in transformers' own load of the whole file.
"""

import re
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from ulbq.artifacts.disk import check_unchanged, stamp_of
from ulbq.errors import InputError
from ulbq.models.gguf_header import MAGIC, GgufHeader, read_header
from ulbq.models.gguf_types import dequantize

GGUF_NAME = "model.gguf"
"""What ulbq calls a file that it writes."""

_FULL = frozenset({"F32", "F16", "BF16", "F64"})
_QUANTIZATION_SUFFIX = re.compile(r"[.-](?:I?Q\d\w*|TQ\d\w*|MXFP4|BF16|F(?:P)?(?:16|32))$", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def model_name(path: Path) -> str:
    """The file's name without the suffix that tells its quantization: ``SmolLM2-135M-Instruct``."""
    return _QUANTIZATION_SUFFIX.sub("", path.stem)


def open_gguf(path: Path) -> GgufHeader:
    """Map a file and read its header.

    Raises:
        InputError: it is damaged, one part of several, or of an architecture that transformers cannot map.
    """
    try:
        header = read_header(path)
        architecture = header.architecture
    except (ValueError, KeyError, OSError, struct.error) as error:
        raise InputError(
            f"'{path}' is a damaged GGUF file: {error}", hint="It may be a partial download; fetch it again."
        ) from error
    parts = header.values.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise InputError(
            f"'{path}' is one of {parts} parts of a split GGUF file.",
            hint="Join them first: llama-gguf-split --merge FIRST_PART OUT.",
        )
    if is_gguf_arch_supported(architecture):
        # transformers keeps these on another path, with other tables, and packed.
        raise _unsupported(path, architecture)
    return header


class GgufTensors:
    """Reads a memory-mapped GGUF file by parameter name.

    Args:
        path: the file, for messages.
        header: of the file.
        model: the model that the file's configuration describes; only its names count.

    Attributes:
        names: parameters of the model that the file holds.
        unplaced: names in the file of the tensors that lead to no parameter.

    Raises:
        InputError: the architecture is one whose tensors transformers cannot map.
    """

    def __init__(self, path: Path, header: GgufHeader, model: PreTrainedModel) -> None:
        architecture = header.architecture
        processor: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        try:
            self._parameters: dict[str, str] = get_gguf_hf_weights_map(_Outline(model), self._processor)
        except NotImplementedError as error:
            raise _unsupported(path, architecture) from error
        self._header = header
        self._sources: dict[str, list[str]] = {}
        for stored in header.tensors:
            name = self._parameters.get(stored) or self._parameters.get(stored.removesuffix(".weight"))
            if name is not None:
                self._sources.setdefault(name, []).append(stored)
        self.names = frozenset(self._sources)
        self._path, self._stamp = path, stamp_of(path)
        placed = {stored for some in self._sources.values() for stored in some}
        self.unplaced = frozenset(header.tensors.keys() - placed)

    @property
    def stored_as(self) -> tuple[str, float] | None:
        """``GGUF`` and the type of most of the matrices' values, bits a value of all; None in full precision."""
        values: Counter[str] = Counter()
        size = 0
        for tensor in self._header.tensors.values():
            if len(tensor.shape) > 1:
                values[tensor.kind.name] += prod(tensor.shape)
                size += prod(tensor.byte_shape)
        most = values.most_common(1)
        return None if not most or most[0][0] in _FULL else (f"GGUF {most[0][0]}", size * 8 / values.total())

    @property
    def quantized_by(self) -> str:
        """Who says to have quantized the file; empty where nobody does."""
        said = self._header.values.get("general.quantized_by", "")
        return said if isinstance(said, str) else ""

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the stored tensors, such as ``Q4_1``, those that take the most bytes first."""
        taken: Counter[str] = Counter()
        for tensor in self._header.tensors.values():
            taken[tensor.kind.name] += prod(tensor.byte_shape)
        return tuple(kind for kind, _ in taken.most_common())

    def read(self, name: str) -> torch.Tensor:
        """The parameter ``name`` in float32. Raises KeyError where the file lacks it, InputError where it changed."""
        check_unchanged(self._path, self._stamp)
        collected: dict[str, torch.Tensor] = {}
        for stored in self._sources[name]:
            result = self._processor.process(
                weights=dequantize(self._header.data(stored), self._header.tensors[stored].kind),
                name=stored,
                tensor_key_mapping=self._parameters,
                parsed_parameters={"tensors": collected},
            )
            # A processor that fuses or splits tensors writes into ``collected`` itself and returns no name.
            if result.name in self._parameters:
                # Tensors that need no arithmetic are still views of the read-only file.
                collected[name] = torch.from_numpy(np.require(result.weights, requirements=["C", "W", "E"]))
        return collected[name]


class _Outline:
    """What transformers' name map asks of a model, without the insides of its blocks.

    It asks each submodule in turn and builds the whole table of names for it. A block's name in a GGUF file has the
    block's number, which no submodule of the list of blocks knows: they only take time.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, "_Outline"]]:
        children = self._module.named_children()
        return [(name, _Outline(child)) for name, child in children if not isinstance(child, nn.ModuleList)]


def _unsupported(path: Path, architecture: str) -> InputError:
    return InputError(
        f"'{path}' holds a '{architecture}' model, whose GGUF tensors cannot be mapped to transformers' parameters.",
        hint="Use the model's original folder or Hub id instead of the GGUF file.",
    )

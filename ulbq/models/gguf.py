"""Tensors of a GGUF file under the model's own parameter names, dequantized one at a time.

llama.cpp permutes some weights when it writes a GGUF file (the query and key rows of Llama, the norms of Gemma).
transformers knows how to undo that, architecture by architecture; its tables do the work here too, so that every
tensor equals the one in transformers' own load of the whole file.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import PreTrainedModel
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)

from ulbq.errors import InputError

_MAGIC = b"GGUF"
_QUANTIZATION_SUFFIX = re.compile(r"[.-](?:I?Q\d\w*|TQ\d\w*|MXFP4|BF16|F(?:P)?(?:16|32))$", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def model_name(path: Path) -> str:
    """The file's name without the suffix that tells its quantization: ``SmolLM2-135M-Instruct``."""
    return _QUANTIZATION_SUFFIX.sub("", path.stem)


def open_gguf(path: Path) -> GGUFReader:
    """Map a file and read its header.

    Raises:
        InputError: it is damaged, or one part of several.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(
            f"'{path}' is a damaged GGUF file: {error}", hint="It may be a partial download; fetch it again."
        ) from error
    parts = read_field(reader, "split.count")
    if parts and parts[0] > 1:
        raise InputError(
            f"'{path}' is one of {parts[0]} parts of a split GGUF file.",
            hint="Join them first: llama-gguf-split --merge FIRST_PART OUT.",
        )
    return reader


class GgufTensors:
    """Reads a memory-mapped GGUF file by parameter name.

    Args:
        path: the file, for messages.
        reader: the file, opened.
        model: the model that the file's configuration describes; only its names count.

    Raises:
        InputError: the architecture is one whose tensors transformers cannot map.
    """

    def __init__(self, path: Path, reader: GGUFReader, model: PreTrainedModel) -> None:
        architecture = read_field(reader, "general.architecture")[0]
        if is_gguf_arch_supported(architecture):
            # transformers keeps these on another path, with other tables, and packed.
            raise _unsupported(path, architecture)
        processor: type[TensorProcessor] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        try:
            self._parameters: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise _unsupported(path, architecture) from error
        # The reader itself keeps an array for every token of the vocabulary; only the tensors outlive this function.
        self._tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        self._sources: dict[str, list[str]] = {}
        for stored in self._tensors:
            name = self._parameters.get(stored) or self._parameters.get(stored.removesuffix(".weight"))
            if name is not None:
                self._sources.setdefault(name, []).append(stored)
        self._names = frozenset(self._sources)

    @property
    def names(self) -> frozenset[str]:
        """Parameters of the model that the file holds."""
        return self._names

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the stored tensors, such as ``Q4_1``, those that take the most bytes first."""
        taken: Counter[str] = Counter()
        for data, kind in self._tensors.values():
            taken[kind.name] += data.nbytes
        return tuple(kind for kind, _ in taken.most_common())

    def read(self, name: str) -> torch.Tensor:
        """The parameter ``name`` in float32. Raises KeyError where the file lacks it."""
        collected: dict[str, torch.Tensor] = {}
        for stored in self._sources[name]:
            data, kind = self._tensors[stored]
            result = self._processor.process(
                weights=dequantize(data, kind),
                name=stored,
                tensor_key_mapping=self._parameters,
                parsed_parameters={"tensors": collected},
            )
            # A processor that fuses or splits tensors writes into ``collected`` itself and returns no name.
            if result.name in self._parameters:
                # Tensors that need no arithmetic are still views of the read-only file.
                collected[name] = torch.from_numpy(np.require(result.weights, requirements=["C", "W", "E"]))
        return collected[name]


def _unsupported(path: Path, architecture: str) -> InputError:
    return InputError(
        f"'{path}' holds a '{architecture}' model, whose GGUF tensors cannot be mapped to transformers' parameters.",
        hint="Use the model's original folder or Hub id instead of the GGUF file.",
    )

"""Checkpoints that other tools quantized: each weight dequantized when it is read.

One file a layout. Its ``read`` finds the packed weights of a checkpoint, and how each is decoded; facts and names in
it are those of the tool that writes the layout.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError
from ulbq.models.foreign import auto_round, awq, bitsandbytes, compressed_tensors, floats, gptq, hqq, mlx
from ulbq.models.foreign.base import Packed, damaged, folder_of, table

MLX = "mlx"
"""What a ``quantization`` without a ``quant_method`` is."""

# What inputs and outputs are scaled by says nothing of weights.
_OF_ACTIVATIONS = re.compile(r".*(\.(input|output)_(scale|zero_point|global_scale)|activation_scale|\.qscale_act)")
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class _Reader(NamedTuple):
    """How a tool's checkpoints are read, and what people call it; a format that is nobody's tool may hold no weight."""

    name: str
    read: Callable[[LazyTensors, Mapping[str, Any]], Iterator[tuple[str, Packed]]]
    tool: bool = True


READERS = {
    "gptq": _Reader("GPTQ", gptq.read),
    "awq": _Reader("AWQ", awq.read),
    "auto-round": _Reader("AutoRound", auto_round.read),
    "intel/auto-round": _Reader("AutoRound", auto_round.read),
    "compressed-tensors": _Reader("compressed-tensors", compressed_tensors.read),
    MLX: _Reader("MLX", mlx.read),
    "bitsandbytes": _Reader("bitsandbytes", bitsandbytes.read),
    "hqq": _Reader("HQQ", hqq.read),
    "modelopt": _Reader("ModelOpt", floats.read_modelopt),
    "fbgemm_fp8": _Reader("FBGEMM", floats.read_fbgemm),
    "fp8": _Reader("FP8", floats.read_fp8, tool=False),
    "mxfp4": _Reader("MXFP4", floats.read_mxfp4, tool=False),
}
"""By ``quant_method``."""


class ForeignTensors(LazyTensors):
    """Tensors of a checkpoint that another tool quantized; a packed weight is what it stands for.

    Args:
        stored: as they lie there.
        quantization: the ``quantization_config``; its ``quant_method`` is one of :data:`READERS`.

    Attributes:
        rounds_inputs: whether the tool rounds what is multiplied with the weights too.
        in_floats: whether all packed weights are floats with scales, as makers publish whole models.

    Raises:
        InputError: a layout that is not read, parts of a weight that do not fit each other, or no packed weight at all.
    """

    def __init__(self, stored: LazyTensors, quantization: Mapping[str, Any]) -> None:
        super().__init__(())
        self._packed, self._reader = stored, READERS[str(quantization["quant_method"])]
        self._weights = dict(self._reader.read(stored, quantization))
        self.rounds_inputs = _rounds_inputs(quantization)
        self.in_floats = all(weight.floats for weight in self._weights.values())
        if not self._weights and self._reader.tool:
            raise InputError(
                f"'{folder_of(stored)}' says that it is quantized already, by {self._reader.name}, and no weight is "
                "stored so.",
                hint="Give the full-precision model it was made from, or fetch this one again.",
            )
        self._stored = {name: one for name, one in stored._stored.items() if not _OF_ACTIVATIONS.fullmatch(name)}
        for name, weight in self._weights.items():
            found = [self._stored.pop(part) for part in weight.parts.values()]
            self._stored[name] = found[0]._replace(shape=weight.shape, dtype=_NAMES[weight.dtype])

    @property
    def files(self) -> list[Path]:
        """The files that hold them: the parts of a weight may lie in several."""
        return self._packed.files

    @property
    def packed_weights(self) -> frozenset[str]:
        """Stored names of the weights that are packed."""
        return frozenset(self._weights)

    @property
    def stored_as(self) -> tuple[str, float] | None:
        """The tool and how most weights are stored, ``GPTQ w4g128``; bits a value over all that stands for them.

        None where nothing is packed.
        """
        if not self._weights:
            return None
        values: Counter[str] = Counter()
        for weight in self._weights.values():
            values[weight.label] += prod(weight.shape)
        size = sum(self._packed.nbytes(part) for weight in self._weights.values() for part in weight.parts.values())
        label = values.most_common(1)[0][0]
        return f"{self._reader.name} {label}" if self._reader.tool else label, 8 * size / values.total()

    def read(self, name: str) -> torch.Tensor:
        """As any other; a packed weight is decoded. Raises InputError where its parts make none."""
        weight = self._weights.get(name)
        if weight is None:
            return self._packed.read(name)
        try:
            return weight.decode({short: self._packed.read(part) for short, part in weight.parts.items()})
        except ValueError:
            raise damaged(name, self._reader.name) from None

    def is_no_bias(self, name: str) -> bool:
        """Whether a stored tensor is a packed layer's bias of zeros, as AutoGPTQ gave one to every layer."""
        known = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in self._weights
        return known and not self.read(name).any()


def _rounds_inputs(said: Mapping[str, Any]) -> bool:
    bits = said.get("act_bits")
    schemes = (one for one in table(said, "config_groups").values() if isinstance(one, dict))
    return (
        (isinstance(bits, int) and bits < 16)
        or said.get("load_in_8bit") is True
        or any(one.get("input_activations") for one in schemes)
    )

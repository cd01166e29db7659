"""Linear layers of vLLM that hold the packed layers of an artifact, each as one of ulbq's own.

vLLM makes one layer of q, k and v, and one of gate and up. Packed matrices cannot be joined where their rows are not
stored one after the other, or their schemes differ: such a layer holds its parts side by side, and joins their outputs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ulbq.errors import InputError, UsageError
from ulbq.formats import AnyScheme
from ulbq.models.hf import UlbqConfig, read_schemes
from ulbq.nn.quant_linear import QuantLinear

_SHARDS: dict[str | None, int] = {"q": 0, "k": 1, "v": 2, None: 0}
"""Places of the parts that vLLM has letters for, or nothing where there is one."""

_IN_BLOCKS = re.compile(r"\.\d+\.")


@dataclass
class _Part:
    """A stored layer that is the whole of a layer of vLLM, or some of its rows.

    Attributes:
        name: that it is stored by.
        scheme: of its weight, if that is packed.
        shape: ``(out, in)``.
        tensors: what was loaded so far, by short name; ``weight`` for a dense one.
    """

    name: str
    scheme: AnyScheme | None
    shape: tuple[int, int]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the tensors that a packed weight has, by short name."""
        try:
            specs = self.scheme.tensors(*self.shape) if self.scheme is not None else {}
        except ValueError:  # a matrix that the scheme cannot hold stays dense
            return {}
        return {short: getattr(torch, spec.dtype) for short, spec in specs.items()}

    def layer(self, dtype: torch.dtype, device: torch.device) -> nn.Linear:
        """The layer itself, which takes the tensors along. Raises InputError where they do not make one."""
        given = {short: tensor.to(device) for short, tensor in self.tensors.items()}
        self.tensors.clear()
        out_features, in_features = self.shape
        with torch.device("meta"):
            if self.scheme is None or given.keys() == {"weight"}:
                dense = nn.Linear(in_features, out_features, bias=False)
            else:
                dense = QuantLinear(self.scheme, in_features, out_features, dtype=dtype)
        try:
            if isinstance(dense, QuantLinear):
                dense.assign(given)
                dense.prepare()
            else:
                dense.weight = nn.Parameter(given["weight"].to(dtype).view(self.shape), requires_grad=False)
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"'{self.name}' is stored otherwise than its configuration says: {error}.",
                hint="Copy the whole artifact again; 'ulbq inspect --verify' checks it.",
            ) from error
        return dense


class PackedConfig(QuantizationConfig):
    """The ``quantization_config`` of an artifact.

    Args:
        config: as ``config.json`` has it.
    """

    def __init__(self, config: UlbqConfig) -> None:
        super().__init__()
        self._config = config
        self._own: Mapping[str, AnyScheme] = {}
        self._shared: AnyScheme | None = None

    @classmethod
    def get_name(cls) -> str:
        return "ulbq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        return cls(UlbqConfig(**config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read what older artifacts do not say in their configuration: schemes, and whether there is an adapter."""
        self._own, self._shared = read_schemes(self._config, Path(model_name))
        if self._config.adapter is None:
            self._config.adapter = Path(model_name, "adapter").is_dir()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._own = hf_to_vllm_mapper.apply_dict(self._own)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Parts for every linear layer; embeddings and head have to be dense.

        Raises:
            UsageError: an adapter would be left out, or experts, embeddings or the head are packed.
        """
        if isinstance(layer, RoutedExperts):
            raise UsageError(
                "vLLM fuses experts, which packed ones cannot be.",
                hint="Convert the artifact: 'ulbq convert DIR --for vllm -o OUT'.",
            )
        if not isinstance(layer, LinearBase):
            # vLLM gives the table of tokens no name in many families.
            tables = [name for name in self._own if not _IN_BLOCKS.search(name)]
            if prefix in tables or (tables and not prefix):
                raise UsageError(
                    "vLLM has no packed embeddings and heads.",
                    hint="Convert the artifact: 'ulbq convert DIR --for vllm -o OUT'.",
                )
            return None
        current = get_current_vllm_config_or_none()
        if self._config.adapter and (current is None or current.lora_config is None):
            raise UsageError(
                "The model was trained with an adapter, and without it is another one.",
                hint="Start the server with --enable-lora --lora-modules tuned=DIR/adapter, and ask for the model "
                "'tuned'.",
            )
        parent, _, own = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(own, [own])]
        return PackedLinearMethod({name: self._own.get(name, self._shared) for name in names})


class PackedLinearMethod(LinearMethodBase):
    """A layer of one part or several.

    Args:
        schemes: of the parts by stored name, in their order; what turns out to be dense needs none.
    """

    def __init__(self, schemes: Mapping[str, AnyScheme | None]) -> None:
        self._schemes = schemes

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters that vLLM finds by name, and whose loader keeps what it is given.

        Raises:
            UsageError: the layer shall be split over devices.
        """
        rows = sum(output_partition_sizes)
        if (input_size_per_partition, rows) != (input_size, output_size):
            raise UsageError("Packed layers are not split over devices.", hint="Leave out --tensor-parallel-size.")
        sizes = output_partition_sizes if len(self._schemes) > 1 else [rows]
        parts = [
            _Part(name, scheme, (size, input_size))
            for (name, scheme), size in zip(self._schemes.items(), sizes, strict=True)
        ]
        dtypes = {"weight": params_dtype}
        for part in parts:
            dtypes |= part.dtypes()
        for short, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(_keep, parts, short)})
            layer.register_parameter(short, parameter)
        layer.params_dtype, layer.loading = params_dtype, (parts, dtypes.keys() - {"weight"})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the parts in place of what was loaded. An empty ``weight`` stays, for those who ask it for its device."""
        parts, shorts = layer.loading
        layer.parts = nn.ModuleList(part.layer(layer.params_dtype, layer.weight.device) for part in parts)
        for short in (*shorts, "loading"):
            delattr(layer, short)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``[tokens, in]`` to ``[tokens, out]``."""
        found = [part(x) for part in layer.parts]
        product = found[0] if len(found) == 1 else torch.cat(found, -1)
        return product if bias is None else product + bias


def _keep(
    parts: Sequence[_Part], short: str, parameter: nn.Parameter, tensor: torch.Tensor, shard: str | int | None = None
) -> None:
    """Keep a copy of a loaded tensor with its part, since loaders use their memory again."""
    if tensor.numel() or short != "weight":  # an empty weight guards against readers that do not know the format
        place = shard if isinstance(shard, int) else _SHARDS[shard]
        parts[place].tensors[short] = tensor.clone()

"""One GGUF file for llama.cpp.

Packed layers are stored in the smallest block type that decodes to the same weights, where there is one (see
:mod:`ulbq.export.gguf_blocks`), all other matrices as float16, which llama.cpp's own quantizer takes from there.
Vectors are float32, as llama.cpp wants them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map, size_label
from transformers import PreTrainedModel

from ulbq import formats
from ulbq.artifacts.disk import replace_synced, temporary, writing
from ulbq.config.run import DtypeName
from ulbq.errors import InputError, NumericsError
from ulbq.export import dense, gguf_adapter, gguf_blocks, gguf_models, packed
from ulbq.export.card import base_of, front_of
from ulbq.export.dense import adapters_to_merge, dense_tensor
from ulbq.export.fit import Candidate, Layer
from ulbq.export.gguf_vocab import add_tokenizer, check_tokenizer
from ulbq.export.rules import Reader
from ulbq.export.targets.base import Conversion, Target, Written, layer_reason
from ulbq.formats import AnyScheme, read_scheme
from ulbq.models.blocks import skeleton
from ulbq.models.gguf import GGUF_NAME
from ulbq.models.gguf_header import read_header
from ulbq.models.gguf_types import SIZES, AnyType, NewType, dequantize
from ulbq.models.load import DTYPES, load_model
from ulbq.models.names import state_names
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.adapter import Adapter

_KINDS = {
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
_FILE_TYPES: dict[AnyType, int] = {
    GGMLQuantizationType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    GGMLQuantizationType.Q1_0: LlamaFileType.MOSTLY_Q1_0,
    NewType.Q2_0: 41,  # MOSTLY_Q2_0
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


class _Tensor(NamedTuple):
    """A tensor as the file holds it: blocks and bfloat16 as uint8, anything else in its dtype.

    Attributes:
        packed: it is the weight of a layer that the artifact holds packed.
    """

    name: str
    data: np.ndarray
    kind: AnyType
    packed: bool = False


class _File:
    """One model on its way into a file. Each tensor is made twice: for its size and type, and to be written.

    Attributes:
        bits: that the packed layers take, once :meth:`declare` has been called.
        tables: names and types of packed tables and heads that are in blocks, then too.
    """

    def __init__(
        self,
        source: ModelSource,
        model: PreTrainedModel,
        dtype: torch.dtype,
        adapters: Mapping[str, Adapter],
        kinds: Sequence[AnyType],
    ) -> None:
        self._source = source
        self._model = model
        self._dtype = dtype
        self._adapters = adapters
        self._kinds = kinds
        self.bits = 0
        self.tables: dict[str, AnyType] = {}
        tables = {name: read_scheme(one.scheme) for name, one in source.tables.items()}
        self._schemes: Mapping[str, AnyScheme] = {**source.packed, **tables}
        self._family = gguf_models.family(source)
        self._aliases = state_names(model)
        self._map = get_tensor_name_map(self._family.arch, source.config.num_hidden_layers)
        # Experts lie in one tensor, one behind the other.
        self._names: dict[str, list[str]] = {}
        for name, fused in stacks(source, model).items():
            self._names.setdefault(self.stored_name(fused), []).append(name)

    def declare(self, writer: GGUFWriter, licence: str | None) -> Counter[AnyType]:
        """Everything of the file that stands before the tensors; returns how many packed layers have each type."""
        source = self._source
        kinds: Counter[AnyType] = Counter()
        for tensor in self.tensors():
            data = tensor.data
            # Of bytes the writer takes the shape for that of the blocks, and knows no block that is new.
            shape, dtype = data.shape, data.dtype
            if dtype == np.uint8:
                weights, size = SIZES[tensor.kind]
                shape, dtype = (*shape[:-1], shape[-1] // size * weights), np.dtype(np.float32)
            writer.add_tensor_info(tensor.name, shape, dtype, data.nbytes, tensor.kind)  # type: ignore[arg-type]
            if tensor.packed:
                kinds[tensor.kind] += len(self._names[tensor.name])
                self.bits += 8 * data.nbytes
            elif tensor.kind in _FILE_TYPES:
                self.tables[self._names[tensor.name][0].removesuffix(".weight")] = tensor.kind
        file_type = _FILE_TYPES.get(kinds.most_common(1)[0][0]) if kinds else None
        writer.add_type("model")
        writer.add_name(source.name)
        writer.add_basename(base_of(source))
        writer.add_size_label(self._size_label())
        if kinds:
            writer.add_quantized_by("ulbq")
        writer.add_quantization_version(2)
        writer.add_file_type(file_type or _KINDS[self._dtype][1])
        if licence:
            writer.add_license(licence)
        gguf_models.add_hyperparameters(writer, source)
        add_tokenizer(writer, source, source.config.vocab_size)
        return kinds

    def _size_label(self) -> str:
        """As llama.cpp's own converter words it: 135M, or 8x160M of experts."""
        sizes = {name: tensor.numel() for name, tensor in self._model.state_dict().items() if name in self._aliases}
        experts = sum(size for name, size in sizes.items() if name in self._source.parts)
        count = max((len(names) for names in self._names.values()), default=1)
        shared = sum(sizes.values()) - experts
        return size_label(shared + experts, shared, experts // count, count if experts else 0)

    def tensors(self) -> Iterator[_Tensor]:
        """All of the file, one at a time."""
        for name, factors in gguf_models.rope_tensors(self._source, self._model).items():
            yield _Tensor(name, factors.numpy(), GGMLQuantizationType.F32)
        for stored, names in self._names.items():
            yield self._make(stored, names)

    def check(self, path: Path) -> None:
        """Read the file back. Raises NumericsError where a tensor does not decode to the model's."""
        header = read_header(path)
        for stored, names in self._names.items():
            kind, data = header.tensors[stored].kind, header.data(stored)
            if kind in _FILE_TYPES:
                parts = data if data.ndim > 2 else [data]
                same = all(
                    np.array_equal(dequantize(part, kind), self._exact(name).numpy())
                    for part, name in zip(parts, names, strict=True)
                )
            else:
                same = np.array_equal(data, self._make(stored, names).data.view(np.uint8))
            if not same:
                raise NumericsError(
                    f"What was written of '{names[0]}' does not decode to the model's weights.",
                    hint="This is a defect of ulbq, or of the disk: please report it with the command.",
                )

    def _exact(self, name: str) -> torch.Tensor:
        """The weight that a packed layer stands for, as llama.cpp orders its rows."""
        linear = name.removesuffix(".weight")
        packed = self._source.read_packed(linear)
        return self.ordered(name, formats.dequantize(self._schemes[linear], packed, self._columns(linear)))

    def _columns(self, linear: str) -> int:
        """Inputs of a packed matrix."""
        return int(self._model.get_submodule(linear).get_parameter("weight").shape[1])

    def _make(self, stored: str, names: Sequence[str]) -> _Tensor:
        if (blocks := self._blocks(names)) is not None:
            rows = [self.ordered(name, torch.from_numpy(one.data)) for name, one in zip(names, blocks, strict=True)]
            packed = names[0].removesuffix(".weight") in self._source.packed
            return _Tensor(stored, _joined(rows).numpy(), blocks[0].kind, packed)
        full = _joined([self._full(name) for name in names]).contiguous()
        kind = _KINDS[full.dtype][0]
        data = full.view(torch.uint8).numpy() if full.dtype == torch.bfloat16 else full.numpy()
        packed = any(name.removesuffix(".weight") in self._source.packed for name in names)
        return _Tensor(stored, data, kind, packed)

    def _blocks(self, names: Sequence[str]) -> list[gguf_blocks.Blocks] | None:
        """Packed matrices in the smallest type that holds all of them; None where none does, or one is not packed."""
        linears = [name.removesuffix(".weight") for name in names]
        if any(linear not in self._schemes or linear in self._adapters for linear in linears):
            return None
        choices = [self._kinds] if len(linears) == 1 else [(kind,) for kind in self._kinds]
        for kinds in choices:
            made: list[gguf_blocks.Blocks] = []
            for linear in linears:
                stored = self._source.read_packed(linear)
                blocks = gguf_blocks.encode(self._schemes[linear], stored, self._columns(linear), kinds)
                if blocks is None:
                    break
                made.append(blocks)
            else:
                return made
        return None

    def _full(self, name: str) -> torch.Tensor:
        """A tensor in full precision, as llama.cpp orders its rows."""
        linear = name.removesuffix(".weight")
        adapter = self._adapters.get(linear) if linear != name else None
        whole = self._model.state_dict()[name].ndim < 2 or name.endswith(gguf_models.ROUTERS)
        # In float32, from what is stored and not from the rounded.
        dtype = torch.float32 if whole else self._dtype
        full = self.ordered(name, dense_tensor(self._source, self._model, name, self._aliases[name], dtype, adapter))
        full = full + shift if (shift := gguf_models.shift(self._source, name)) else full
        # One row that weighs the shared expert is a vector there.
        return full.flatten() if len(full) == 1 and whole else full

    def ordered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor whose rows are those of a weight, as llama.cpp orders them."""
        order = gguf_models.row_order(self._source, name, len(tensor))
        return tensor if order is None else tensor[order]

    def stored_name(self, name: str) -> str:
        """llama.cpp's name. Raises InputError where it has none."""
        stored = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise InputError(
                f"'{self._source.given}' holds '{name}', for which llama.cpp's '{self._family.arch.name.lower()}' "
                "has no name."
            )
        return stored


def stacks(source: ModelSource, model: PreTrainedModel) -> dict[str, str]:
    """Names of all tensors of a model, each with that of the tensor which it is in: its own, or all experts' one."""
    found: dict[str, str] = {}
    for name in state_names(model):
        part = source.parts.get(name)
        found[name] = name if part is None else f"{part.fused.rpartition('.')[0]}.{part.projection}.weight"
    return found


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


class GgufTarget(Target):
    """One file for llama.cpp, and the side files."""

    name = "gguf"
    varies = True
    merges = True
    library = "gguf"
    opened = "Opened again by transformers' reader of GGUF files"
    adapter_place = f"in `{gguf_adapter.FILE_NAME}`, for llama.cpp"
    adapter_commands: ClassVar = {
        "llama.cpp": "`llama-cli -m DIR/model.gguf --lora DIR/adapter.gguf`, and `llama-server` alike"
    }
    readers: ClassVar = {"llama.cpp": Reader("llama-server -m DIR/model.gguf")}

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        if (why := gguf_models.unsupported_reason(candidate.config)) is not None:
            return why
        if candidate.adapter == "DoRA" and not merge_adapter:
            return "its adapter is a DoRA, and llama.cpp applies LoRA only"
        return layer_reason(candidate, dense.unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        if merge_adapter:
            return packed.bits(candidate, packed.dense_bits)
        # Experts of one projection lie in one tensor, of one type.
        stacks: dict[str, list[Layer]] = {}
        for name, layer in candidate.layers.items():
            stacks.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(layer)
        return sum(_stack_bits(layers) for layers in stacks.values())

    def check(self, source: ModelSource) -> str | None:
        notes = [check_tokenizer(source)]
        if source.carried:
            count = len(source.carried)
            notes.append(f"A GGUF file has no place for the {count} tensors beside the model: they stay behind.")
        return " ".join(note for note in notes if note) or None

    def dtype(self, source: ModelSource, asked: DtypeName | None) -> DtypeName:
        return asked or "fp16"

    def steps(self, source: ModelSource) -> int:
        return len(set(stacks(source, skeleton(source)).values()))

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        return gguf_models.unread_reason(candidate.config)

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        source = conversion.source
        family, model = gguf_models.family(source), skeleton(source)
        adapters = adapters_to_merge(source, model) if conversion.candidate.adapter else {}
        merged, beside = (adapters, {}) if conversion.merge_adapter else ({}, adapters)
        gguf_adapter.check_adapter(source.given, beside, source.parts)
        types = gguf_blocks.FAST_KINDS if conversion.fast_types else gguf_blocks.KINDS
        job = _File(source, model, DTYPES[conversion.dtype], merged, types)
        path, licence = folder / GGUF_NAME, front_of(source).get("license")
        scratch = temporary(path)
        with writing(folder):
            writer = GGUFWriter(scratch, MODEL_ARCH_NAMES[family.arch])
            try:
                kinds = job.declare(writer, licence if isinstance(licence, str) else None)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in job.tensors():
                    writer.write_tensor_data(tensor.data)
                    on_step(tensor.name)
            finally:
                writer.close()
            job.check(scratch)
            replace_synced(scratch, path)
            names = [GGUF_NAME, *source.save_tokenizer_files(folder)]
        if beside:
            gguf_adapter.write_adapter(folder, MODEL_ARCH_NAMES[family.arch], beside, job.stored_name, job.ordered)
            names.append(gguf_adapter.FILE_NAME)
        told = "".join(f"; {name} as {kind.name}, to the bit" for name, kind in job.tables.items())
        said = _words(kinds, conversion.dtype) + told
        return Written(said, names, warning=_warning(kinds), bits=job.bits, tables=job.tables)

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_model(resolve(folder / GGUF_NAME, verify=False), dtype=dtype)  # it was hashed just now


def _stack_bits(layers: Sequence[Layer]) -> int:
    kind = gguf_blocks.kind_of({layer.scheme for layer in layers}, layers[0].shape[1])
    weights, size = SIZES[kind or GGMLQuantizationType.F16]
    return sum(8 * size * math.prod(layer.shape) // weights for layer in layers)


def _words(kinds: Mapping[AnyType, int], dtype: str) -> str:
    """How the weights are stored, for people: ``kinds`` counts the packed layers of each type."""
    parts = []
    for kind, count in kinds.items():
        weights, size = SIZES[kind]
        exact = f" ({8 * size / weights:g} bits), to the bit"
        how = exact if kind in _FILE_TYPES else ", rounded (no block type holds them)"
        parts.append(f"{count} layers as {kind.name}{how}")
    return "; ".join(parts) or f"all matrices in {dtype}"


def _warning(kinds: Mapping[AnyType, int]) -> str | None:
    if NewType.Q2_0 not in kinds:
        return None
    return (
        "On x86 CPUs llama.cpp computes Q2_0 several times slower than Q4_0, and builds from before mid-2026 do not "
        "know it; `block_types=fastest` stores the same weights as Q4_0."
    )


TARGET = GgufTarget()

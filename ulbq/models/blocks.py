"""A model as a chain of decoder blocks: found generically, loaded one at a time."""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.formats import read_scheme
from ulbq.models.experts import unfuse
from ulbq.models.skeleton import empty_model
from ulbq.models.source import ModelSource
from ulbq.nn.quant_embedding import QuantEmbedding, swap_table
from ulbq.nn.quant_linear import QuantLinear, is_dense_linear

# Group sizes that engines take.
_GROUP_SIZES = range(16, 1025, 16)
# Values of a parameter that are looked at together: the look at a whole embedding takes more than its own memory.
_CHECKED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Linear:
    """A linear layer inside a block.

    Attributes:
        name: full module name, ``model.layers.0.self_attn.q_proj``.
    """

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelStructure:
    """What is where in a model.

    Attributes:
        blocks_prefix: full name of the list of blocks, ``model.layers``.
        n_blocks: number of blocks.
        embeddings: full names of the embeddings outside the blocks.
        head: full name of the module that gives the logits; None where there is none.
        tied: whether the head's weight is an embedding's.
        linears: linear layers of each block, in the order in which the block holds them.
        skipped: full names of modules with weight matrices that stay as they are: the head, convolutions, routers,
            vision towers.
    """

    blocks_prefix: str
    n_blocks: int
    embeddings: tuple[str, ...]
    head: str | None
    tied: bool
    linears: tuple[tuple[Linear, ...], ...]
    skipped: tuple[str, ...]

    @property
    def layers(self) -> list[Linear]:
        """The linear layers of all blocks."""
        return [linear for block in self.linears for linear in block]


def skeleton(
    source: ModelSource, dtype: torch.dtype = torch.float32, *, packed: Collection[str] | None = None
) -> PreTrainedModel:
    """The source's model with its parameters on the meta device and its buffers real, in eval mode.

    Experts are linear layers of their own, but for those that an artifact stores fused.

    Args:
        source: the model.
        dtype: as of :func:`~ulbq.models.skeleton.empty_model`.
        packed: names of the layers that the artifact stores packed; None for the source's own.
    """
    model, stored = empty_model(source.config, dtype), packed or source.packed
    unfuse(model, {*stored, *source.single_experts} if stored else None)
    return model


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Full name and modules of the decoder blocks: a list of modules with linear layers, as long as configured.

    Where none is, the longest one. Lists inside blocks (experts) do not count, nor does anything outside the text
    decoder of a multimodal model.

    Raises:
        InputError: there is no such list.
    """
    decoder = model.get_decoder()
    if isinstance(decoder, nn.Linear):
        decoder = model.base_model  # ModernBERT calls its head so
    inside = {id(module) for module in decoder.modules()}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) not in inside:
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        # Not a list of linear layers, as Gemma 3n has beside its blocks.
        if any(isinstance(inner, nn.Linear) for block in module for inner in list(block.modules())[1:]):
            found[name] = module
    if not found:
        raise InputError(
            f"The model type '{model.config.model_type}' has no blocks with linear layers.",
            hint="ulbq quantizes the torch.nn.Linear layers of transformer decoders.",
        )
    # Phi-4 has towers of images and sounds inside its decoder.
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    prefix = max(found, key=lambda name: (len(found[name]) == layers, len(found[name])))
    return prefix, found[prefix]


def structure(model: PreTrainedModel) -> ModelStructure:
    """Find blocks, linear layers, embeddings and head of a dense model.

    Raises:
        InputError: as :func:`block_list`; or blocks share weights.
    """
    prefix, blocks = block_list(model)
    _check_apart(model, prefix, blocks)
    linears = tuple(
        tuple(
            Linear(f"{prefix}.{index}.{name}", module.out_features, module.in_features)
            for name, module in block.named_modules()
            if is_dense_linear(module)
        )
        for index, block in enumerate(blocks)
    )
    quantizable = {linear.name for block in linears for linear in block}
    modules = dict(model.named_modules())
    embeddings = tuple(
        name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{prefix}.")
    )
    output = model.get_output_embeddings()
    head = next((name for name, module in modules.items() if module is output), None)
    return ModelStructure(
        blocks_prefix=prefix,
        n_blocks=len(blocks),
        embeddings=embeddings,
        head=head,
        tied=output is not None and any(modules[name].weight is output.weight for name in embeddings),
        linears=linears,
        skipped=tuple(
            name
            for name, module in modules.items()
            if name not in quantizable and name not in embeddings and _has_matrix(module)
        ),
    )


def _check_apart(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList) -> None:
    """Refuse blocks that have weights in common, as Zamba's: they are quantized one after the other."""
    owners: dict[nn.Parameter, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owners.setdefault(parameter, index) != index:
                raise InputError(
                    f"Blocks {owners[parameter]} and {index} of the model type '{model.config.model_type}' share "
                    f"'{name}', and ulbq quantizes one block after the other.",
                    hint="'ulbq eval' and 'generate' run it in full precision.",
                )


def check_group(group_size: int) -> None:
    """Refuse a group size that fits no model: neither -1 nor positive. Raises UsageError."""
    if group_size < 1 and group_size != -1:
        raise UsageError(f"The group size {group_size} makes no groups.", hint="Use a positive size, or -1 for rows.")


def check_group_size(found: ModelStructure, group_size: int) -> None:
    """Refuse a group size that leaves a remainder in any layer.

    Args:
        found: the model's structure.
        group_size: columns that share a scale; -1 for the whole row.

    Raises:
        UsageError: neither -1 nor positive.
        InputError: it does not divide a layer's input dimension; names the first such layer and the sizes that would.
    """
    check_group(group_size)
    if group_size == -1:
        return
    bad = next((linear for linear in found.layers if linear.in_features % group_size), None)
    if bad is None:
        return
    # Narrower ones, which none of these sizes divides, can be left out.
    common = math.gcd(*(x.in_features for x in found.layers if x.in_features >= min(_GROUP_SIZES)))
    choices = [str(size) for size in _GROUP_SIZES if common % size == 0]
    raise InputError(
        f"The group size {group_size} does not divide the {bad.in_features} inputs of '{bad.name}'.",
        hint=f"Sizes that divide every layer: {', '.join([*choices, '-1 (whole rows)'])}.",
    )


def empty_block(model: PreTrainedModel, index: int) -> nn.Module:
    """An independent copy of one block of a skeleton; its configuration is the model's own."""
    return copy.deepcopy(block_list(model)[1][index], _shared(model))


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy of a skeleton, but for its configuration."""
    return copy.deepcopy(model, _shared(model))


def _shared(model: PreTrainedModel) -> dict[int, Any]:
    """What copies of a model have in common with it, as ``deepcopy`` takes it; copying it costs most of a copy."""
    return {id(config): config for config in (model.config, model.config.get_text_config())}


def load_block(
    model: PreTrainedModel,
    source: ModelSource,
    index: int,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """An independent copy of one block with its parameters read from ``source``; drop it to evict it.

    Parameters are frozen and in ``dtype``, those of the skeleton where that is None; packed layers of a quantized
    artifact are :class:`QuantLinear`.

    Raises:
        InputError: a parameter is missing or has another shape than the model's configuration says.
    """
    prefix, block = block_list(model)[0], empty_block(model, index)
    materialize(block, source, dtype, prefix=f"{prefix}.{index}.", device=device)
    return block


def load_outer(
    model: PreTrainedModel, source: ModelSource, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> None:
    """Fill in, in place, everything of a skeleton that is not a block: embeddings, final norm, head.

    Raises:
        InputError: as :func:`load_block`.
    """
    prefix, _ = block_list(model)
    materialize(model, source, dtype, device=device, without=(f"{prefix}.",))


def materialize(
    module: nn.Module,
    source: ModelSource,
    dtype: torch.dtype | None,
    *,
    prefix: str = "",
    without: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
) -> None:
    """Read the parameters of a module that are on the meta device, and its persistent buffers, and move both, in place.

    Args:
        module: a skeleton, a block, or any part of one.
        source: where the tensors come from.
        dtype: for floating-point parameters; buffers keep theirs. None: parameters keep theirs too.
        device: where the module shall be.
        prefix: what the full names have before the module's own, with the dot.
        without: what is named so, from its start, stays as it is.

    Raises:
        InputError: a parameter or persistent buffer is missing in ``source``, or has another shape there; a floating
            parameter is stored as integers.
        NumericsError: a parameter holds values that are not finite.
    """
    persistent = set(module.state_dict())
    _swap_packed(module, source, dtype, prefix, without)
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_meta and not name.startswith(without):
            tied.setdefault(parameter, []).append(name)
    for parameter, names in tied.items():
        # Checkpoints store tied parameters under any one of their names.
        stored = next((name for name in names if prefix + name in source.names), names[0])
        tensor = _read_checked(source, prefix + stored, parameter.shape)
        if parameter.is_floating_point():
            check_values(source, prefix + stored, tensor)
        kept = (dtype or parameter.dtype) if tensor.is_floating_point() else tensor.dtype
        filled = nn.Parameter(_sent(tensor, torch.device(device), kept), requires_grad=False)
        for name in names:
            assign(module, name, filled)
    for name, buffer in list(module.named_buffers()):
        if name.startswith(without):
            continue
        value = _read_checked(source, prefix + name, buffer.shape) if name in persistent else buffer
        assign(module, name, value.to(device, buffer.dtype))


def _sent(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a device, in a dtype: to a GPU it goes as it is stored, from pinned memory, and is widened there."""
    if device.type != "cuda":
        return tensor.to(device, dtype)
    return tensor.pin_memory().to(device, non_blocking=True).to(dtype)


def assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, by its name inside the module."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def _swap_packed(
    module: nn.Module, source: ModelSource, dtype: torch.dtype | None, prefix: str, without: tuple[str, ...]
) -> None:
    """Replace the linear layers and tables that ``source`` stores packed."""
    tables = {name: read_scheme(table.scheme) for name, table in source.tables.items()}
    for name, layer in list(module.named_modules()):
        scheme = source.packed.get(prefix + name) or tables.get(prefix + name)
        if scheme is None or name.startswith(without):
            continue
        try:
            if type(layer) is nn.Embedding:
                table = QuantEmbedding(scheme, layer, dtype=dtype or layer.weight.dtype)
                table.assign(source.read_packed(prefix + name))
                swap_table(module, name, table, _tied_to(layer, module))
            elif is_dense_linear(layer):
                bias, kept = layer.bias is not None, dtype or layer.weight.dtype
                quantized = QuantLinear(scheme, layer.in_features, layer.out_features, bias=bias, dtype=kept)
                # Back on meta: the bias is read with all the other dense parameters.
                quantized.bias = layer.bias
                quantized.assign(source.read_packed(prefix + name))
                module.set_submodule(name, quantized)
        except ValueError as error:
            raise InputError(
                f"'{source.given}' stores '{prefix + name}' otherwise than its manifest says: {error}.",
                hint="Run 'ulbq inspect --verify' on it.",
            ) from error


def _tied_to(embedding: nn.Embedding, module: nn.Module) -> list[str]:
    """Names of the linear layers whose weight is the embedding's."""
    layers = {name: one for name, one in module.named_modules() if is_dense_linear(one)}
    return [name for name, layer in layers.items() if layer.weight is embedding.weight]


def _read_checked(source: ModelSource, name: str, shape: torch.Size) -> torch.Tensor:
    tensor = source.read(name)
    check_shape(source, name, tensor, shape)
    return tensor


def check_shape(source: ModelSource, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    """Refuse a stored tensor that has another shape than the model's configuration says. Raises InputError."""
    if tensor.shape != shape:
        raise InputError(
            f"'{source.given}' holds '{name}' as {list(tensor.shape)}, its configuration says {list(shape)}.",
            hint="Its config.json belongs to another model.",
        )


def check_values(source: ModelSource, name: str, tensor: torch.Tensor) -> None:
    """Refuse a floating parameter that is stored as integers, or with NaN or infinity in it.

    Raises:
        InputError: integers.
        NumericsError: values that are not finite.
    """
    if not tensor.is_floating_point():
        raise InputError(
            f"'{source.given}' holds '{name}' as integers ({str(tensor.dtype).removeprefix('torch.')}).",
            hint="It is quantized already, or damaged: give the full-precision model.",
        )
    if not all(_finite(part) for part in tensor.flatten().split(_CHECKED_AT_ONCE)):
        raise NumericsError(
            f"'{source.given}' holds '{name}' with values that are not finite.",
            hint="The checkpoint is damaged, or overflowed when it was made half precision: fetch the original.",
        )


def _finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    # The types of eight bits cannot be asked themselves. Both ends tell of all, NaN included, and cost a tenth.
    ends = torch.aminmax(values.float() if values.itemsize == 1 else values)
    return bool(ends.min.isfinite() and ends.max.isfinite())


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))

"""An adapter as the GGUF file that llama.cpp takes by ``--lora``, beside that of its base model."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFType, GGUFWriter, Keys

from ulbq.artifacts.disk import replace_synced, temporary, writing
from ulbq.errors import InputError, NumericsError
from ulbq.models.gguf_header import read_header
from ulbq.nn.adapter import Adapter

FILE_NAME = "adapter.gguf"


def write_adapter(
    folder: Path,
    architecture: str,
    adapters: Mapping[str, Adapter],
    stored_name: Callable[[str], str],
    ordered: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Write ``adapter.gguf``: what is stored, float16 ``[rank, in]`` and ``[out, rank]``, to the bit.

    Args:
        folder: exists.
        architecture: llama.cpp's name of it.
        adapters: LoRA, by full name of the linear layer; all of one rank and alpha.
        stored_name: llama.cpp's name of a weight.
        ordered: brings rows of a weight into llama.cpp's order.

    Raises:
        NumericsError: what was written does not read back.
        ResourceError: the disk is full or refuses.
    """
    tensors: dict[str, np.ndarray] = {}
    for linear, adapter in sorted(adapters.items()):
        name, parts = stored_name(f"{linear}.weight"), adapter.tensors()
        tensors[f"{name}.lora_a"] = parts["lora_A.weight"].numpy()
        tensors[f"{name}.lora_b"] = ordered(f"{linear}.weight", parts["lora_B.weight"]).contiguous().numpy()
    scratch = temporary(folder / FILE_NAME)
    with writing(folder):
        writer = GGUFWriter(scratch, architecture)
        try:
            writer.add_type(GGUFType.ADAPTER)
            writer.add_string(Keys.Adapter.TYPE, "lora")
            writer.add_float32(Keys.Adapter.LORA_ALPHA, next(iter(adapters.values())).config.alpha)
            for name, values in tensors.items():
                writer.add_tensor(name, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        header = read_header(scratch)
        for name, values in tensors.items():
            if not np.array_equal(header.data(name), values.view(np.uint8)):
                raise NumericsError(
                    f"What was written of '{name}' is not the adapter's.",
                    hint="This is a defect of ulbq, or of the disk: please report it with the command.",
                )
        replace_synced(scratch, folder / FILE_NAME)


def check_adapter(given: str, adapters: Mapping[str, Adapter], experts: Collection[str]) -> None:
    """Refuse an adapter that one file cannot hold. Raises InputError.

    Args:
        given: the artifact, for the message.
        adapters: by full name of the linear layer.
        experts: names of weights that lie in one tensor with others.
    """
    odd = next((linear for linear in sorted(adapters) if f"{linear}.weight" in experts), None)
    if odd is not None:
        raise InputError(
            f"The adapter of '{given}' stands beside the expert '{odd}', and no file for llama.cpp holds it.",
            hint="Add `merge_adapter`.",
        )

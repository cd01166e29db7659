"""On which device and in which dtype the matrix products run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ulbq.config.run import PrecisionName


@dataclass(frozen=True)
class Precision:
    """Where and how blocks compute. Parameters, activations between blocks, losses and optimizer state stay float32.

    Attributes:
        device: where the block under work lies.
        dtype: dtype of the matrix products, float32 or bfloat16 (through autocast).
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: torch.device, name: PrecisionName = "auto") -> "Precision":
        """``auto`` takes bf16 where the hardware multiplies in it, and float32 where bf16 would be emulated.

        The choice looks at the hardware's own flags, not at a stopwatch, so that a resumed run chooses the same.
        """
        if name == "auto":
            return cls(device, torch.bfloat16 if _has_bf16(device) else torch.float32)
        return cls(device, torch.bfloat16 if name == "bf16" else torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which blocks run."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))

"""Words (:mod:`ulbq.kernels.words`), which our Triton kernels read."""

from typing import Any, ClassVar

import torch

from ulbq import formats
from ulbq.formats import AffineScheme, AnyScheme, DualBinaryScheme
from ulbq.kernels import triton_launch, words
from ulbq.kernels.banks import Bank
from ulbq.kernels.layouts.base import Case, Layout, Tensors, one_of
from ulbq.kernels.word_banks import TrellisWordsBank, WordsBank


class WordsLayout(Layout):
    """Words in place of the stored codes, and of the scales and zero points where those are of groups."""

    name = "triton"
    summary = "our Triton kernels for CUDA GPUs: every format at 1 to 4 bits; large batches by a dense weight"
    device = "cuda"
    formats: ClassVar[tuple[str, ...] | None] = ("affine", "dual_binary", "binary_mos", "codebook", "trellis")
    form = "words"

    def unavailable_reason(self) -> str | None:
        return triton_launch.unavailable_reason()

    def unsupported_reason(self, scheme: Any, out_features: int, in_features: int) -> str | None:
        return words.unsupported_reason(scheme)

    def call_reason(self, case: Case) -> str | None:
        return one_of(case.dtype, torch.float32, torch.bfloat16, torch.float16)

    def pack(self, scheme: Any, stored: Tensors, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        made = words.pack(scheme, stored, out_features, in_features)
        if isinstance(scheme, AffineScheme | DualBinaryScheme):
            return made
        return {name: tensor for name, tensor in stored.items() if name not in ("codes", "tail_codes")} | made

    def unpack(self, scheme: AnyScheme, tensors: Tensors, out_features: int, in_features: int) -> Tensors:
        found = {**tensors, **words.unpack(scheme, tensors, out_features, in_features)}
        return super().unpack(scheme, found, out_features, in_features)

    def rows(
        self, scheme: Any, tensors: Tensors, chosen: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        some = {name: tensor[..., chosen] for name, tensor in tensors.items() if name.startswith("word_")}
        return formats.dequantize(scheme, words.unpack(scheme, some, len(chosen), in_features), in_features, dtype)

    def bank(self, scheme: AnyScheme) -> type[Bank] | None:
        # Column codebooks are several parts and outliers, each of another size in every matrix; signs as for tiles.
        kinds: dict[str, type[Bank]] = {"affine": WordsBank, "dual_binary": WordsBank, "trellis": TrellisWordsBank}
        return kinds.get(scheme.format)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return x.dtype not in triton_launch.FLOATS or triton_launch.prefers_dense(x)

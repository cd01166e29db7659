"""Affine codes of 1 to 4 bits through Humming, where the package ``humming-kernels`` is installed.

Humming (https://github.com/vllm-project/humming) compiles a kernel for each kind of matrix when it is first multiplied.
It is asked for more rows than our kernel for vectors takes, with bfloat16 activations. Scales are rounded to bfloat16,
as it wants them, so results differ from the stored weights' by about as much as with a weight rounded to bfloat16. Its
tensors lie beside our words, which vectors, gradients and other floats are multiplied with: twice the memory.

Its weights are a stream of codes along the inputs, the first in the lowest bits, int32 ``[out, in · bits / 32]``; its
zero points are such a stream along the outputs ``[out · bits / 32, G]``, its scales ``[out, G]``.
"""

import functools
import importlib
from importlib import metadata
from typing import Any

import torch

from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.formats.streams import pack_stream
from ulbq.kernels.layouts.base import Case, Tensors, one_of
from ulbq.kernels.layouts.words import WordsLayout
from ulbq.kernels.triton_launch import VECTOR_ROWS

KNOWN = "0.1."
"""Versions whose functions these are."""
MULTIPLE = 64
"""Outputs and inputs have to be multiples of it."""
# Humming's kernels share counters between the programs of one product, which they leave at zero.
_LOCKS = 2048


@functools.cache
def unavailable_reason() -> str | None:
    """Why it cannot be had here; None where it can."""
    try:
        version = metadata.version("humming-kernels")
    except metadata.PackageNotFoundError:
        return "the package humming-kernels is not installed"
    if not version.startswith(KNOWN):
        return f"humming-kernels {version} is installed: {KNOWN}x is known"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "Humming needs a CUDA GPU of compute capability 8.0 or later"
    try:
        importlib.import_module("humming.forward")
    except (ImportError, OSError) as error:
        return f"humming-kernels does not load ({error})"
    return None


def takes(x: torch.Tensor) -> bool:
    """Whether it is asked for the product with such activations ``[..., in]``."""
    few = x.numel() <= VECTOR_ROWS * x.shape[-1]
    return x.dtype == torch.bfloat16 and not few and not (torch.is_grad_enabled() and x.requires_grad)


def to_humming(scheme: AffineScheme, stored: Tensors, in_features: int) -> dict[str, torch.Tensor]:
    """``humming_codes``, ``humming_scales``, ``humming_locks`` and with zero points ``humming_zeros``, transformed."""
    given = named(scheme, stored, in_features)
    out_features, device = len(given["weight"]), given["weight"].device
    _, made = _package("transform").prepare_and_transform_humming_tensors(
        given, out_features, in_features, weight_schema=_schema(scheme), torch_dtype=torch.bfloat16, device=device
    )
    locks = torch.zeros(_LOCKS, dtype=torch.int32, device=device)
    packed = {"humming_codes": made["weight"], "humming_scales": made["weight_scale"], "humming_locks": locks}
    return packed if scheme.symmetric else packed | {"humming_zeros": made["zero_point"]}


def named(scheme: AffineScheme, stored: Tensors, in_features: int) -> dict[str, torch.Tensor]:
    """Stored tensors as Humming's schema for weights names and packs them."""
    codes, scales, zeros = affine.unpack(scheme, stored, in_features)
    made = {"weight": pack_stream(codes.T, scheme.bits).T.contiguous(), "weight_scale": scales.to(torch.bfloat16)}
    if not scheme.symmetric:
        made["zero_point"] = pack_stream(zeros, scheme.bits)
    return made


@torch.library.custom_op("ulbq::humming_linear", mutates_args=("locks",))
def humming_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    locks: torch.Tensor,
    out_features: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """``x`` ``[..., in]`` bfloat16 times what :func:`to_humming` made, ``[..., out]`` bfloat16. It has no gradient."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    config = _config(bits, group_size, zeros is not None, out_features, x.shape[-1], x.device)
    product: torch.Tensor = _package("forward").humming_forward(
        config, inputs=rows, weight=codes, weight_scale=scales, zero_point=zeros, locks=locks
    )
    return product.view(*x.shape[:-1], out_features)


@humming_linear.register_fake
def _(x, codes, scales, zeros, locks, out_features, bits, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@functools.cache
def _config(bits: int, group_size: int, zeros: bool, out_features: int, in_features: int, device: torch.device) -> Any:
    scheme = AffineScheme.model_construct(bits=bits, group_size=group_size, symmetric=not zeros)
    return _package("transform").prepare_layer_config(
        out_features, in_features, weight_schema=_schema(scheme), torch_dtype=torch.bfloat16, device=device
    )


def _schema(scheme: AffineScheme) -> Any:
    return _package("schema").HummingWeightSchema(
        b_dtype=f"uint{scheme.bits}",
        weight_scale_group_size=max(0, scheme.group_size),
        has_zero_point=not scheme.symmetric,
    )


def _package(name: str) -> Any:
    return importlib.import_module(f"humming.{name}")


class HummingLayout(WordsLayout):
    """Words, and Humming's own tensors beside them for batches."""

    name = "humming"
    summary = "Humming, an optional package: affine codes of 1 to 4 bits, bfloat16 activations, batches on CUDA GPUs"
    formats = ("affine",)

    def unavailable_reason(self) -> str | None:
        return unavailable_reason()

    def unsupported_reason(self, scheme: AffineScheme, out_features: int, in_features: int) -> str | None:
        if scheme.bits > 4:
            return f"{scheme.bits} bits: at most 4"
        if not scheme.has_zero:
            return "a zero point between two codes"
        if scheme.group_size != -1 and scheme.group_size % 32:
            return f"groups of {scheme.group_size}: a multiple of 32"
        if out_features % MULTIPLE or in_features % MULTIPLE:
            return f"{out_features} × {in_features}: multiples of {MULTIPLE}"
        return None

    def call_reason(self, case: Case) -> str | None:
        if case.differentiable and case.dtype == torch.bfloat16:
            return "has no gradient"
        few = f"{case.rows} rows: up to {VECTOR_ROWS} our kernel for vectors takes them"
        return one_of(case.dtype, torch.bfloat16) or (few if case.rows <= VECTOR_ROWS else None)

    def bank(self, scheme: AnyScheme) -> None:
        # It has the batches of one matrix.
        return None

    def pack(
        self, scheme: AffineScheme, stored: Tensors, out_features: int, in_features: int
    ) -> dict[str, torch.Tensor]:
        made = super().pack(scheme, stored, out_features, in_features)
        return made | to_humming(scheme, stored, in_features)

    def multiply(self, scheme: AnyScheme, tensors: Tensors, x: torch.Tensor, out_features: int) -> torch.Tensor:
        if not takes(x):
            return super().multiply(scheme, tensors, x, out_features)
        names = ("humming_codes", "humming_scales", "humming_zeros", "humming_locks")
        given = (tensors.get(name) for name in names)
        product: torch.Tensor = torch.ops.ulbq.humming_linear(x, *given, out_features, scheme.bits, scheme.group_size)
        return product

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
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.formats.bits import pack_planes
from ulbq.kernels.triton_launch import VECTOR_ROWS

KNOWN = "0.1."
"""Versions whose functions these are."""
MULTIPLE = 64
"""Outputs and inputs have to be multiples of it."""
# Humming's kernels share counters between the programs of one product, which they leave at zero.
_LOCKS = 2048


@functools.cache
def failure() -> str:
    """Why it cannot be had here; empty where it can."""
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
    return ""


def refusal(scheme: AnyScheme, outs: int, columns: int) -> str:
    """Why it does not take a matrix; empty where it does."""
    if not isinstance(scheme, AffineScheme):
        return "affine codes only"
    if scheme.bits > 4:
        return f"{scheme.bits} bits: at most 4"
    if scheme.bits == 1 and scheme.symmetric:
        return "a zero point between two codes"
    if scheme.group_size != -1 and scheme.group_size % 32:
        return f"groups of {scheme.group_size}: a multiple of 32"
    if outs % MULTIPLE or columns % MULTIPLE:
        return f"{outs} × {columns}: multiples of {MULTIPLE}"
    return ""


def takes(x: torch.Tensor) -> bool:
    """Whether it is asked for the product with such activations ``[..., in]``."""
    few = x.numel() <= VECTOR_ROWS * x.shape[-1]
    return x.dtype == torch.bfloat16 and not few and not (torch.is_grad_enabled() and x.requires_grad)


def pack(scheme: AffineScheme, stored: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """``humming_codes``, ``humming_scales``, ``humming_locks`` and with zero points ``humming_zeros``, transformed."""
    given = tensors(scheme, stored, columns)
    outs, device = len(given["weight"]), given["weight"].device
    _, made = _package("transform").prepare_and_transform_humming_tensors(
        given, outs, columns, weight_schema=_schema(scheme), torch_dtype=torch.bfloat16, device=device
    )
    locks = torch.zeros(_LOCKS, dtype=torch.int32, device=device)
    packed = {"humming_codes": made["weight"], "humming_scales": made["weight_scale"], "humming_locks": locks}
    return packed if scheme.symmetric else packed | {"humming_zeros": made["zero_point"]}


def tensors(scheme: AffineScheme, stored: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """Stored tensors as Humming's schema for weights names and packs them."""
    codes, scales, zeros = affine.unpack(scheme, stored, columns)
    named = {"weight": _stream(codes, scheme.bits), "weight_scale": scales.to(torch.bfloat16)}
    if not scheme.symmetric:
        named["zero_point"] = _stream(zeros.to(torch.uint8).T, scheme.bits).T.contiguous()
    return named


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
    """``x`` ``[..., in]`` bfloat16 times what :func:`pack` made, ``[..., out]`` bfloat16. It has no gradient."""
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
def _config(bits: int, group_size: int, zeros: bool, outs: int, columns: int, device: torch.device) -> Any:
    scheme = AffineScheme.model_construct(bits=bits, group_size=group_size, symmetric=not zeros)
    return _package("transform").prepare_layer_config(
        outs, columns, weight_schema=_schema(scheme), torch_dtype=torch.bfloat16, device=device
    )


def _schema(scheme: AffineScheme) -> Any:
    return _package("schema").HummingWeightSchema(
        b_dtype=f"uint{scheme.bits}",
        weight_scale_group_size=max(0, scheme.group_size),
        has_zero_point=not scheme.symmetric,
    )


def _stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[n, count]`` uint8 in int32 ``[n, count · bits / 32]``, code ``i`` from bit ``i · bits`` on."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    single = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(1)
    return pack_planes(single, 1)[0].view(torch.int32)


def _package(name: str) -> Any:
    return importlib.import_module(f"humming.{name}")

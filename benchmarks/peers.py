"""Linear layers of other packages on the codes of ours, for ``kernels.py``; each where its package is installed."""

import importlib.util
from collections.abc import Callable
from copy import deepcopy

import torch

from ulbq.export.targets import gptq
from ulbq.formats import AffineScheme, affine

Call = Callable[[torch.Tensor], torch.Tensor]


def calls(
    scheme: AffineScheme, stored: dict[str, torch.Tensor], weight: torch.Tensor, copies: Callable[[int], int]
) -> dict[str, tuple[list[Call], int, bool]]:
    """Products by other packages.

    Args:
        scheme: of the matrix.
        stored: its tensors.
        weight: the same, dequantized, ``[out, in]`` float32.
        copies: how many copies of so many bytes a contender takes in turn.

    Returns:
        By package: one call for each copy, the bytes of one, and whether it multiplies by the very same weights.
    """
    found: dict[str, tuple[list[Call], int, bool]] = {}
    shape = (weight.shape[0], weight.shape[1])
    if importlib.util.find_spec("gptqmodel") is not None and gptq.unsupported_reason(scheme, shape) is None:
        tensors = gptq.encode(scheme, stored, shape, v1=False)
        size = sum(t.nbytes for t in tensors.values())
        found["gptqmodel"] = (_copied(_gptqmodel(scheme, tensors, shape), copies(size)), size, True)
    if importlib.util.find_spec("gemlite") is not None and weight.device.type == "cuda" and scheme.bits in (1, 2, 4):
        layer, size = _gemlite(scheme, stored, shape)
        found["gemlite"] = ([layer], size, True)
    if importlib.util.find_spec("hqq") is not None and weight.device.type == "cpu":
        layer, size = _hqq(scheme, weight)
        found["HQQ"] = (_copied(layer, copies(size)), size, False)
    return found


def _copied(layer: torch.nn.Module, count: int) -> list[Call]:
    return [layer, *(deepcopy(layer) for _ in range(count - 1))]


def _gemlite(
    scheme: AffineScheme, stored: dict[str, torch.Tensor], shape: tuple[int, int]
) -> tuple[torch.nn.Module, int]:
    """Its Triton kernels at bfloat16; bytes of codes, scales and zero points."""
    from gemlite.core import DType, GemLiteLinear

    outs, columns = shape
    codes, scales, zeros = affine.unpack(scheme, stored, columns)
    layer = GemLiteLinear(
        scheme.bits,
        group_size=scheme.group_size,
        in_features=columns,
        out_features=outs,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    scales = scales.bfloat16()
    layer.pack(codes.to(torch.uint8), scales, zeros.to(scales.dtype), None)
    return layer, outs * columns * scheme.bits // 8 + 4 * scales.numel()


def _gptqmodel(scheme: AffineScheme, tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.nn.Module:
    """Its Torch kernel, the one that runs on a CPU at every width."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    sizes = {"in_features": shape[1], "out_features": shape[0]}
    layer = TorchLinear(bits=scheme.bits, group_size=scheme.group_size, sym=False, desc_act=False, **sizes)
    for name, tensor in tensors.items():
        getattr(layer, name).data = tensor.bfloat16() if name == "scales" else tensor
    layer.post_init()
    made: torch.nn.Module = layer.eval()
    return made


def _hqq(scheme: AffineScheme, weight: torch.Tensor) -> tuple[torch.nn.Module, int]:
    """A layer of its own making, on its PyTorch backend; bytes of codes, scales and zero points."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    config = BaseQuantizeConfig(nbits=scheme.bits, group_size=scheme.group_size, axis=1)
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    layer = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu")
    return layer, layer.W_q.nbytes + sum(layer.meta[name].nbytes for name in ("scale", "zero"))

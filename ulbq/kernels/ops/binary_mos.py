"""Products with signs and mixed scales: one operator where kernels fuse them, else signs as affine codes of one bit."""

from collections.abc import Mapping

import torch

from ulbq.formats import BinaryMosScheme, binary_mos
from ulbq.kernels import triton_launch
from ulbq.kernels.ops.dense import named


@torch.library.custom_op("ulbq::binary_mos_linear", mutates_args=())
def binary_mos_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    unit: torch.Tensor,
    in_scales: torch.Tensor,
    out_scales: torch.Tensor,
    router: torch.Tensor | None,
    zeros: torch.Tensor | None,
    zeros_of: str,
) -> torch.Tensor:
    """``((x ⊙ s_in(x)) · (B + z)ᵀ) ⊙ s_out(x)`` with the signs in words, gates and scales fused into the kernels.

    It has no gradient: where one is asked for, the layer is composed of ``packed_linear`` and torch's operators.

    Args:
        x: ``[..., in]`` float16, bfloat16 or float32.
        codes, unit: ``word_codes`` and ``word_scales`` of :func:`ulbq.kernels.words.pack`.
        in_scales, out_scales, router, zeros: as stored.
        zeros_of: ``none``, ``output`` or ``input``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    out_features = out_scales.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    scaled, gates, sums = triton_launch.gate(rows, in_scales, router, zeros if zeros_of == "input" else None)
    part = triton_launch.part(codes, unit, None, 1, 0.5, -1, x.shape[-1])
    mixture = triton_launch.GatedMixture(gates, sums, out_scales, zeros if zeros_of == "output" else None)
    product = triton_launch.multiply(scaled, [part], out_features, mixture=mixture, dtype=x.dtype)
    return product.view(*x.shape[:-1], out_features)


@binary_mos_linear.register_fake
def _(x, codes, unit, in_scales, out_scales, router, zeros, zeros_of):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_scales.shape[1]))


def multiply(
    scheme: BinaryMosScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """Signs in ``planes``, ``tiles`` or ``words``, with gates and both scales around them."""
    if form == "words" and x.dtype in triton_launch.FLOATS and not (torch.is_grad_enabled() and x.requires_grad):
        fused: torch.Tensor = torch.ops.ulbq.binary_mos_linear(
            x, tensors["word_codes"], tensors["word_scales"], tensors["in_scales"], tensors["out_scales"],
            tensors.get("router"), tensors.get("zeros"), scheme.zeros,
        )  # fmt: skip
        return fused
    inner, outer = binary_mos.mixed_scales(x, tensors["in_scales"], tensors["out_scales"], tensors.get("router"))
    scaled = x * inner
    codes, unit = (tensors.get(name) for name in named(form, "codes", "scales"))
    if unit is None:  # as stored: a sign is 2 · (code − 1/2)
        unit = torch.full((out_features, 1), 2.0, dtype=torch.float16, device=x.device)
    product: torch.Tensor = torch.ops.ulbq.packed_linear(
        scaled, [codes, unit], [1, -1, 0], "affine", form, out_features
    )
    if scheme.zeros == "output":
        product = product + scaled.sum(-1, keepdim=True) * tensors["zeros"].to(x.dtype)
    elif scheme.zeros == "input":
        product = product + (scaled @ tensors["zeros"].to(x.dtype)).unsqueeze(-1)
    return product * outer

"""Products with trellis codes as operators of torch, ``y = sv ⊙ H(T · H(su ⊙ x))``: the weight itself is never made.

A matrix comes in one of three forms: ``planes`` are the tensors as artifacts store them, for torch, which makes the
dense weight after all; ``compiled`` the same tensors for the kernels of :mod:`ulbq.kernels.trellis`, on the CPU;
``words`` those of :mod:`ulbq.kernels.words`, for GPUs.
"""

from collections.abc import Mapping

import torch

from ulbq.formats import TrellisScheme
from ulbq.formats import trellis as form_of
from ulbq.kernels import tiles, trellis_launch, triton_launch
from ulbq.kernels import trellis as compiled


@torch.library.custom_op("ulbq::trellis_linear", mutates_args=())
def trellis_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    bits: int,
    state_bits: int,
    form: str,
) -> torch.Tensor:
    """``x · Ŵᵀ``.

    Args:
        x: ``[..., in]``, floating.
        codes: as stored, or ``word_codes`` of :func:`ulbq.kernels.words.pack` in ``words``.
        su, sv: as stored.
        bits, state_bits: the scheme's.
        form: ``planes``, ``compiled`` or ``words``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    scheme = _scheme(bits, state_bits)
    if form == "compiled" and x.dtype in tiles.FLOATS:
        product = compiled.multiply(rows, scheme, codes, su, sv)
    elif form == "words" and x.dtype in triton_launch.FLOATS:
        product = trellis_launch.multiply(rows, scheme, codes, su, sv)
    else:
        product = torch.nn.functional.linear(rows, _dense(scheme, codes, su, sv, x.dtype))
    return product.view(*x.shape[:-1], len(sv))


@torch.library.custom_op("ulbq::trellis_linear_grad_input", mutates_args=())
def trellis_linear_grad_input(
    grad: torch.Tensor,
    codes: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    bits: int,
    state_bits: int,
    form: str,
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``."""
    rows = grad.reshape(-1, grad.shape[-1])
    scheme = _scheme(bits, state_bits)
    if form == "compiled" and grad.dtype in tiles.FLOATS:
        found = compiled.input_gradient(rows, scheme, codes, su, sv)
    elif form == "words" and grad.dtype in triton_launch.FLOATS:
        found = trellis_launch.input_gradient(rows, scheme, codes, su, sv)
    else:
        found = rows @ _dense(scheme, codes, su, sv, grad.dtype)
    return found.view(*grad.shape[:-1], len(su))


@trellis_linear.register_fake
def _(x, codes, su, sv, bits, state_bits, form):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], len(sv)))


@trellis_linear_grad_input.register_fake
def _(grad, codes, su, sv, bits, state_bits, form):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], len(su)))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, codes, su, sv, *ctx.rest = inputs
    ctx.save_for_backward(codes, su, sv)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return torch.ops.ulbq.trellis_linear_grad_input(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


trellis_linear.register_autograd(_backward, setup_context=_save)


def multiply(
    scheme: TrellisScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """``[..., out]`` of inputs ``[..., in]`` and a matrix in one of the forms."""
    codes = tensors["word_codes" if form == "words" else "codes"]
    product: torch.Tensor = torch.ops.ulbq.trellis_linear(
        x, codes, tensors["su"], tensors["sv"], scheme.bits, scheme.state_bits, form
    )
    return product


def _scheme(bits: int, state_bits: int) -> TrellisScheme:
    return TrellisScheme.model_construct(bits=bits, state_bits=state_bits)


def _dense(
    scheme: TrellisScheme, codes: torch.Tensor, su: torch.Tensor, sv: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    stored = {"codes": codes.view(torch.uint8), "su": su, "sv": sv}
    return form_of.dequantize(scheme, stored, len(su), dtype)

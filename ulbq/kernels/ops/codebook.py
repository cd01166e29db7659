"""Products with column codebooks as operators of torch, of a matrix as stored and of one in words."""

from collections.abc import Mapping

import torch

from ulbq.formats import CodebookScheme, codebook
from ulbq.kernels import columns, tiles, triton_launch, words

# Stored and derived tensors, in the operators' order.
_STORED = ("codes", "tail_codes", "codebooks", "columns", "outlier_values", "outlier_low", "outlier_high")
_DERIVED = ("column_order", "outlier_starts", "outlier_columns", "outlier_deltas")
IN_WORDS = ("word_codes", "word_levels", "word_order", "outlier_starts", "outlier_columns", "outlier_deltas")


@torch.library.custom_op("ulbq::codebook_linear", mutates_args=())
def codebook_linear(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    derived: list[torch.Tensor],
    out_features: int,
    widths: list[int],
    counts: list[int],
    outliers: int,
    form: str,
) -> torch.Tensor:
    """``x · Ŵᵀ`` with levels of its own for every column.

    Args:
        x: ``[..., in]``, floating.
        packed: in ``planes`` the tensors of the format, in the order of its scheme's ``tensors``; in ``words`` those of
            :func:`ulbq.kernels.words.pack`, in the order of :data:`IN_WORDS`.
        derived: those of :func:`ulbq.kernels.columns.derive`; none where lookups are not to be used.
        out_features: rows of ``Ŵ``.
        widths, counts: how many columns have which width; in ``words`` widest first.
        outliers: the scheme's.
        form: ``planes`` or ``words``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if form == "words" and x.dtype in triton_launch.FLOATS:
        sections = triton_launch.sections(packed, dict(zip(widths, counts, strict=True)), out_features)
        product = triton_launch.multiply(rows, sections, out_features, outliers=packed[3:])
    elif derived and columns.takes(x.dtype, len(rows)):
        scheme, tensors = _stored(packed, out_features, x.shape[-1], widths, counts, outliers)
        product = columns.multiply(rows, scheme, tensors["codes"], tensors["codebooks"], derived)
    else:
        weight = _dense(packed, out_features, x.shape[-1], widths, counts, outliers, form, x.dtype)
        product = torch.nn.functional.linear(rows, weight)
    return product.view(*x.shape[:-1], out_features)


@torch.library.custom_op("ulbq::codebook_linear_grad_input", mutates_args=())
def codebook_linear_grad_input(
    grad: torch.Tensor,
    packed: list[torch.Tensor],
    in_features: int,
    widths: list[int],
    counts: list[int],
    outliers: int,
    form: str,
) -> torch.Tensor:
    """Gradient of ``x``, ``[..., in]``."""
    rows = grad.reshape(-1, grad.shape[-1])
    if form == "words" and grad.dtype in triton_launch.FLOATS:
        sections = triton_launch.sections(packed, dict(zip(widths, counts, strict=True)), grad.shape[-1])
        found = triton_launch.input_gradient(rows, sections, in_features, torch.float32)
        _add_outlier_gradient(found, rows, dict(zip(IN_WORDS, packed, strict=False)))
    else:
        found = rows @ _dense(packed, grad.shape[-1], in_features, widths, counts, outliers, form, grad.dtype)
    return found.to(grad.dtype).view(*grad.shape[:-1], in_features)


@codebook_linear.register_fake
def _(x, packed, derived, out_features, widths, counts, outliers, form):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@codebook_linear_grad_input.register_fake
def _(grad, packed, in_features, widths, counts, outliers, form):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _codebook_save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, packed, derived, _, *ctx.rest = inputs
    ctx.derived = len(derived)
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*packed)


def _codebook_backward(ctx, grad):  # type: ignore[no-untyped-def]
    packed = list(ctx.saved_tensors)
    of_x = torch.ops.ulbq.codebook_linear_grad_input(grad, packed, ctx.in_features, *ctx.rest)
    return of_x, [None] * len(packed), [None] * ctx.derived, *[None] * 5


codebook_linear.register_autograd(_codebook_backward, setup_context=_codebook_save)


def _stored(
    packed: list[torch.Tensor], out_features: int, in_features: int, widths: list[int], counts: list[int], outliers: int
) -> tuple[CodebookScheme, dict[str, torch.Tensor]]:
    scheme = CodebookScheme(widths=dict(zip(widths, counts, strict=True)), outliers=outliers)
    return scheme, dict(zip(scheme.tensors(out_features, in_features), packed, strict=True))


def _dense(
    packed: list[torch.Tensor],
    out_features: int,
    in_features: int,
    widths: list[int],
    counts: list[int],
    outliers: int,
    form: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    if form == "words":
        named, by_width = dict(zip(IN_WORDS, packed, strict=False)), dict(zip(widths, counts, strict=True))
        return words.column_weight(named, by_width, out_features, in_features, dtype)
    scheme, tensors = _stored(packed, out_features, in_features, widths, counts, outliers)
    return codebook.dequantize(scheme, tensors, in_features, dtype)


def _add_outlier_gradient(total: torch.Tensor, grad: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
    """Add to float32 ``[rows, in]`` what outliers make of a gradient ``[rows, out]``, a slab of them at a time."""
    if "outlier_starts" not in packed:
        return
    outputs, places, deltas = words.outlier_outputs(packed), packed["outlier_columns"], packed["outlier_deltas"]
    step = max(1, tiles.SLAB // (4 * max(1, len(grad))))
    for begin in range(0, len(deltas), step):
        some = slice(begin, begin + step)
        total.index_add_(1, places[some], grad[:, outputs[some]].float() * deltas[some])


def multiply(
    scheme: CodebookScheme, form: str, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, out_features: int
) -> torch.Tensor:
    """``[..., out]`` of inputs ``[..., in]`` and a matrix in ``words``, or as stored with what was derived of it."""
    counts = scheme.columns(x.shape[-1])
    packed = [tensors[name] for name in (IN_WORDS if form == "words" else _STORED) if name in tensors]
    derived = [tensors[name] for name in _DERIVED if name in tensors and form != "words"]
    result: torch.Tensor = torch.ops.ulbq.codebook_linear(
        x, packed, derived, out_features, list(counts), list(counts.values()), scheme.outliers, form
    )
    return result

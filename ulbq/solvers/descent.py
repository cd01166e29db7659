"""Codes that move once the codebooks are known: coordinate descent on the layer's output error.

The other half of LNQ (GuidedQuant, section 4, https://arxiv.org/abs/2505.07004), whose first is the common fit of the
codebooks (:mod:`ulbq.solvers.refit`). With all other columns as they are, ``tr((W − Q) H (W − Q)ᵀ)`` is least for a
value of column ``j`` at ``q_j + (E H)_j / H_jj``, ``E = W − Q``; the level nearest to that is taken. So no step raises
the error. GPTQ's pass makes errors good only in columns that come later; here every column answers all others.
"""

import torch

from ulbq.formats.codebook import Columns
from ulbq.formats.levels import assign
from ulbq.solvers.hessian import HessianFactor, damped_diagonal
from ulbq.solvers.refit import matrix_of

_BLOCK = 128
"""Columns after which the pull on all later ones is computed anew; a matter of speed alone."""


@torch.no_grad()
def descend(weight: torch.Tensor, hessian: torch.Tensor, factor: HessianFactor, columns: Columns) -> Columns:
    """Go once through all columns, in the order in which they were solved, and let their codes move.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``[in, in]`` float32 second moments of its inputs, without damping.
        factor: says how much the Hessian is damped, and the order.
        columns: as :func:`~ulbq.formats.codebook.ascending` has them. Outliers stay what they are.
    """
    damped = hessian.clone()
    damped.diagonal().copy_(damped_diagonal(hessian, factor.damping))
    error = weight.T - matrix_of(columns)
    codes, widths = columns.codes.clone(), columns.widths.tolist()
    fixed = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
    if columns.outliers is not None:
        fixed.view(-1)[columns.outliers.positions] = True
    for block in factor.order.split(_BLOCK):
        own = damped[block]
        pull, inside = own @ error, own[:, block]
        for step, column in enumerate(block.tolist()):
            levels = columns.codebooks[column, : 1 << widths[column]]
            now = levels[codes[column].long()]
            wanted = assign((now + pull[step] / inside[step, step]).unsqueeze(0), levels.unsqueeze(0))[0]
            moved = torch.where(fixed[column], codes[column], wanted)
            change = levels[moved.long()] - now
            codes[column] = moved
            error[column] -= change
            pull.addr_(inside[:, step], change, alpha=-1)
    return columns._replace(codes=codes)

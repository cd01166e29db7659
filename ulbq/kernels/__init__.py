"""Products with packed weights, without a dense copy of them.

:func:`prepare` brings a stored matrix into the layout of the best backend, :func:`multiply` is the product. What each
format computes stands in :mod:`~ulbq.kernels.reference`, who computes it where in :mod:`~ulbq.kernels.dispatch`.
"""

from ulbq.kernels.dispatch import BACKENDS, Backend, Case, Choice, choose
from ulbq.kernels.linear import Ready, is_dense, matrix, multiply, prepare, stored

__all__ = [
    "BACKENDS",
    "Backend",
    "Case",
    "Choice",
    "Ready",
    "choose",
    "is_dense",
    "matrix",
    "multiply",
    "prepare",
    "stored",
]

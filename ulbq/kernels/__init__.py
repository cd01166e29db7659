"""Products with packed weights, without a dense copy of them.

:func:`prepare` brings a stored matrix into the layout of the best backend, whose ``multiply`` is the product. What each
format computes stands in its module of :mod:`ulbq.formats`, who computes it where in :mod:`~ulbq.kernels.dispatch`.
"""

from ulbq.kernels.dispatch import LAYOUTS, STORED, Choice, Ready, choose, gathered, prepare
from ulbq.kernels.layouts.base import Case, Layout
from ulbq.kernels.product import Product

__all__ = ["LAYOUTS", "STORED", "Case", "Choice", "Layout", "Product", "Ready", "choose", "gathered", "prepare"]

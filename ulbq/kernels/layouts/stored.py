"""Tensors as artifacts store them, on every device."""

from ulbq.kernels.layouts.base import Layout


class StoredLayout(Layout):
    """Products of dense weights that are made for each, some outputs at a time where the format can."""

    name = "dense"
    summary = "slabs of dense weights, then torch's product: everything, on every device"

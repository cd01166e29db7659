"""The product on a GPU that is pretended: see :mod:`tests.pretended.device`."""

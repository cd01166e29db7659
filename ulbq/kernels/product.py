"""A matrix as :mod:`ulbq.kernels.decode` takes it: an object of the compiled library, and the tensors that it reads."""

import ctypes
import weakref
from typing import Any

import torch

from ulbq.kernels.build import library


class Product:
    """A matrix that tokens are multiplied with, in :class:`ulbq.kernels.decode.CompiledBlocks`.

    Args:
        make: a function of the library that makes one.
        arguments: its own, tensors among them, which are kept.
    """

    def __init__(self, make: str, *arguments: Any) -> None:
        self._kept = [one for one in arguments if isinstance(one, torch.Tensor)]
        made = ctypes.c_void_p()
        given = (one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments)
        getattr(library(), make)(*given, ctypes.byref(made))
        if made.value is None:
            raise ValueError(f"{make} knows no such matrix")
        self.address = made.value
        weakref.finalize(self, library().ulbq_free_linear, self.address)

"""Matrices by llama.cpp's own quantizer: ``llama_cpp_blocks.py FOLDER``, of which each file is a task.

``NAME.npz`` has ``weight`` float32 ``[out, in]``, ``importance`` float32 ``[in]`` and ``kind``, the number of a type.
``NAME.npy`` becomes its blocks, uint8 ``[out, bytes a row]``. The library is the one that xllamacpp brings.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np

spec = importlib.util.find_spec("xllamacpp")
place = Path(str(spec.origin)).parent if spec else Path()
library = ctypes.CDLL(str(next(place.glob("*.so"))))
library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
pointer, number = ctypes.c_void_p, ctypes.c_int64
library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
for task in Path(sys.argv[1]).glob("*.npz"):
    given = np.load(task)
    weight, importance = (np.ascontiguousarray(given[name], np.float32) for name in ("weight", "importance"))
    kind, (rows, columns) = int(given["kind"]), weight.shape
    blocks = np.empty((rows, library.ggml_row_size(kind, columns)), np.uint8)
    written = library.ggml_quantize_chunk(
        kind, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, importance.ctypes.data
    )
    if written != blocks.nbytes:
        sys.exit(f"{task.name}: {written} bytes, not {blocks.nbytes}")
    np.save(task.with_suffix(".npy"), blocks)

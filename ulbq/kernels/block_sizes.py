"""Block sizes of the GPU kernels: a JSON file for each GPU that was tuned, and one for all others.

A table is an object with the GPU's name under ``device`` and, for each kernel, block sizes by the bits of a code,
``any`` for those not listed, and ``float32`` for products that tensor cores do not make: these keep what they multiply
in registers, so their blocks are smaller. ``dense`` are rows from which torch's product with dense weights is faster.
``python benchmarks/matmul.py --tune`` measures them on the GPU at hand and
writes its table here.
"""

import functools
import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

Kernel = Literal["vector", "small", "large", "gradient"]

FOLDER = Path(__file__).parent / "tables"


class BlockSizes(NamedTuple):
    """How one kernel is cut and started.

    Attributes:
        block_m: rows of a program at most; of a matrix product at least 16.
        block_n: outputs of a program, a power of two.
        warps: of a program.
        stages: of the software pipeline.
        programs: for each multiprocessor, which the columns are divided to reach.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int


def blocks(device: str, kernel: Kernel, bits: int, wide: bool = False) -> BlockSizes:
    """Those of a GPU by the name that torch gives it; an unknown one gets the defaults. ``wide`` is float32."""
    default = _read("default").get(kernel, {})
    by_bits = _read(slug(device)).get(kernel) or default
    if wide and (found := by_bits.get("float32") or default.get("float32")):
        return BlockSizes(**found)
    return BlockSizes(**(by_bits.get(str(bits)) or by_bits["any"]))


class DenseRows(NamedTuple):
    """From how many rows on torch's product with a dense weight is faster than the kernels.

    Attributes:
        made: where the weight is made for each product.
        kept: where it is there.
    """

    made: int
    kept: int


def dense_rows(device: str, bits: int) -> DenseRows:
    """Those of a GPU, as of :func:`blocks`."""
    by_bits = _read(slug(device)).get("dense") or _read("default")["dense"]
    return DenseRows(**(by_bits.get(str(bits)) or by_bits["any"]))


def slug(device: str) -> str:
    """The name of a GPU's table: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def _read(name: str) -> dict[str, dict[str, dict[str, int]]]:
    path = FOLDER / f"{name}.json"
    found: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text("utf-8")) if name and path.is_file() else {}
    return found

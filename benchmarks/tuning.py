"""Block sizes of the Triton kernels for the GPU at hand: ``python benchmarks/matmul.py --tune`` writes their table.

Every kernel is timed at each number of bits with every candidate, on a matrix of 8192 × 8192 with groups of 64: by
events around many products, after a warm-up, the weight another one each time so that none is found in a cache. The
median counts. A candidate that the GPU has no room for is left out. Then products with a dense weight, made for each or
kept, are timed at more and more rows, until they are the faster ones.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from ulbq.formats import AffineScheme
from ulbq.kernels import block_sizes, triton_launch, words
from ulbq.kernels.block_sizes import BlockSizes, DenseRows, Kernel

SIZE, GROUP = 8192, 64
ROWS: dict[Kernel, int] = {"vector": 1, "small": 16, "large": 512, "gradient": 512}
CANDIDATES: dict[Kernel, list[BlockSizes]] = {
    "vector": [BlockSizes(4, *rest) for rest in product((128, 256, 512, 1024), (2, 4, 8), (1, 2), (2, 4, 8))],
    "small": [BlockSizes(16, *rest) for rest in product((32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 4))],
    "large": [BlockSizes(*rest, 1) for rest in product((64, 128), (64, 128, 256), (4, 8), (2, 3, 4))],
    "gradient": [BlockSizes(*rest, 1) for rest in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))],
}
# More than any cache holds.
ROTATION = 512 << 20

MANY = (65, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
"""Numbers of rows from which dense weights may be faster."""
NEVER = 1 << 30

Measure = Callable[[Kernel, int, BlockSizes], float]
Crossing = Callable[[int, dict[str, int]], DenseRows]


def tune() -> Path:
    """Measure all kernels and write the table of this GPU. SystemExit where there is none, or no Triton."""
    if not torch.cuda.is_available():
        raise SystemExit("--tune needs a CUDA GPU, and this machine has none.")
    if missing := triton_launch.unavailable_reason():
        raise SystemExit(f"--tune needs the Triton kernels: {missing}.")
    path = block_sizes.FOLDER / f"{block_sizes.slug(torch.cuda.get_device_name())}.json"
    return write(torch.cuda.get_device_name(), path, seconds, crossing)


def write(device: str, path: Path, measure: Measure, cross: Crossing) -> Path:
    """The fastest candidates of each kernel as a table.

    Args:
        device: name of the GPU.
        path: of the table.
        measure: gives a candidate's seconds; infinite: it does not run.
        cross: gives the rows from which dense weights are faster, of the bits and of the large kernel's blocks.
    """
    chosen: dict[str, dict[str, dict[str, int]]] = {kernel: {} for kernel in (*CANDIDATES, "dense")}
    for bits in (1, 2, 3, 4):
        for kernel, candidates in CANDIDATES.items():
            best = min(candidates, key=partial(measure, kernel, bits))
            chosen[kernel][str(bits)] = best._asdict()
        chosen["dense"][str(bits)] = cross(bits, chosen["large"][str(bits)])._asdict()
    for by_bits in chosen.values():
        by_bits["any"] = by_bits["2"]
    facts = {"device": device, "note": f"Measured at {SIZE} × {SIZE}, groups of {GROUP}."}
    path.write_text(json.dumps(facts | chosen, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def seconds(kernel: Kernel, bits: int, size: BlockSizes) -> float:
    """Median seconds of one product or gradient with these blocks."""
    from triton import CompilationError, OutOfResources

    matrices = _matrices(bits)
    x = torch.randn(ROWS[kernel], SIZE, device="cuda").bfloat16()
    with _forced(size):
        try:
            times = [_timed(kernel, x, matrices) for _ in range(6)][1:]
        except (CompilationError, OutOfResources):
            return float("inf")
    return median(times)


def crossing(bits: int, large: dict[str, int]) -> DenseRows:
    """From how many rows on dense weights are faster than the kernel with these blocks."""
    weights = [torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(-(-ROTATION // (2 * SIZE * SIZE)))]

    def first(product: Callable[[torch.Tensor, int], object]) -> int:
        for rows in MANY:
            x = torch.randn(rows, SIZE, device="cuda").bfloat16()
            with _forced(BlockSizes(**large)):
                kernel = median([_timed("large", x, _matrices(bits)) for _ in range(6)][1:])
            with _forced(BlockSizes(**large), 1):
                dense = median([_events(partial(product, x), len(weights)) for _ in range(6)][1:])
            if dense < kernel:
                return rows
        return NEVER

    def by_made(x: torch.Tensor, turn: int) -> object:
        return triton_launch.multiply(x, [_matrices(bits)[turn % len(_matrices(bits))]], SIZE)

    return DenseRows(made=first(by_made), kept=first(lambda x, turn: x @ weights[turn]))


def _timed(kernel: Kernel, x: torch.Tensor, matrices: list[triton_launch.Part]) -> float:
    def product(turn: int) -> torch.Tensor:
        if kernel == "gradient":
            return triton_launch.input_gradient(x, [matrices[turn]], SIZE)
        return triton_launch.multiply(x, [matrices[turn]], SIZE)

    return _events(product, len(matrices))


def _events(work: Callable[[int], object], turns: int) -> float:
    """Seconds of one of many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for turn in range(turns):
        work(turn)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / turns


@lru_cache(maxsize=1)
def _matrices(bits: int) -> list[triton_launch.Part]:
    """Copies of a random matrix, together larger than a cache."""
    scheme = AffineScheme(bits=bits, group_size=GROUP)
    stored = {
        name: torch.randint(256, spec.shape, dtype=torch.uint8)
        if spec.dtype == "uint8"
        else (torch.rand(spec.shape) * 0.02 + 0.01).half()
        for name, spec in scheme.tensors(SIZE, SIZE).items()
    }
    packed = words.pack(scheme, {name: tensor.cuda() for name, tensor in stored.items()}, SIZE, SIZE)
    count = max(2, -(-ROTATION // packed["word_codes"].nbytes))
    copies = [{name: tensor.clone() for name, tensor in packed.items()} for _ in range(count)]
    return [
        triton_launch.part(each["word_codes"], each["word_scales"], each["word_zeros"], bits, 0.0, GROUP, SIZE)
        for each in copies
    ]


@contextmanager
def _forced(size: BlockSizes, dense: int = NEVER) -> Iterator[None]:
    """While it lasts, kernels have these blocks, and dense weights are made from so many rows on."""
    before = triton_launch.blocks, triton_launch.dense_rows
    triton_launch.blocks, triton_launch.dense_rows = lambda *_: size, lambda *_: DenseRows(dense, dense)
    try:
        yield
    finally:
        triton_launch.blocks, triton_launch.dense_rows = before

"""Triton's kernels compiled for GPUs that are not here, as the launching code starts them.

Starts are recorded on the CPU instead of run, so what is compiled is what would be started: block sizes, warps, types
and which numbers are multiples of 16. ``python -m tests.kernels.ahead '{"CAPABILITY": ["CASE", …], …}'`` prints a JSON
list, a row for each kernel and GPU. Triton must not interpret in that process.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.formats.columns import random_columns
from tests.kernels.matrices import in_layout, random_matrix
from ulbq import kernels
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
    trellis,
)
from ulbq.kernels import banks, solver_launch, trellis_launch, triton_launch

OUTS, COLUMNS = 512, 512
# What ends as another kernel: one row, four, what matrices take with 16, 32 and 64 rows at a time, dense weights, and
# 128 rows, the last, which have a gradient.
ROWS = (1, 2, 4, 16, 32, 64, 512, 128)
PROCESSORS = 132
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64", torch.int16: "*i16", torch.bool: "*i1",
}  # fmt: skip


class Start(NamedTuple):
    """A start of a kernel: the types of its arguments, those that are compiled in, multiples of 16, and options."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    even: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        module = self.kernel.__module__.rpartition(".")[2]
        sizes = ", ".join(f"{name}={value}" for name, value in self.constants if name.isupper())
        return f"{module}.{self.kernel.__name__}({sizes}; {dict(self.options)}; {dict(self.signature).get('x', '')})"


@contextmanager
def recorded() -> Iterator[list[Start]]:
    """While it lasts, kernels are not run; gives what was started, each kind once."""
    from triton.runtime.jit import JITFunction

    found: dict[Start, None] = {}
    starts: list[Start] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        start = _start(self, args, kwargs)
        if start not in found:
            found[start] = None
            starts.append(start)

    before, facts = JITFunction.run, triton_launch.device_facts
    JITFunction.run = note
    for module in (triton_launch, trellis_launch):
        module.device_facts = lambda device: ("", PROCESSORS)  # type: ignore[attr-defined]
    try:
        yield starts
    finally:
        JITFunction.run = before
        for module in (triton_launch, trellis_launch):
            module.device_facts = facts  # type: ignore[attr-defined]


def _start(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Start:
    parameters = inspect.signature(kernel.fn).parameters
    options = tuple((name, value) for name, value in kwargs.items() if name not in parameters)
    given = inspect.signature(kernel.fn).bind(*args, **{n: v for n, v in kwargs.items() if n in parameters}).arguments
    signature, constants, even = [], [], []
    for at, (name, value) in enumerate(given.items()):
        if name.isupper() or value is None or (isinstance(value, int) and value == 1):
            constants.append((name, value))
            signature.append((name, "constexpr"))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((name, _TYPES[value.dtype]))
            even.append(at)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            even += [at] * (value % 16 == 0)
    return Start(kernel, tuple(signature), tuple(constants), tuple(even), options)


def compiled(start: Start, capability: int) -> dict[str, Any]:
    """Registers and bytes of stack of a thread, bytes of shared memory of a program, instructions of a loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        start.kernel, dict(start.signature), dict(start.constants),
        {(at,): [["tt.divisibility", 16]] for at in start.even},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(start.options))
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([dump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    facts = dict(re.findall(r"\b(REG|STACK):(\d+)", told.stdout + told.stderr))
    return {
        "capability": capability, "kernel": start.name, "registers": int(facts["REG"]), "stack": int(facts["STACK"]),
        "shared": made.metadata.shared, "loop": _longest_loop(code),
    }  # fmt: skip


def _longest_loop(code: str) -> int:
    """Instructions between a jump back and its goal."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", code)]
    found = 0
    for at, text in lines:
        goal = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if goal and int(goal[1], 16) < at:
            found = max(found, sum(int(goal[1], 16) <= place <= at for place, _ in lines))
    return found


def _products(scheme: AnyScheme, stored: dict[str, torch.Tensor], columns: int, dtype: torch.dtype) -> None:
    """Every number of rows, and the gradient of the inputs."""
    from tests.kernels.matrices import multiply

    ready = in_layout("triton", scheme, stored, OUTS, columns)
    for rows in ROWS:
        x = torch.zeros(rows, columns, dtype=dtype)
        if rows == ROWS[-1]:
            x.requires_grad_()
        y = multiply(scheme, ready, x, OUTS)
    y.backward(torch.zeros_like(y))


def _matrix(scheme: AnyScheme, dtype: torch.dtype) -> Callable[[], None]:
    return lambda: _products(scheme, random_matrix(scheme, OUTS, COLUMNS), COLUMNS, dtype)


def _trellis(bits: int, state_bits: int, dtype: torch.dtype) -> Callable[[], None]:
    """As on a GPU, where the transforms around a product are kernels as well."""

    def work() -> None:
        scheme = TrellisScheme(bits=bits, state_bits=state_bits)
        stored = random_matrix(scheme, OUTS, COLUMNS)
        codes = in_layout("triton", scheme, stored, OUTS, COLUMNS).tensors["word_codes"]
        operands = scheme, codes, stored["su"], stored["sv"]
        for rows in ROWS:
            trellis_launch.multiply(torch.zeros(rows, COLUMNS, dtype=dtype), *operands)
        trellis_launch.input_gradient(torch.zeros(ROWS[-1], OUTS, dtype=dtype), *operands)

    return work


def _bank(scheme: AnyScheme, dtype: torch.dtype) -> Callable[[], None]:
    """Several matrices in one start, with few rows each and with many."""

    def work() -> None:
        each = [in_layout("triton", scheme, random_matrix(scheme, OUTS, COLUMNS), OUTS, COLUMNS) for _ in range(2)]
        bank = kernels.gathered([(scheme, ready) for ready in each], OUTS, COLUMNS)
        for rows in (1, 4, 32, 200):
            chosen = torch.arange(2).repeat_interleave(rows)
            banks.multiply(bank, torch.zeros(2 * rows, COLUMNS, dtype=dtype), banks.Routes.of(chosen, 2), 1)

    return work


def _columns(widths: list[int], outliers: int, dtype: torch.dtype) -> Callable[[], None]:
    def work() -> None:
        scheme, made = random_columns(OUTS, widths, outliers)
        _products(scheme, codebook.pack(scheme, made), len(widths), dtype)

    return work


def _search(bits: int, state_bits: int) -> Callable[[], None]:
    return lambda: (
        trellis_launch.search(torch.zeros(2, 256), bits, state_bits, trellis.values(state_bits)) and None  # type: ignore[return-value]
    )


def _solvers() -> None:
    """A block of columns of GPTQ, whole and rest, and centroids of CLAQ."""
    for count in (128, 32):
        block, square = torch.zeros(count, OUTS), torch.eye(count)
        grids = torch.ones(4, OUTS)
        solver_launch.compensate(block, square, torch.zeros(count, dtype=torch.int64), grids, grids, 2)
    values = torch.zeros(1, 1100)
    for levels in (4, 8, 16):
        for weights in (None, values):
            solver_launch.refine(values, torch.zeros(1, levels), 2, weights)


def _transforms() -> None:
    """What goes around a product with trellis codes."""
    for dtype in (torch.float32, torch.bfloat16):
        for before in (None, torch.ones(COLUMNS).half()):
            trellis_launch.blocks_transform(torch.zeros(2, 40, COLUMNS), dtype, before, None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_SCHEMES: dict[str, AnyScheme] = {
    **{f"affine {bits}": AffineScheme(bits=bits, group_size=64) for bits in (1, 2, 3, 4)},
    "affine 2 narrow": AffineScheme(bits=2, group_size=32, symmetric=True),
    "dual binary": DualBinaryScheme(group_size=64),
    "binary-mos": BinaryMosScheme(experts=4, zeros="output"),
}
CASES: dict[str, Callable[[], None]] = {
    **{
        f"{name} {_name(dtype)}": _matrix(scheme, dtype)
        for name, scheme in _SCHEMES.items()
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    **{
        f"trellis {bits} {state_bits} {_name(dtype)}": _trellis(bits, state_bits, dtype)
        for bits, state_bits in ((1, 12), (2, 12), (3, 12), (4, 12), (2, 16))
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"bank {name} {_name(dtype)}": _bank(scheme, dtype)
        for name, scheme in {
            "affine 3": AffineScheme(bits=3, group_size=64),
            "dual binary": DualBinaryScheme(group_size=64),
            "trellis 2": TrellisScheme(bits=2),
        }.items()
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"codebook {bits} {_name(dtype)}": _columns([bits] * COLUMNS, 40, dtype)
        for bits in (2, 3, 4)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "solvers": _solvers,
    "transforms": _transforms,
    **{f"search {bits} {state_bits}": _search(bits, state_bits) for bits in (1, 2, 3, 4) for state_bits in (12, 16)},
}


def main(asked: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What all kernels of these cases take on the GPU of each capability; without names, all cases."""
    found = []
    for capability, names in asked.items():
        with recorded() as starts:
            for name in names or CASES:
                CASES[name]()
        found += [compiled(start, int(capability)) for start in starts]
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1])), indent=1))

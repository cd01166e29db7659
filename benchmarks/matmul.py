"""Products with packed weights against torch's dense ones, on the CPU, in one run.

    python benchmarks/matmul.py [--threads 1] [--repeats 15] [--shapes 4096x4096,11008x4096] [--formats trellis]
                                [--results FILE]
    python benchmarks/matmul.py --tune

The second form measures block sizes of the Triton kernels on a GPU and writes them for ulbq to use (``tuning.py``).

Every case is a matrix of random codes and a few copies of it, taken in turn so that no product finds its weight in a
cache by itself; contenders take turns within each repeat. Times are milliseconds: ``cpu`` is the processor time of the
calling thread, which other programs disturb least and which is the time of the product where ``--threads`` is 1;
``wall`` is the clock's. Both are minima. ``times bf16`` is the bfloat16 linear's time over this one's, by ``cpu`` with
one thread, by ``wall`` with more. ``GB/s`` are the packed bytes read over that time, and ``of copy`` these over the
bandwidth of a copy, read and written bytes counted, in the same run. ``error`` is the relative norm of the
first row's difference to a float64 product with the stored weights; that of bfloat16 linear contains the weight's own
rounding. gptqmodel (its Torch kernel, on the same codes) and HQQ (its PyTorch backend, codes of its own) take part
where they are installed; Humming and gemlite want a GPU.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import tuning
from rich.console import Console
from rich.table import Table

from ulbq import formats, kernels
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    KQuantScheme,
    TrellisScheme,
)
from ulbq.kernels import build, dispatch
from ulbq.kernels.layouts import int4

SCHEMES: list[AnyScheme] = [
    *(AffineScheme(bits=bits, group_size=64) for bits in (1, 2, 3, 4)),
    AffineScheme(bits=2, group_size=128),
    DualBinaryScheme(group_size=64),
    BinaryMosScheme(experts=4),
    CodebookScheme(bits=2),
    *(TrellisScheme(bits=bits) for bits in (1, 2, 3, 4)),
    TrellisScheme(bits=2, state_bits=16),
    *(KQuantScheme(bits=bits) for bits in (2, 3, 4)),
]
ROWS = (1, 4, 16, 64)
# Bytes of copies that a contender takes in turn: more than the last cache holds.
ROTATION = 96 << 20

Call = Callable[[torch.Tensor], torch.Tensor]


def random_matrix(scheme: AnyScheme, outs: int, columns: int) -> dict[str, torch.Tensor]:
    """Stored tensors with random codes and scales of a weight's size."""
    tensors = {}
    for name, spec in scheme.tensors(outs, columns).items():
        if spec.dtype == "uint8":
            tensors[name] = torch.randint(256, spec.shape, dtype=torch.uint8)
        else:
            tensors[name] = (torch.rand(spec.shape) * 0.02 + 0.01).half()
    return tensors


def turns(size: int) -> int:
    """How many copies of so many bytes put the first out of the caches until its turn comes again."""
    return max(2, min(24, -(-ROTATION // size)))


def copies(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """So many of them."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    return [{name: t.clone() for name, t in tensors.items()} for _ in range(turns(size))]


def packed_call(scheme: AnyScheme, outs: int, ready: kernels.Ready) -> list[Call]:
    made = [kernels.Ready(ready.layout, tensors) for tensors in copies(ready.tensors)]
    return [lambda x, one=one: one.layout.multiply(scheme, one.tensors, x, outs) for one in made]


def dense_call(weight: torch.Tensor) -> list[Call]:
    made = copies({"weight": weight})
    return [lambda x, w=one["weight"]: torch.nn.functional.linear(x.to(w.dtype), w) for one in made]


def timed(contenders: dict[str, list[Call]], x: torch.Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """Least processor and wall seconds of each contender, taking turns."""
    found = dict.fromkeys(contenders, (float("inf"), float("inf")))
    for repeat in range(repeats):
        for name, calls in contenders.items():
            call = calls[repeat % len(calls)]
            wall, cpu = time.perf_counter(), time.thread_time()
            call(x)
            spent = time.thread_time() - cpu, time.perf_counter() - wall
            found[name] = (min(found[name][0], spent[0]), min(found[name][1], spent[1]))
    return found


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 64 MB."""
    source = torch.zeros(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = min(timed({"copy": [lambda x: target.copy_(x)]}, source, 10)["copy"])
    return 2 * source.nbytes / best


def case(outs: int, columns: int, scheme: AnyScheme, repeats: int, index: int, copied: float) -> list[dict[str, Any]]:
    """One matrix, all numbers of rows."""
    stored = random_matrix(scheme, outs, columns)
    ready = kernels.prepare(scheme, stored, outs, columns)
    weight = formats.dequantize(scheme, stored, columns)
    contenders = {ready.layout.name: packed_call(scheme, outs, ready), "bf16": dense_call(weight.bfloat16())}
    contenders["fp32"] = dense_call(weight)
    sizes = {ready.layout.name: sum(t.nbytes for t in ready.tensors.values()), "bf16": 2 * outs * columns}
    contenders["fp16"] = dense_call(weight.half())
    sizes |= {"fp32": 4 * outs * columns, "fp16": 2 * outs * columns}
    foreign = set()  # codes of their own: nothing to be exact against
    if isinstance(scheme, AffineScheme):
        for name, (calls, size, same) in peers.calls(scheme, stored, weight, turns).items():
            contenders[name], sizes[name] = calls, size
            foreign |= set() if same else {name}
    torch_own = int4.Int4Layout()
    if dispatch.unsupported_reason(torch_own, scheme, outs, columns, "cpu") is None:
        packed = torch_own.pack(scheme, stored, outs, columns)
        contenders["int4"] = packed_call(scheme, outs, kernels.Ready(torch_own, packed))
        sizes["int4"] = sum(packed[name].nbytes for name in packed.keys() - stored.keys())
    rows = []
    for count in ROWS:
        x = torch.randn(count, columns).bfloat16()
        exact = x[:1].double() @ weight.double().T
        if isinstance(scheme, BinaryMosScheme):
            factor = formats.matrix(scheme, stored, columns)
            exact = formats.multiply(scheme, stored, x[:1].float(), factor).double()
        taken = {name: calls for name, calls in contenders.items() if name != "int4" or count <= int4.FEW_ROWS}
        seconds = timed(taken, x, repeats if count < 64 else max(3, repeats // 3))
        base = seconds["bf16"][index]
        for name, calls in taken.items():
            error = (calls[0](x)[:1].double() - exact).norm() / exact.norm()
            rate = sizes[name] / seconds[name][index]
            rows.append(
                {
                    "shape": f"{outs} × {columns}",
                    "scheme": scheme.label,
                    "rows": count,
                    "kernel": name,
                    "cpu_ms": round(seconds[name][0] * 1e3, 3),
                    "wall_ms": round(seconds[name][1] * 1e3, 3),
                    "times_bf16": round(base / seconds[name][index], 2),
                    "gb_per_s": round(rate / 1e9, 2),
                    "of_copy": round(rate / copied, 3),
                    "error": float(f"{error:.2e}")
                    if name == ready.layout.name or (scheme.format != "binary_mos" and name not in foreign)
                    else None,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        style = "bold" if row["kernel"] in ("tiles", "columns", "trellis") else "dim"
        table.add_row(*("" if value is None else str(value) for value in row.values()), style=style)
    Console(width=140).print(table)


@torch.no_grad()
def main() -> None:
    """Measure every shape and scheme, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="of each product; a third from 64 rows on")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="outputs x inputs")
    parser.add_argument("--formats", default=",".join(formats.FORMATS), help="those to measure")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    parser.add_argument("--tune", action="store_true", help="only find block sizes for this GPU, and write their table")
    options = parser.parse_args()
    if options.tune:
        print(f"written: {tuning.tune()}")
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    copied = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        outs, columns = map(int, shape.split("x"))
        for scheme in (scheme for scheme in SCHEMES if scheme.format in options.formats.split(",")):
            rows += case(outs, columns, scheme, options.repeats, int(options.threads > 1), copied)
    show(rows)
    print(f"copy: {copied / 1e9:.1f} GB/s; compiled kernels: {build.unavailable_reason() or 'yes'}")
    if options.results:
        cpu = next((line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), "")
        facts = {"cpu": cpu or platform.processor(), "threads": options.threads, "torch": torch.__version__}
        text = json.dumps(
            {**facts, "copy_gb_per_s": round(copied / 1e9, 2), "rows": rows}, indent=1, ensure_ascii=False
        )
        options.results.write_text(text + "\n", encoding="utf-8")


def cpu_lines() -> list[str]:
    information = Path("/proc/cpuinfo")
    return information.read_text(encoding="utf-8").splitlines() if information.is_file() else []


if __name__ == "__main__":
    main()

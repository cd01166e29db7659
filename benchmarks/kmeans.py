"""How fast and how good the batched one-dimensional k-means is, against scikit-learn's as CLAQ calls it.

    OMP_NUM_THREADS=1 python benchmarks/kmeans.py [--bits 2] [--sample 16] [--repeats 10] [--results FILE]

Columns of the default model's middle block. Ours fits batches of 128, without and with random weights; scikit-learn's
``KMeans(n_clusters=2**bits, random_state=10, n_init="auto", max_iter=100)`` fits a sample of the same columns one by
one. Times are microseconds a column: ``cpu`` the processor's, on average, which other programs on the machine disturb
less than ``wall``, the clock's, least of all repeats. ``error`` is ours over scikit-learn's, ``exact`` ours over the
optimum's (dynamic programming over all values), summed over the sample. Totals are over the columns of the whole model.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans

from ulbq.models.blocks import skeleton, structure
from ulbq.models.source import default_model
from ulbq.solvers.kmeans import kmeans_1d, refine

BATCH = 128


def columns() -> tuple[dict[int, torch.Tensor], Counter[int]]:
    """Columns of the middle block and the number of columns in the model, by the number of values of a column."""
    source = default_model()
    found = structure(skeleton(source))
    numbers = Counter[int]()
    for block in found.linears:
        for linear in block:
            numbers[linear.out_features] += linear.in_features
    parts = defaultdict(list)
    for linear in found.linears[found.n_blocks // 2]:
        weight = source.read(f"{linear.name}.weight").float()
        parts[linear.out_features].append(weight.T)
    generator = torch.Generator().manual_seed(0)
    picked = {}
    for size, matrices in sorted(parts.items()):
        every = torch.cat(matrices)
        picked[size] = every[torch.randperm(len(every), generator=generator)[:BATCH]].contiguous()
    return picked, numbers


def timed(work: Callable[[], Any], repeats: int, per: int) -> dict[str, float]:
    """Microseconds by the processor's clock and by the wall's."""
    work()
    wall, started = [], time.process_time()
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        wall.append(time.perf_counter() - begun)
    cpu = (time.process_time() - started) / repeats
    return {"cpu": round(cpu / per * 1e6, 1), "wall": round(min(wall) / per * 1e6, 1)}


def exact_error(column: np.ndarray, k: int) -> float:
    """The least error of one column ``[n]``."""
    ordered = np.sort(column.astype(np.float64))
    ordered -= ordered.mean()
    mass, sums, squares = (np.concatenate(([0.0], np.cumsum(ordered**power))) for power in (0, 1, 2))
    within = np.subtract.outer(mass, mass)
    cost = np.subtract.outer(squares, squares) - np.subtract.outer(sums, sums) ** 2 / np.where(within > 0, within, 1)
    cost[within < 0] = np.inf
    best = cost[:, 0]
    for _ in range(k - 1):
        best = (cost + best).min(1)
    return float(best[-1])


def measure(values: torch.Tensor, k: int, sample: int, repeats: int) -> dict[str, Any]:
    """One size of columns."""
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(1))
    fitted = kmeans_1d(values, k)
    some = values[:sample].double().numpy()

    def theirs() -> float:
        fits = (KMeans(n_clusters=k, random_state=10, n_init="auto", max_iter=100) for _ in some)
        return sum(fit.fit(column[:, None]).inertia_ for fit, column in zip(fits, some, strict=True))

    ours = float(fitted.error[:sample].sum())
    row = {
        "ours": timed(lambda: kmeans_1d(values, k), repeats, len(values)),
        "weighted": timed(lambda: kmeans_1d(values, k, weights=weights), repeats, len(values)),
        "refine": timed(lambda: refine(values[:1], fitted.centroids[:1], 2), 20 * repeats, 1),
        "scikit-learn": timed(theirs, 2, len(some)),
        "error": round(ours / theirs(), 6),
        "exact": round(ours / sum(exact_error(column, k) for column in some), 6),
    }
    return row | {"times_faster": round(row["scikit-learn"]["cpu"] / row["ours"]["cpu"], 1)}


def main() -> None:
    """Measure each size of columns, print the rows and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2, help="2**bits clusters")
    parser.add_argument("--sample", type=int, default=16, help="columns of each size for scikit-learn")
    parser.add_argument("--repeats", type=int, default=10, help="of our fits; scikit-learn's are timed twice")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    picked, numbers = columns()
    rows = []
    for size, values in picked.items():
        row = measure(values, 2**options.bits, options.sample, options.repeats)
        rows.append({"values": size, "columns": numbers[size], **row})
        print(json.dumps(rows[-1]), flush=True)
    totals = {
        f"{name}, {clock}": round(sum(row[name][clock] * row["columns"] for row in rows) / 1e6, 1)
        for name in ("ours", "weighted", "scikit-learn")
        for clock in ("cpu", "wall")
    }
    print("seconds for the model:", json.dumps(totals))
    if options.results:
        versions = {"torch": torch.__version__, "numpy": np.__version__, "scikit-learn": sklearn.__version__}
        result = {"clusters": 2**options.bits, "sample": options.sample, "rows": rows, "seconds": totals}
        text = json.dumps({**result, "threads": torch.get_num_threads(), "versions": versions}, indent=2)
        options.results.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

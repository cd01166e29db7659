"""What trellis codes cost on Gaussian noise, beside what the solver takes for granted of them.

    python benchmarks/trellis_codes.py [--sequences 256] [--state-bits 12 16]

The mean squared error, relative to the variance, of sequences of 256 normal numbers of several standard deviations: the
best one by bits is ``_BEST_SCALE`` of ``ulbq/solvers/trellis.py``, its error ``_ERRORS`` there. The last column is
processor time.
"""

import argparse
import time

import torch

from ulbq.formats.trellis import LENGTH, TrellisScheme
from ulbq.runtime import calm_threads
from ulbq.solvers.trellis import search

SCALES = (0.8, 0.84, 0.88, 0.91, 0.94, 0.97, 1.0, 1.05, 1.1, 1.15)


def main() -> None:
    """Print a line for each width."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--state-bits", type=int, nargs="+", default=[12, 16])
    options = parser.parse_args()
    calm_threads()
    noise = torch.randn(options.sequences, LENGTH, generator=torch.Generator().manual_seed(0))
    for state_bits in options.state_bits:
        for bits in (1, 2, 3, 4):
            scheme = TrellisScheme.model_validate({"bits": bits, "state_bits": state_bits})
            started, errors = time.process_time(), {}
            for scale in SCALES:
                _, found = search(noise * scale, scheme)
                errors[scale] = ((found / scale - noise).square().sum() / noise.square().sum()).item()
            each = (time.process_time() - started) / len(SCALES) / noise.numel()
            best = min(errors, key=errors.__getitem__)
            told = "  ".join(f"{scale:g}: {error:.4f}" for scale, error in errors.items())
            print(f"L {state_bits}, K {bits}: best {best:g} {errors[best]:.4f}, {1e6 * each:.2f} µs a weight   {told}")


if __name__ == "__main__":
    main()

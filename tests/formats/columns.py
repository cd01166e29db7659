"""Random matrices in the codebook format."""

from collections.abc import Sequence

import torch

from ulbq.formats.codebook import CodebookScheme, Columns, Outliers


def random_columns(
    out_features: int, widths: Sequence[int], outliers: int = 0, *, seed: int = 0
) -> tuple[CodebookScheme, Columns]:
    """A matrix with columns of these widths and so many outliers; all its values are float16's."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(widths, dtype=torch.uint8)
    levels = 2 ** max(widths)
    codes = torch.randint(2**16, (len(widths), out_features), generator=generator) % (1 << size.long()).unsqueeze(1)
    codebooks = torch.randn(len(widths), levels, generator=generator).half().float()
    codebooks[torch.arange(levels) >= (1 << size.int()).unsqueeze(1)] = 0
    found = None
    if outliers:
        positions = torch.randperm(codes.numel(), generator=generator)[:outliers].sort().values
        found = Outliers(positions, (10 * torch.randn(outliers, generator=generator)).half().float())
    return CodebookScheme.of(2, size, outliers), Columns(codes.to(torch.uint8), size, codebooks, found)

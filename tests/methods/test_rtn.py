from typing import Any

import pytest
import torch

from ulbq.errors import NumericsError
from ulbq.formats import AffineScheme, affine
from ulbq.methods.rtn import pack_codes
from ulbq.solvers.rtn import round_to_nearest


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_what_is_stored_otherwise_than_found_is_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, pack = AffineScheme(bits=2, group_size=16), affine.pack
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weight, scheme)
    assert pack_codes("up", scheme, found).keys() == {"codes", "scales", "zeros"}

    def spoilt(*arguments: Any) -> dict[str, torch.Tensor]:
        packed = pack(*arguments)
        first = packed[part].flatten()[:1]
        first.copy_(first * 2 if part == "scales" else first ^ 1)
        return packed

    monkeypatch.setattr(affine, "pack", spoilt)
    with pytest.raises(NumericsError, match="The packed weight of 'up' differs"):
        pack_codes("up", scheme, found)


def test_scales_that_are_no_numbers_are_refused() -> None:
    scheme = AffineScheme(bits=2, group_size=16)
    found = round_to_nearest(torch.ones(8, 32), scheme)
    found.scales[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="differs"):
        pack_codes("up", scheme, found)

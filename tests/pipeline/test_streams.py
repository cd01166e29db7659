"""The streams: what layers see, with compiled kernels and without."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models.tiny import FAMILIES, save_tiny
from ulbq.blockwise.samples import Samples
from ulbq.config.quantize import QuantizeRequest
from ulbq.kernels import attention, between, build
from ulbq.pipeline.quantization_plan import prepare
from ulbq.pipeline.streams import Streams
from ulbq.progress import Silent

TOKENS = torch.randint(3, 250, (6, 32), generator=torch.Generator().manual_seed(7))


def passed(source: Path, folder: Path, precision: str) -> dict[str, torch.Tensor]:
    """What comes out of the first two blocks, and what the second's layers saw."""
    tokens = folder / "tokens.safetensors"
    save_file({"tokens": TOKENS}, tokens)
    request = QuantizeRequest(
        source=str(source), method="gptq", group_size=32, calibration=str(tokens), samples=4, sequence_length=32,
        device="cpu", precision=precision, offline=True,
    )  # fmt: skip
    streams = Streams(prepare(request, Silent()), Samples(TOKENS), folder)
    for index in range(2):
        streams.advance_full_precision(index, streams.load(index))
    return {"output": streams.ends()[0].get(slice(0, 6)), **streams.importance}


@pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_change_nothing_but_roundings(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(family, tmp_path / family)
    found = passed(dense, tmp_path, precision)
    monkeypatch.setattr(between, "takes", lambda x: False)
    monkeypatch.setattr(attention, "takes", lambda query, key, value: False)
    wanted = passed(dense, tmp_path, precision)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= (1e-5 if precision == "fp32" else 0.02) * value.norm(), name

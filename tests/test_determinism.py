"""What a run asks of torch to repeat itself."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.pipeline.runs import request
from ulbq import runtime
from ulbq.formats.levels import sum_by_level
from ulbq.pipeline import quantize as pipeline


def test_torch_is_asked_for_what_repeats_itself_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with runtime.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    with runtime.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_is_deterministic_where_that_is_asked_for(
    wanted: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = pipeline._work

    def work(*given: object) -> object:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "_work", work)
    save_file({"tokens": torch.randint(3, 250, (4, 8)).int()}, tmp_path / "tokens.safetensors")
    how = {"method": "gptq", "group_size": 32, "only": ("q_proj",), "samples": 2, "sequence_length": 8}
    how |= {"calibration": str(tmp_path / "tokens.safetensors"), "deterministic": wanted}
    pipeline.quantize(request(tiny_llama, tmp_path / "q", **how))
    assert seen == [wanted]


def test_sums_by_level_are_the_same_without_atomics() -> None:
    values = torch.randn(4, 50)
    codes = torch.randint(8, (4, 50))
    wanted = torch.zeros(4, 8).scatter_add_(1, codes, values)
    assert torch.equal(sum_by_level(values, codes, 8), wanted)
    by_passes = torch.stack([torch.where(codes == level, values, 0).sum(1) for level in range(8)], 1)
    assert torch.allclose(by_passes, wanted, atol=1e-5)

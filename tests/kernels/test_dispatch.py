import pytest
import torch

from ulbq import kernels
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme, TrellisScheme
from ulbq.kernels import LAYOUTS, Case, build, choose, triton_launch

W2 = AffineScheme(bits=2, group_size=64)


def case(**changes: object) -> Case:
    return Case(W2, 64, 128, "cpu", torch.bfloat16, 1)._replace(**changes)


@pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
@pytest.mark.parametrize(
    ("changes", "name", "reasons"),
    [
        ({}, "tiles", {}),
        ({"rows": 512}, "dense", {"tiles": "512 rows", "int4": "512 rows"}),
        ({"rows": 96, "dtype": torch.float16}, "dense", {"tiles": "beyond 95", "int4": "float16 activations"}),
        ({"dtype": torch.float64}, "dense", {"tiles": "float64 activations", "int4": "float64 activations"}),
        ({"scheme": AffineScheme(bits=8)}, "bytes", {"tiles": "8 bits", "int4": "8 bits"}),
        ({"scheme": AffineScheme(bits=2, group_size=16)}, "dense", {"tiles": "groups of 16", "int4": "groups of 16"}),
        ({"scheme": DualBinaryScheme(group_size=-1)}, "tiles", {}),
        ({"scheme": BinaryMosScheme(), "differentiable": True}, "tiles", {}),
        ({"scheme": TrellisScheme(), "rows": 512}, "trellis", {"tiles": "affine, dual_binary, binary_mos only"}),
        (
            {"scheme": TrellisScheme(), "dtype": torch.float64},
            "dense",
            {"tiles": "binary_mos only", "int4": "affine only"},
        ),
    ],
)
def test_the_table(changes: dict[str, object], name: str, reasons: dict[str, str]) -> None:
    choice = choose(case(**changes))
    assert choice.layout.name == name
    assert (
        choice.passed_over.keys() - {"bytes", "columns", "humming", "super_blocks", "trellis", "triton"}
        == reasons.keys()
    )
    for backend, reason in reasons.items():
        assert reason in choice.passed_over[backend]


def test_a_gpu_does_not_get_the_kernels_of_the_cpu() -> None:
    choice = choose(case(device="cuda"))
    assert choice.layout.name == ("dense" if triton_launch.unavailable_reason() else "triton")
    for name in ("tiles", "columns", "trellis", "int4"):
        assert choice.passed_over[name] == "runs on the CPU, not on cuda"  # type: ignore[index]


def test_the_cpu_does_not_get_those_of_gpus() -> None:
    choice = choose(case(dtype=torch.float64))
    assert choice.layout.name == "dense"
    assert choice.passed_over["triton"] == "runs on CUDA GPUs, not on cpu"


def test_the_last_row_takes_everything() -> None:
    last = LAYOUTS[-1]
    assert last.name == "dense"
    assert last.device is None
    assert last.unavailable_reason() is None
    assert last.unsupported_reason(CodebookScheme(), 1, 1) is None
    assert last.call_reason(case()) is None


@pytest.mark.parametrize("scheme", [W2, AffineScheme(bits=8), DualBinaryScheme()], ids=lambda s: s.label)
def test_what_is_prepared_on_another_device_stays_as_stored(scheme: AnyScheme) -> None:
    stored = {
        name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        for name, spec in scheme.tensors(64, 128).items()
    }
    ready = kernels.prepare(scheme, stored, 64, 128)
    assert ready.layout.name == "dense"
    assert all(ready.tensors[name] is tensor for name, tensor in stored.items())

import pytest
import torch

from ulbq import kernels
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme
from ulbq.kernels import BACKENDS, Case, build, choose, triton_launch

W2 = AffineScheme(bits=2, group_size=64)


def case(**changes: object) -> Case:
    return Case(W2, 64, 128, "cpu", torch.bfloat16, 1)._replace(**changes)


@pytest.mark.skipif(bool(build.failure()), reason=build.failure())
@pytest.mark.parametrize(
    ("changes", "name", "reasons"),
    [
        ({}, "tiles", {}),
        ({"rows": 512}, "dense", {"tiles": "512 rows", "int4": "512 rows"}),
        ({"rows": 96, "dtype": torch.float16}, "dense", {"tiles": "beyond 95", "int4": "float16 activations"}),
        ({"dtype": torch.float64}, "dense", {"tiles": "float64 activations", "int4": "float64 activations"}),
        ({"scheme": AffineScheme(bits=8)}, "dense", {"tiles": "8 bits", "int4": "8 bits"}),
        ({"scheme": AffineScheme(bits=2, group_size=16)}, "dense", {"tiles": "groups of 16", "int4": "groups of 16"}),
        ({"scheme": DualBinaryScheme(group_size=-1)}, "tiles", {}),
        ({"scheme": BinaryMosScheme(), "differentiable": True}, "tiles", {}),
    ],
)
def test_the_table(changes: dict[str, object], name: str, reasons: dict[str, str]) -> None:
    choice = choose(case(**changes))
    assert choice.backend.name == name
    assert choice.passed_over.keys() - {"columns", "humming", "triton"} == reasons.keys()
    for backend, reason in reasons.items():
        assert reason in choice.passed_over[backend]


def test_a_gpu_does_not_get_the_kernels_of_the_cpu() -> None:
    choice = choose(case(device="cuda"))
    assert choice.backend.name == ("dense" if triton_launch.failure() else "triton")
    for name in ("tiles", "columns", "int4"):
        assert choice.passed_over[name] == "runs on the CPU, not on cuda"  # type: ignore[index]


def test_the_cpu_does_not_get_those_of_gpus() -> None:
    choice = choose(case(dtype=torch.float64))
    assert choice.backend.name == "dense"
    assert choice.passed_over["triton"] == "runs on CUDA GPUs, not on cpu"


def test_the_last_row_takes_everything() -> None:
    last = BACKENDS[-1]
    assert last.name == "dense"
    assert not (last.missing())
    assert not (last.matrix(CodebookScheme(), 1, 1, "meta"))
    assert not (last.call(case()))


@pytest.mark.parametrize("scheme", [W2, AffineScheme(bits=8), DualBinaryScheme()], ids=lambda s: s.label)
def test_what_is_prepared_on_another_device_stays_as_stored(scheme: AnyScheme) -> None:
    stored = {
        name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        for name, spec in scheme.tensors(64, 128).items()
    }
    ready = kernels.prepare(scheme, stored, 64, 128)
    assert ready.layout == "planes"
    assert all(ready.tensors[name] is tensor for name, tensor in stored.items())

"""What happens where the kernels cannot be compiled, and that they are compiled once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.matrices import assert_near, exact, random_matrix
from ulbq import kernels
from ulbq.formats import AffineScheme
from ulbq.kernels import build
from ulbq.nn.quant_linear import QuantLinear

SCHEME = AffineScheme(bits=2, group_size=64)


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that has not looked for the library yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (build.library, build.failure, build._load)
    for function in caches:
        function.cache_clear()
    yield tmp_path / "ulbq" / "kernels"
    for function in caches:
        function.cache_clear()


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(build._NEEDED))
    monkeypatch.setattr(build, "find_compiler", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_compiler_other_backends_do_the_work(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    without_compiler(monkeypatch)
    layer = QuantLinear(SCHEME, 128, 64)
    stored = random_matrix(SCHEME, 64, 128)
    layer.assign(stored)
    x = torch.randn(3, 128).to(dtype)
    # With bfloat16 activations it is torch's int4 product, which rounds the scales.
    assert_near(layer(x), exact(SCHEME, stored, x), dtype, slack=2)
    choice = kernels.choose(kernels.Case(SCHEME, 64, 128, "cpu", dtype, 3))
    assert choice.backend.name == ("int4" if dtype == torch.bfloat16 else "dense")
    assert "no C++ compiler" in choice.passed_over["tiles"]
    assert set(layer.state_dict()) == {"codes", "scales", "zeros"}
    assert not unbuilt.exists()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda patch: patch.setenv(build.SWITCH, "0"), "switched off by ULBQ_COMPILE=0"),
        (lambda patch: patch.setattr(build, "cpu_features", frozenset), "this processor has no avx512_vnni, avx512bw"),
        (without_compiler, "no C\\+\\+ compiler"),
    ],
)
def test_the_reason_is_told(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, break_it, reason: str) -> None:
    break_it(monkeypatch)
    with pytest.raises(build.UnavailableError, match=reason):
        build.library()
    assert build.failure()


def test_a_compiler_that_fails_is_quoted(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'tiles.h:1: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    without_compiler(monkeypatch)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    assert "error: no such luck" in build.failure()
    assert list(unbuilt.iterdir()) == []


def test_a_compiled_library_is_found_again(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second process starts no compiler; another compiler makes another library."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho no library > "$2"\n')
    compiler.chmod(0o755)
    without_compiler(monkeypatch)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    assert "does not load" in build.failure()
    (made,) = unbuilt.iterdir()
    compiled = made.stat().st_mtime_ns
    for function in (build.failure, build._load):
        function.cache_clear()
    assert build.failure()
    assert made.stat().st_mtime_ns == compiled
    compiler.write_text(compiler.read_text() + "# another\n")
    for function in (build.failure, build._load):
        function.cache_clear()
    assert build.failure()
    assert len(list(unbuilt.iterdir())) == 2

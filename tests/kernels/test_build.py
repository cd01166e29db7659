"""What happens where the kernels cannot be compiled, and that they are compiled once."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.matrices import assert_near, exact, random_matrix
from ulbq import kernels
from ulbq.formats import AffineScheme
from ulbq.kernels import build, cache
from ulbq.nn.quant_linear import QuantLinear

SCHEME = AffineScheme(bits=2, group_size=64)


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that has not looked for the library yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (build.library, build.unavailable_reason, build._load)
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
    assert choice.layout.name == ("int4" if dtype == torch.bfloat16 else "dense")
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
    assert build.unavailable_reason()


def test_a_compiler_that_fails_is_quoted(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'tiles.h:1: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    without_compiler(monkeypatch)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    assert "error: no such luck" in build.unavailable_reason()
    assert list(unbuilt.iterdir()) == []


def test_a_compiled_library_is_found_again(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second process starts no compiler; another compiler makes another library."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho no library > "$2"\n')
    compiler.chmod(0o755)
    without_compiler(monkeypatch)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    assert "does not load" in build.unavailable_reason()
    (made,) = unbuilt.iterdir()
    compiled = made.stat().st_mtime_ns
    for function in (build.unavailable_reason, build._load):
        function.cache_clear()
    assert build.unavailable_reason()
    assert made.stat().st_mtime_ns == compiled
    compiler.write_text(compiler.read_text() + "# another\n")
    for function in (build.unavailable_reason, build._load):
        function.cache_clear()
    assert build.unavailable_reason()
    assert len(list(unbuilt.iterdir())) == 2


class TestCache:
    """What is loaded from the cache: this user's own libraries, whole; all else is built again."""

    @pytest.fixture
    def compiler(self, unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """A compiler that only counts the libraries it makes, which do not load."""
        path = tmp_path / "c++"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *-shared*) echo >> {tmp_path}/calls;; esac\n'
            'while [ "$1" != -o ]; do shift; done\necho no library > "$2"\n'
        )
        path.chmod(0o755)
        without_compiler(monkeypatch)
        monkeypatch.setattr(build, "find_compiler", lambda: str(path))
        return path

    @staticmethod
    def _again() -> str:
        for function in (build.unavailable_reason, build._load):
            function.cache_clear()
        return build.unavailable_reason()

    @staticmethod
    def _calls(compiler: Path) -> int:
        return len((compiler.parent / "calls").read_text())

    def test_is_closed_to_others_whatever_the_umask(self, compiler: Path, unbuilt: Path) -> None:
        before = os.umask(0o002)
        try:
            self._again()
        finally:
            os.umask(before)
        (made,) = unbuilt.iterdir()
        assert [stat.S_IMODE(p.stat().st_mode) for p in (unbuilt.parent, unbuilt, made)] == [0o700] * 3
        unbuilt.chmod(0o777)
        self._again()
        assert stat.S_IMODE(unbuilt.stat().st_mode) == 0o700

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "link", "open"])
    def test_what_is_not_whole_is_built_again(self, damage: str, compiler: Path, unbuilt: Path, tmp_path: Path) -> None:
        self._again()
        (made,) = unbuilt.iterdir()
        data = made.read_bytes()
        if damage == "link":
            (tmp_path / "x.so").write_bytes(data)
            made.unlink()
            made.symlink_to(tmp_path / "x.so")
        elif damage == "open":
            made.chmod(0o777)
        else:
            made.write_bytes({"cut": data[:-1], "flipped": b"N" + data[1:], "empty": b""}[damage])
        assert "does not load" in self._again()
        assert self._calls(compiler) == 2
        (again,) = unbuilt.iterdir()
        assert again.read_bytes() == data
        self._again()
        assert self._calls(compiler) == 2

    @pytest.mark.parametrize("folder", ["ulbq", "ulbq/kernels"])
    def test_another_users_folder_is_not_used(
        self, folder: str, compiler: Path, unbuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unbuilt.mkdir(parents=True)
        real = Path.stat

        def owned(path: Path, **more: Any) -> os.stat_result:
            found = real(path, **more)
            return os.stat_result((*found[:4], 65534, *found[5:])) if path == tmp_path / folder else found

        monkeypatch.setattr(Path, "stat", owned)
        assert "belongs to another user" in self._again()
        assert list(unbuilt.iterdir()) == []

    def test_another_users_library_is_built_again(
        self, compiler: Path, unbuilt: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._again()
        monkeypatch.setattr(cache, "_is_ours", lambda path: False)
        self._again()
        assert self._calls(compiler) == 2

    @pytest.mark.parametrize("value", ["cache", "./cache", ""])
    def test_a_relative_folder_counts_for_nothing(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.folder() == Path.home() / ".cache" / "ulbq" / "kernels"

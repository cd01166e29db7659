"""Whole runs on tiny models: what is written, resumed, refused and told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.models.tiny import save_tiny
from ulbq.artifacts import SaliencyManifest, read_manifest, verify
from ulbq.config.saliency import SaliencyRequest
from ulbq.errors import InputError, UsageError
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.saliency import plan, saliency
from ulbq.progress import Silent
from ulbq.sensitivity import Saliency


def request(source: Path, out: Path, samples: Path | None = None, **changes: Any) -> SaliencyRequest:
    values: dict[str, Any] = {"source": str(source), "out": out, "device": "cpu", "offline": True}
    if samples is not None:
        values |= {"calibration": str(samples), "samples": 4, "sequence_length": 32, "precision": "fp32"}
    return SaliencyRequest(**{**values, **changes})


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("saliency-*.safetensors"))}


class _Stop(Silent):
    """Interrupts the run once a number of blocks are scored."""

    def __init__(self, scored: int) -> None:
        self._left = scored

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Iterator[Any]:
        yield self

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._left -= detail.endswith("backward")
        if self._left == 0:
            raise KeyboardInterrupt


def test_an_artifact_is_whole_and_reads_back(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    path, manifest = saliency(request(tiny_llama, tmp_path / "s", samples))
    verify(path)
    assert sorted(shards(path)) == [f"saliency-block-0000{index}.safetensors" for index in range(3)]
    scores = Saliency.open(path)
    assert scores.manifest == manifest == read_manifest(path)
    model = load_model(resolve(tiny_llama), dtype=torch.float32)
    for layer in manifest.layers:
        values = scores.score(layer.name)
        assert values.shape == model.get_submodule(layer.name).weight.shape == layer.shape
        assert values.dtype == torch.float32
        assert (values >= 0).all()
        assert values.double().sum().item() == pytest.approx(layer.total, rel=2e-3)
        assert sum(layer.columns) == pytest.approx(1, abs=1e-4)
        shares = values.sum(0) / values.sum()
        assert shares[layer.top_columns[0][0]].item() == pytest.approx(layer.top_columns[0][1], rel=5e-3)
        assert shares.max().item() == pytest.approx(layer.top_columns[0][1], rel=5e-3)
        assert 0 < layer.rounding < 2e-3
    assert manifest.calibration["samples"] == 4
    assert manifest.parents[0].sha256 == resolve(tiny_llama).content_hash
    assert manifest.rounding == max(layer.rounding for layer in manifest.layers)


def test_the_overall_shares_are_those_of_all_weights(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    for kind in ("fisher", "hessian"):
        path, manifest = saliency(request(tiny_llama, tmp_path / kind, samples, kind=kind))
        scores = Saliency.open(path)
        everything = torch.cat([scores.score(layer.name).flatten() for layer in manifest.layers]).double()
        ordered = everything.sort(descending=True).values
        for name, fraction in (("0.1", 0.001), ("1", 0.01), ("10", 0.1)):
            whole, rest = divmod(fraction * len(ordered), 1)
            share = ((ordered[: int(whole)].sum() + rest * ordered[int(whole)]) / ordered.sum()).item()
            assert manifest.top[name] == pytest.approx(share, rel=1e-3), (kind, name)


@pytest.mark.parametrize("scored", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    scored: int, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    straight, whole = saliency(request(tiny_llama, tmp_path / "straight", samples))
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        saliency(request(tiny_llama, out, samples), _Stop(scored))
    partial = tmp_path / "s.partial"
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("saliency-*")}
    assert len(done) == scored
    with pytest.raises(InputError):
        saliency(request(tiny_llama, out, samples, kind="gradient"))
    with pytest.raises(InputError, match="not finished"):
        resolve(out)
    path, manifest = saliency(request(tiny_llama, out, samples))
    assert shards(path) == shards(straight)
    assert {name: (path / name).stat().st_mtime_ns for name in done} == done
    assert (manifest.layers, manifest.loss) == (whole.layers, whole.loss)


def test_activations_on_disk_and_batches_give_the_same_scores(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    memory, _ = saliency(request(tiny_llama, tmp_path / "memory", samples))
    disk, _ = saliency(request(tiny_llama, tmp_path / "disk", samples, activation_memory=0))
    assert shards(memory) == shards(disk)
    assert {path.name for path in disk.iterdir()} == {path.name for path in memory.iterdir()}


def test_magnitude_needs_no_data_and_refuses_it(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    path, manifest = saliency(request(tiny_llama, tmp_path / "s", kind="magnitude", dtype="fp16"))
    name = "model.layers.2.mlp.down_proj"
    weight = load_model(resolve(tiny_llama), dtype=torch.float32).get_submodule(name).weight.detach().abs()
    torch.testing.assert_close(Saliency.open(path).score(name), weight, rtol=5e-4, atol=1e-7)
    assert manifest.calibration == {}
    assert manifest.loss is None
    for option in ({"samples": 3}, {"calibration": "c4"}, {"batch_size": 1}, {"precision": "fp32"}):
        with pytest.raises(UsageError, match="means nothing to `kind=magnitude`"):
            plan(request(tiny_llama, tmp_path / "t", kind="magnitude", **option))


def test_the_model_writes_its_samples_where_there_are_none(tiny_llama: Path, tmp_path: Path) -> None:
    asked = {"calibration": "self", "samples": 2, "sequence_length": 8, "precision": "fp32", "kind": "hessian"}
    path, manifest = saliency(request(tiny_llama, tmp_path / "s", **asked))
    assert manifest.calibration["name"] == "self"
    assert (path / "calibration.safetensors").is_file()


def test_what_is_no_model_in_full_precision_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    scored, _ = saliency(request(tiny_llama, tmp_path / "s", kind="magnitude"))
    with pytest.raises(InputError, match="holds saliency scores, not a model") as caught:
        saliency(request(scored, tmp_path / "t", kind="magnitude"))
    assert str(tiny_llama) in (caught.value.hint or "")
    with pytest.raises(InputError, match="exists"):
        saliency(request(tiny_llama, scored, kind="magnitude"))
    with pytest.raises(ValidationError):
        request(tiny_llama, tmp_path / "t", kind="noise")


def test_a_layer_that_no_sample_calls_is_warned_of(
    tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    warnings: list[str] = []

    class Told(Silent):
        def warn(self, text: str) -> None:
            warnings.append(text)

    path, manifest = saliency(request(tiny_llama, tmp_path / "s", samples), Told())
    assert any("3 layers score zero" in text for text in warnings)
    silent = next(layer for layer in manifest.layers if layer.projection == "mlp.up_proj")
    assert silent.top_columns == ()
    assert silent.top == {"0.1": 0, "1": 0, "10": 0}
    assert "nan" not in (path / "report.html").read_text().lower()


def test_the_plan_says_what_the_run_then_does(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "s", samples)
    planned = plan(asked)
    assert not list(tmp_path.glob("s*.partial"))
    path, manifest = saliency(asked)
    assert planned.request.model_dump(mode="json") == manifest.request
    assert planned.layers == len(manifest.layers)
    on_disk = sum(file.stat().st_size for file in path.glob("saliency-*"))
    assert planned.artifact == pytest.approx(on_disk, rel=0.1)
    more = plan(asked.model_copy(update={"activation_memory": 0}))
    assert more.disk - planned.disk == 4 * 4 * 32 * 64 * 4


def test_the_page_shows_every_layer_and_loads_nothing(samples: Path, tmp_path: Path) -> None:
    source = save_tiny("gemma2", tmp_path / "a&b")
    path, manifest = saliency(request(source, tmp_path / "s", samples))
    assert isinstance(manifest, SaliencyManifest)
    page = (path / "report.html").read_text()
    assert all(layer.name in page for layer in manifest.layers)
    assert "a&amp;b: fisher" in page
    assert f"{manifest.top['1']:.1%}" in page
    # Maps say what runs along their sides, and what their colours stand for.
    for told in ("block</text>", "column</text>", "ten times as much", "share of the layer&#39;s total"):
        assert told in page, told
    for word in ("<script", "<link", "http://", "https://", "src=", "@import"):
        assert word not in page

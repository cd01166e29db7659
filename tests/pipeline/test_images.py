"""Whole runs whose calibration shows images."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin

from tests.data import pictures
from tests.pipeline.runs import StopAt, request, shards
from ulbq.blockwise.samples import Samples
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.data.calibration import CALIBRATION_FILE
from ulbq.errors import InputError, ResourceError
from ulbq.models.source import resolve
from ulbq.pipeline import samples as drawing
from ulbq.pipeline.quantization_plan import prepare
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.saliency import saliency
from ulbq.pipeline.samples import draw
from ulbq.pipeline.streams import Streams
from ulbq.progress import Silent

pytest.importorskip("PIL", reason="needs Pillow")

_SIZE = {"samples": 6, "sequence_length": 64, "group_size": 32, "precision": "fp32"}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3") / "m"
    pictures.save_model("gemma3", folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file whose eight rows have an image each."""
    names = pictures.save_images(tmp_path / "data", 8)
    path = tmp_path / "data" / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"see <image> {name} there", "images": [name]}) + "\n" for name in names)
    )
    return path


def gptq(model: Path, out: Path, rows: Path, **changes: Any) -> QuantizeRequest:
    return request(model, out, **{"method": "gptq", "bits": 3, "calibration": str(rows), **_SIZE, **changes})


def trained(model: Path, out: Path, rows: Path, **changes: Any) -> QuantizeRequest:
    return request(model, out, **{"method": "db-llm", "epochs": 1, "calibration": str(rows), **_SIZE, **changes})


def with_processor(monkeypatch: pytest.MonkeyPatch, processor: ProcessorMixin) -> None:
    """Use a processor that cannot be saved without torchvision."""
    monkeypatch.setattr(drawing, "load_processor", lambda source: processor)


def test_images_reach_the_layers(gemma: Path, rows: Path, tmp_path: Path) -> None:
    out, manifest = quantize(gptq(gemma, tmp_path / "q", rows))
    assert manifest.calibration["images"] == 8
    assert manifest.calibration["sequence_length"] == 64
    with (out / CALIBRATION_FILE).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    known = json.loads(header["__metadata__"]["calibration"])["images"]
    assert len(known) == 8
    assert all(len(digest) == 64 for sample in known for digest in sample)
    job = prepare(gptq(gemma, tmp_path / "n", rows), Silent())
    drawn = draw(job.request, job.source, 8, Silent()).drawn
    seen = []
    for name, given in (("images", drawn), ("words", Samples(drawn.tokens))):
        (tmp_path / name).mkdir()
        streams = Streams(job, given, tmp_path / name)
        streams.advance_full_precision(0, streams.load(0), job.names(0)[1])
        seen.append(streams.importance["self_attn.q_proj"])
    assert (seen[0] - seen[1]).norm() > 0.01 * seen[1].norm()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    family: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_processor(monkeypatch, pictures.save_model(family, tmp_path / "m"))
    straight, _ = quantize(trained(tmp_path / "m", tmp_path / "straight", rows))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(trained(tmp_path / "m", out, rows), StopAt(out, 1))
    resumed, _ = quantize(trained(tmp_path / "m", out, rows))
    assert shards(resumed) == shards(straight)
    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        quantize(trained(tmp_path / "m", again, rows), StopAt(again, 1))
    image = rows.parent / "0.png"
    image.write_bytes((rows.parent / "3.png").read_bytes())
    with pytest.raises(InputError, match="other"):
        quantize(trained(tmp_path / "m", again, rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "claq", "group_size": None, "bits": 2},
        {"method": "apiq", "epochs": 1, "granularity": "layer"},
        {"method": "efficientqat", "epochs": 1, "batch_size": 4},
    ],
)
def test_methods(changes: dict[str, Any], gemma: Path, rows: Path, tmp_path: Path) -> None:
    settings = {"calibration": str(rows), **_SIZE, **changes}
    _, manifest = quantize(request(gemma, tmp_path / "q", **settings))
    assert manifest.calibration["images"] == 8


def test_scores_by_inputs_and_not_by_predictions(gemma: Path, rows: Path, tmp_path: Path) -> None:
    size = {"samples": 6, "sequence_length": 64, "device": "cpu", "offline": True}
    asked = {"source": str(gemma), "calibration": str(rows), **size}
    _, manifest = saliency(SaliencyRequest(kind="wanda", out=tmp_path / "w", **asked))
    assert manifest.calibration["images"] == 8
    with pytest.raises(InputError, match="`kind=fisher` goes by what the model predicts"):
        saliency(SaliencyRequest(kind="fisher", out=tmp_path / "f", **asked))
    assert not (tmp_path / "f.partial").exists()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"end_to_end": "kl"}, "end_to_end"),
        ({"fit_temperature": True}, "fit_temperature"),
        ({"saliency": "fisher", "penalty": 1.0}, "saliency=fisher"),
        ({"method": "gptq", "epochs": None, "hessian": "guided"}, "hessian=guided"),
    ],
)
def test_what_goes_by_predictions_is_refused(
    changes: dict[str, Any], field: str, gemma: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"`{field}` goes by what the model predicts"):
        quantize(trained(gemma, tmp_path / "q", rows, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_end_to_end_phase_with_a_text_of_its_own(gemma: Path, rows: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and words\n\n" * 500)
    changes = {"end_to_end": "kl", "end_to_end_data": str(text), "end_to_end_samples": 2, "end_to_end_epochs": 1}
    _, manifest = quantize(trained(gemma, tmp_path / "q", rows, **changes))
    assert manifest.calibration["images"] == 8
    assert manifest.end_to_end is not None


def test_what_is_missing_is_named_and_nothing_written(
    gemma: Path, tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in gemma.iterdir():
        if "processor" not in path.name:
            shutil.copy(path, bare)

    def refused(model: Path, kind: type[InputError | ResourceError] = InputError) -> str:
        with pytest.raises(kind) as caught:
            quantize(gptq(model, tmp_path / "q", rows))
        assert not list(tmp_path.glob("q*"))
        return caught.value.message

    assert "is a model of text: it has no place for images" in refused(tiny_llama)
    assert "has no processor of images that transformers can read" in refused(bare)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else find(name, *rest))
    assert refused(gemma, ResourceError) == "Reading images needs Pillow."
    monkeypatch.undo()
    (rows.parent / "5.png").unlink()
    assert "row 6: there is no image" in refused(gemma)


def test_text_still_calibrates_a_model_of_images(gemma: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and words\n\n" * 500)
    _, manifest = quantize(gptq(gemma, tmp_path / "q", text))
    assert "images" not in manifest.calibration
    assert resolve(tmp_path / "q").packed

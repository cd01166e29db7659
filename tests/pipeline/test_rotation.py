"""``quantize --rotate``: whole runs on tiny models, reloaded, resumed, gone on from, converted and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import save_tiny
from tests.pipeline.runs import TOKENS, StopAt, db_llm, logits, request, shards
from ulbq import formats
from ulbq.artifacts.manifest import QuantizedManifest, read_manifest
from ulbq.config.convert import ConvertRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.errors import InputError
from ulbq.models.load import load_model
from ulbq.models.rotation import rotated
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.saliency import saliency


def rotated_logits(dense: Path, packed: Path, seed: int) -> torch.Tensor:
    """Logits of the rotated model with the artifact's dequantized weights and everything else of it put in."""
    source, model = resolve(packed), load_model(rotated(resolve(dense), seed), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = name.removesuffix(".weight")
            if linear in source.packed:
                tensors, scheme = source.read_packed(linear), source.packed[linear]
                reached = formats.dequantize(scheme, tensors, parameter.shape[1])
                # The codes are of these very weights.
                assert (reached - parameter).norm() < 0.3 * parameter.norm(), name
                parameter.copy_(reached)
            else:
                torch.testing.assert_close(source.read(name).float(), parameter, atol=2**-8, rtol=2**-8, msg=name)
                parameter.copy_(source.read(name))
        result: torch.Tensor = model(TOKENS).logits
        return result


def blocks(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in shards(folder).items() if name.startswith("model-")}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_model_is_packed_and_reloads_to_the_simulated_one(family: str, tied: bool, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / family, tied=tied)
    asked = request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32, rotate=True, seed=4)
    planned = plan(asked)
    path, manifest = quantize(asked)
    torch.testing.assert_close(logits(path), rotated_logits(dense, path, 4), atol=1e-5, rtol=1e-5)
    assert manifest.rotation is not None
    assert manifest.rotation == planned.rotation
    assert (manifest.rotation.seed, manifest.rotation.residual) == (4, "Hadamard 64")
    assert manifest.request["rotate"] is True
    assert resolve(path).config.tie_word_embeddings is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= resolve(path).names
    assert (resolve(path).parent, manifest.parents[0].sha256) == (str(dense), resolve(dense).content_hash)
    # What lies on disk is what was counted, the head included.
    stored = [tensor for file in path.glob("model-*.safetensors") for tensor in load_file(file).values()]
    assert sum(manifest.bits.parts.values()) == 8 * sum(tensor.nbytes for tensor in stored)


def test_many_bits_come_back_to_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    path, _ = quantize(request(tiny_llama, tmp_path / "q", method="rtn", bits=8, group_size=32, rotate=True))
    exact = logits(tiny_llama)
    assert (logits(path) - exact).norm() < 0.02 * exact.norm()


def test_an_unrotated_run_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    for name, asked in (("left out", None), ("said", False)):
        _, manifest = quantize(request(tiny_llama, tmp_path / name, method="rtn", group_size=32, rotate=asked))
        assert (manifest.rotation, manifest.request["rotate"]) == (None, False)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "bits": 2},
        {"method": "ulb-sapr", "adapter": False, "saliency": "fisher", "penalty": 0.1, "epochs": 1},
        {"end_to_end": "kl", "epochs": 1},
    ],
    ids=["gptq", "saliency on the fly", "end to end"],
)
def test_streams_scores_and_teacher_are_the_rotated_models(
    options: dict[str, Any],
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    options = {"epochs": None, **options}
    path, manifest = quantize(db_llm(tiny_llama, tmp_path / "q", samples, rotate=True, **options))
    assert manifest.rotation is not None
    exact = logits(tiny_llama)
    # A teacher or a stream in another basis would leave nothing of the model.
    plain, _ = quantize(db_llm(tiny_llama, tmp_path / "plain", samples, **options))
    assert (logits(path) - exact).norm() < 1.3 * (logits(plain) - exact).norm()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    straight, _ = quantize(db_llm(tiny_llama, tmp_path / "straight", samples, rotate=True))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(db_llm(tiny_llama, out, samples, rotate=True), StopAt(out, 1))
    for changed in ({}, {"rotate": True, "seed": 1}):
        with pytest.raises(InputError):
            quantize(db_llm(tiny_llama, out, samples, **changed))
    resumed, _ = quantize(db_llm(tiny_llama, out, samples, rotate=True))
    assert shards(resumed) == shards(straight)


def test_going_on_from_a_rotated_artifact_keeps_its_rotation(
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    first, made = quantize(db_llm(tiny_llama, tmp_path / "first", samples, rotate=True, seed=3, epochs=1))
    again, _ = quantize(db_llm(first, tmp_path / "again", samples, seed=5, epochs=0))
    assert blocks(again) == blocks(first)
    # From the second one too, whose own seed is another than the rotation's.
    further, manifest = quantize(db_llm(again, tmp_path / "further", samples, seed=6, epochs=1, rotate=True))
    assert manifest.rotation is not None
    assert (manifest.seed, manifest.rotation.seed, manifest.request["rotate"]) == (6, 3, True)
    for before, after in zip(made.blocks, manifest.blocks, strict=True):
        # Of weights that were turned otherwise, nothing would be right: an error of 1 and more.
        assert after.start_error < 1.2 * before.end_error < 1
    exact = logits(tiny_llama)
    assert (logits(further) - exact).norm() < 1.2 * (logits(first) - exact).norm()


def test_an_artifacts_rotation_cannot_be_changed(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    for made, asked, said in ((True, False, "with `rotate`"), (False, True, "without `rotate`")):
        path, _ = quantize(db_llm(tiny_llama, tmp_path / str(made), samples, epochs=0, rotate=made))
        with pytest.raises(InputError, match=f"was made {said}, and its codes cannot be changed") as refused:
            plan(db_llm(path, tmp_path / "q", samples, rotate=asked))
        assert "Leave out the option" in refused.value.hint


def test_scores_of_the_unrotated_model_are_refused(
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    asked = SaliencyRequest(source=str(tiny_llama), kind="magnitude", out=tmp_path / "s", device="cpu", offline=True)
    scores, _ = saliency(asked)
    options = {"method": "ulb-sapr", "adapter": False, "penalty": 0.1, "epochs": 1}
    plan(db_llm(scores, tmp_path / "q", samples, **options))
    for source, more in ((scores, {}), (tiny_llama, {"saliency": str(scores)})):
        with pytest.raises(InputError, match="are of weights that were not rotated") as refused:
            plan(db_llm(source, tmp_path / "q", samples, rotate=True, **options, **more))
        assert "`saliency`" in refused.value.hint


def test_a_family_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    dense = save_tiny("gemma2", tmp_path / "dense")
    with pytest.raises(InputError, match="'gemma2' are not known to let a rotation through exactly"):
        quantize(request(dense, tmp_path / "q", method="rtn", group_size=32, rotate=True))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_dense_conversion_is_a_plain_model(tmp_path: Path) -> None:
    dense = save_tiny("qwen2", tmp_path / "dense", tied=True)
    packed, _ = quantize(request(dense, tmp_path / "q", method="rtn", group_size=32, rotate=True))
    path, _ = convert(ConvertRequest(source=str(packed), dtype="fp32", out=tmp_path / "plain"))
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(packed), atol=1e-5, rtol=1e-5)
    # A rotated model is a model: it may be rotated again.
    again, _ = quantize(request(path, tmp_path / "q2", method="rtn", bits=8, group_size=32, rotate=True, seed=1))
    torch.testing.assert_close(logits(again), logits(packed), atol=0.1, rtol=0.1)
    assert isinstance(read_manifest(again), QuantizedManifest)

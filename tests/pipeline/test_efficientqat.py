"""Whole runs of ``efficientqat`` on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import save_tiny
from tests.pipeline.runs import StopAt, logits, request, shards, simulated_logits
from ulbq.artifacts.whole import verify
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UsageError
from ulbq.formats import affine
from ulbq.formats.affine import AffineScheme
from ulbq.pipeline.quantize import plan, quantize

SCHEME = AffineScheme(bits=2, group_size=32)
LAYER = "model.layers.0.mlp.up_proj"


def asked(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    size = {"samples": 8, "sequence_length": 32, "precision": "fp32", "group_size": 32, "epochs": 2, "batch_size": 2}
    return request(source, out, **{"method": "efficientqat", "calibration": str(samples), **size, **changes})


def unpacked(path: Path, layer: str = LAYER) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros of a layer of the first block."""
    tensors = load_file(path / "model-block-00000.safetensors")
    own = {name.removeprefix(f"{layer}."): value for name, value in tensors.items() if name.startswith(f"{layer}.")}
    columns = 64
    return affine.unpack(SCHEME, own, columns)


@pytest.mark.parametrize("train", ["clipping", "grid", "rounding", "weights", "all"])
@pytest.mark.parametrize("start", ["min-max", "search", "gptq"])
def test_a_block_learns_from_every_start(
    start: str,
    train: str,
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    path, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, start=start, train=train))
    verify(path)
    torch.testing.assert_close(logits(path), simulated_logits(tiny_llama, path), atol=1e-5, rtol=1e-5)
    first = manifest.blocks[0]
    # Errors made good leave little to learn for a few steps on random weights.
    assert first.end_error < first.start_error * (1 if start == "gptq" else 0.995)
    assert manifest.bits.bits_per_weight == pytest.approx(2 + (16 + 2) / 32)


def test_what_does_not_train_stays(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    made = {
        train: unpacked(quantize(asked(tiny_llama, tmp_path / train, samples, train=train))[0])
        for train in ("weights", "all", "grid")
    }
    codes, scales, zeros = unpacked(quantize(asked(tiny_llama, tmp_path / "start", samples, epochs=0))[0])
    assert torch.equal(made["weights"][1], scales)
    assert torch.equal(made["weights"][2], zeros)
    assert not torch.equal(made["weights"][0], codes)
    assert not torch.equal(made["all"][1], scales)
    assert not torch.equal(made["grid"][1], scales)


def test_a_start_from_gptq_is_gptq(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    untrained, _ = quantize(asked(tiny_llama, tmp_path / "q", samples, start="gptq", epochs=0))
    size = {"method": "gptq", "start": None, "epochs": None, "batch_size": None, "bits": 2}
    solved, _ = quantize(asked(tiny_llama, tmp_path / "g", samples, **size))
    assert shards(untrained) == shards(solved)


def test_every_option_reaches_the_weights(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    variants: dict[str, dict[str, Any]] = {
        "all": {},
        "three": {"bits": 3},
        "symmetric": {"symmetric": True},
        "clipping": {"train": "clipping"},
        "grid": {"train": "grid"},
        "rounding": {"train": "rounding", "weight_lr": 0.1},
        "weights": {"train": "weights"},
        "min-max": {"start": "min-max"},
        "gptq": {"start": "gptq"},
        "sign": {"optimizer": "sign"},
        "unit": {"lr_unit": "weight", "weight_lr": 2e-3, "scale_lr": 1e-3},
    }
    made = {}
    for name, changes in variants.items():
        folder, _ = quantize(asked(dense, tmp_path / name, samples, **changes))
        made[name] = (folder / "model-block-00000.safetensors").read_bytes()
    assert len(set(made.values())) == len(variants)


def test_a_micro_batch_is_a_matter_of_memory_alone(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    whole, parted = (
        quantize(asked(tiny_llama, tmp_path / str(micro), samples, batch_size=4, micro_batch=micro))[0]
        for micro in (None, 1)
    )
    torch.testing.assert_close(unpacked(parted)[1], unpacked(whole)[1], rtol=1e-2, atol=0)
    assert (unpacked(parted)[0] != unpacked(whole)[0]).float().mean() < 0.01


def test_blocks_first_then_all_scales(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    path, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, end_to_end="ce", end_to_end_epochs=2))
    before, _ = quantize(asked(tiny_llama, tmp_path / "b", samples))
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.end_error < manifest.end_to_end.start_error
    assert torch.equal(unpacked(path)[0], unpacked(before)[0])
    assert torch.equal(unpacked(path)[2], unpacked(before)[2])
    assert not torch.equal(unpacked(path)[1], unpacked(before)[1])


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    straight, _ = quantize(asked(tiny_llama, tmp_path / "straight", samples, start="gptq"))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked(tiny_llama, out, samples, start="gptq"), StopAt(out, 1))
    resumed, _ = quantize(asked(tiny_llama, out, samples, start="gptq"))
    assert shards(resumed) == shards(straight)


def test_an_artifact_has_its_start_already(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    start, before = quantize(asked(tiny_llama, tmp_path / "start", samples))
    with pytest.raises(UsageError, match="`start` means nothing to an artifact"):
        plan(asked(start, tmp_path / "q", samples, start="gptq"))
    _, after = quantize(asked(start, tmp_path / "q", samples))
    assert after.blocks[0].start_error == pytest.approx(before.blocks[0].end_error, rel=1e-3)
    assert after.blocks[0].end_error <= after.blocks[0].start_error

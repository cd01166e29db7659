"""What others quantized, and what we export, is evaluated, generated from and converted; only floats are parents."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.evaluation.sample import write_mirror
from tests.models.foreign.packing import awq, gptq, save_packed, say
from tests.models.foreign.test_floats import LAYOUTS
from tests.models.tiny import save_tiny
from tests.told import Ulbq
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.errors import InputError
from ulbq.evaluation.evaluated import open_candidates
from ulbq.evaluation.table import describe
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantization_plan import plan
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.saliency_plan import prepare
from ulbq.progress import Silent

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
PACKED = ("gptq", "compressed-tensors", "auto-round", "mlx", "gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model ``base``, its artifact ``q`` in 2 bits and what that is for others; strangers' ``theirs`` and ``awq``."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "base", tied=False, hidden_size=128, intermediate_size=256)
    asked = {"method": "rtn", "bits": 2, "group_size": 64, "symmetric": True, "device": "cpu"}
    quantize(QuantizeRequest(source=str(folder / "base"), out=folder / "q", **asked))
    for to in PACKED:
        convert(ConvertRequest(source=str(folder / "q"), to=to, out=folder / to))
    save_packed(folder / "theirs", GPTQ, partial(gptq, order=True))
    save_packed(folder / "awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq)
    write_mirror(folder / "mirror")
    return folder


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(resolve(path), dtype=torch.float32)(TOKENS).logits
    return found


@pytest.mark.parametrize("to", PACKED)
def test_what_we_export_is_the_artifact_again(to: str, made: Path) -> None:
    assert (logits(made / to) - logits(made / "q")).abs().max() < 1e-4
    one, *_ = open_candidates([str(made / to)])
    assert one.parent is not None
    assert one.parent.source.path == made / "base"
    # 2 bits and a scale of 16 for 64; GPTQ and MLX have zero points, or biases, and GPTQ an index of its inputs.
    expected = {
        "gptq": ("GPTQ w2g64", 2.29),
        "auto-round": ("AutoRound w2g64", 2.29),
        "mlx": ("MLX w2g64", 2.5),
        "gguf": ("GGUF Q2_0", None),
    }
    name, bits = expected.get(to, ("compressed-tensors w2g64", 2.25))
    assert describe(one.subject) == name
    assert one.subject.kind == "converted"
    assert one.subject.bits_per_weight is not None
    assert bits is None or one.subject.bits_per_weight == pytest.approx(bits, abs=0.6)


def test_one_table_of_all(made: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    sources = [made / "q", made / "theirs", made / "awq", made / "gptq", made / "gguf" / "model.gguf"]
    asked = (
        "--perplexity",
        "wikitext2",
        "--context",
        32,
        "--limit",
        2,
        "--device",
        "cpu",
        "--offline",
        "--no-fidelity",
    )
    told = ulbq("eval", "--compare", *sources, *asked, "--data-dir", made / "mirror", "-o", tmp_path / "e")
    assert told.code == 0, told.err
    shown = " ".join((told.out + told.err).split())
    assert all(name in shown for name in ("GPTQ w4g32", "AWQ w4g32", "GPTQ w2g64", "GGUF Q2_0", "rtn w2g64-sym"))
    assert ulbq("inspect", tmp_path / "e", "--verify").code == 0


def test_it_is_generated_from_and_becomes_dense(made: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    told = ulbq("generate", made / "theirs", "-p", "Line 7", "-n", 4, "--device", "cpu", "--offline")
    assert told.code == 0, told.err
    path, _ = convert(ConvertRequest(source=str(made / "theirs"), to="dense", dtype="fp32", out=tmp_path / "d"))
    assert torch.equal(logits(path), logits(made / "theirs"))
    assert not (path / "quantize_config.json").exists()
    with pytest.raises(InputError, match="quantized by another tool"):
        convert(ConvertRequest(source=str(made / "theirs"), to="compressed-tensors", out=tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("theirs", r"quantized already \(GPTQ w4g32\)"),
        ("awq", r"quantized already \(AWQ w4g32\)"),
        ("gptq", r"converted for other engines \(gptq\)"),
        ("gguf", r"converted for other engines \(gguf\)"),
        ("gguf/model.gguf", r"converted for other engines \(gguf\)"),
    ],
)
def test_it_is_nobodys_parent(name: str, message: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        quantize(QuantizeRequest(source=str(made / name), out=tmp_path / "x", method="rtn", device="cpu"))
    with pytest.raises(InputError, match=message):
        prepare(SaliencyRequest(source=str(made / name), kind="magnitude", device="cpu"), Silent())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("layout", ["FP8", "NVFP4", "NVIDIA's NVFP4"])
def test_floats_are_a_parent_like_any_other(layout: str, tmp_path: Path) -> None:
    said, pack, name, _ = LAYOUTS[layout]
    save_packed(tmp_path / "floats", said, pack)
    dense, _ = convert(ConvertRequest(source=str(tmp_path / "floats"), to="dense", dtype="fp32", out=tmp_path / "d"))
    made = []
    for source in (tmp_path / "floats", dense):
        out = tmp_path / f"{source.name}-q"
        asked = QuantizeRequest(source=str(source), out=out, method="rtn", bits=3, group_size=32, device="cpu")
        stored_as = plan(asked).stored_as
        assert (stored_as and stored_as[0]) == (name if source != dense else None)
        made.append(quantize(asked)[0])
    assert torch.equal(*map(logits, made))


def test_a_gguf_file_of_ours_is_known_wherever_it_lies(made: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((made / "gguf" / "model.gguf").read_bytes())
    with pytest.raises(InputError, match=r"quantized already \(GGUF Q2_0, by ulbq\)"):
        quantize(QuantizeRequest(source=str(alone), out=tmp_path / "x", method="rtn", device="cpu"))
    # One in full precision is a model like any other.
    convert(ConvertRequest(source=str(made / "base"), to="gguf", out=tmp_path / "g"))
    resolve(tmp_path / "g").check_parent()


def test_a_layer_that_keeps_its_weight_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.models.foreign.packing import change
    from tests.models.tiny import tiny_tokenizer

    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=256)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    layer = "transformer.h.0.attn.c_proj"
    tensors = {f"{layer}{short}": tensor for short, tensor in gptq(64, 64)[0].items()}
    change(tmp_path, {f"{layer}.weight": None, **tensors})
    say(tmp_path, quantization_config=GPTQ)
    with pytest.raises(InputError, match="the other way round"):
        resolve(tmp_path)

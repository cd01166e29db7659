"""What other tools compute from our conversions, against the artifact: each tool in an environment of its own.

``tests/export/readers/environments.py`` builds them; without one its tests are skipped.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.families import GGUF_FAMILIES, LONGROPE
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.config.adapter import AdapterConfig
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.formats import AffineScheme, TrellisScheme
from ulbq.models.gguf_header import read_header
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize

pytestmark = pytest.mark.slow

READERS = Path(__file__).parent / "readers"
TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]


def environment(name: str) -> Path:
    python = Path(os.environ.get("ULBQ_READERS", "/nowhere")) / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment '{name}' under ULBQ_READERS (tests/export/readers/environments.py builds it)")
    return python


def read(
    name: str, script: str, folder: Path, *last: str, given: torch.Tensor = TOKENS, limit: int = 500
) -> np.ndarray:
    """What a reader computes, logits mostly, in at most so many seconds."""
    inputs, out = folder.parent / "inputs.npy", folder.parent / "read.npy"
    np.save(inputs, given.numpy())
    command = [environment(name), READERS / script, folder, inputs, out, *last]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


@pytest.fixture(params=CASES, ids=lambda case: f"w{case[0]}-{'sym' if case[1] else 'asym'}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray, bool, int]:
    """An artifact with a tied head, its own float32 logits, whether it is symmetric, and its bits."""
    bits, symmetric = request.param
    dense = save_tiny("llama", tmp_path / "dense", tied=True)
    source, _ = quantize(
        QuantizeRequest(
            source=str(dense),
            out=tmp_path / "q",
            method="rtn",
            bits=bits,
            group_size=32,
            symmetric=symmetric,
            device="cpu",
            offline=True,
        )
    )
    with torch.no_grad():
        logits = load_model(resolve(source), dtype=torch.float32)(TOKENS).logits.numpy()
    return source, logits, symmetric, bits


def test_gptqmodel(case: tuple[Path, np.ndarray, bool, int], tmp_path: Path) -> None:
    source, logits, _, _ = case
    environment("gptqmodel")
    path, _ = convert(ConvertRequest(source=str(source), engine="gptqmodel", dtype="fp16", out=tmp_path / "g"))
    np.testing.assert_allclose(read("gptqmodel", "gptqmodel_logits.py", path, "float32"), logits, atol=1e-4)


def test_auto_gptq(case: tuple[Path, np.ndarray, bool, int], tmp_path: Path) -> None:
    source, logits, symmetric, _ = case
    environment("auto-gptq")
    if not symmetric:
        pytest.skip("v1 has no word for zero points of 0, and nothing asymmetric is written so")
    path, _ = convert(ConvertRequest(source=str(source), engine="auto-gptq", dtype="fp16", out=tmp_path / "g"))
    np.testing.assert_allclose(read("auto-gptq", "auto_gptq_logits.py", path, "float32"), logits, atol=1e-4)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors", "auto-round"])
def test_transformers(case: tuple[Path, np.ndarray, bool, int], target: str, tmp_path: Path) -> None:
    source, logits, symmetric, _ = case
    name = "auto-round" if target == "auto-round" else "gptqmodel"
    environment(name)
    if target == "compressed-tensors" and not symmetric:
        pytest.skip("transformers 5.23 loads no packed zero points, which --for transformers knows")
    asked = ConvertRequest(source=str(source), to=target, engine="transformers", dtype="fp16", out=tmp_path / "g")
    dtype = "float32" if target == "compressed-tensors" else "float16"
    found = read(name, "transformers_logits.py", convert(asked)[0], dtype)
    # The kernels of the others are loaded in half precision here, and round as that does.
    np.testing.assert_allclose(found, logits, atol=1e-4 if dtype == "float32" else 2e-2)


def test_llama_cpp(case: tuple[Path, np.ndarray, bool, int], tmp_path: Path) -> None:
    source, logits, _, _ = case
    environment("llama-cpp")
    path, _ = convert(ConvertRequest(source=str(source), engine="llama.cpp", dtype="fp32", out=tmp_path / "g"))
    found = read("llama-cpp", "llama_cpp_logits.py", path, str(logits.shape[-1]))
    ours = torch.from_numpy(logits[:, -1]).log_softmax(-1).numpy()
    # It rounds the inputs of packed layers to eight bits.
    np.testing.assert_allclose(found, ours, atol=0.15)
    assert np.abs(found - ours).mean() < 0.03


@pytest.mark.parametrize("family", [*GGUF_FAMILIES, "phi3-longrope"])
def test_llama_cpp_computes_each_family(family: str, tmp_path: Path) -> None:
    environment("llama-cpp")
    changes = GGUF_FAMILIES.get(family, LONGROPE)
    dense = save_tiny(family.partition("-")[0], tmp_path / "dense", **changes)
    path, _ = convert(ConvertRequest(source=str(dense), to="gguf", dtype="fp32", out=tmp_path / "g"))
    with torch.no_grad():
        logits = load_model(resolve(dense), dtype=torch.float32)(TOKENS).logits[:, -1]
    found = read("llama-cpp", "llama_cpp_logits.py", path, str(logits.shape[-1]))
    # Its cache holds keys and values in half precision.
    np.testing.assert_allclose(found, logits.log_softmax(-1).numpy(), atol=6e-3)


def test_mlx(case: tuple[Path, np.ndarray, bool, int], tmp_path: Path) -> None:
    source, logits, _, _ = case
    environment("mlx")
    path, _ = convert(ConvertRequest(source=str(source), engine="mlx", dtype="fp32", out=tmp_path / "g"))
    np.testing.assert_allclose(read("mlx", "mlx_logits.py", path), logits, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("group_size", [64, -1])
def test_mlx_computes_each_family(family: str, group_size: int, tmp_path: Path) -> None:
    environment("mlx")
    dense = save_tiny(family, tmp_path / "dense", **({"sliding_window": None} if family == "mistral" else {}))
    packed = {"method": "rtn", "bits": 3, "group_size": group_size}
    source, _ = quantize(
        QuantizeRequest(source=str(dense), out=tmp_path / "q", device="cpu", offline=True, allow_partial=True, **packed)
    )
    path, _ = convert(ConvertRequest(source=str(source), to="mlx", dtype="fp32", out=tmp_path / "g"))
    with torch.no_grad():
        logits = load_model(resolve(source), dtype=torch.float32)(TOKENS).logits.numpy()
    np.testing.assert_allclose(read("mlx", "mlx_logits.py", path), logits, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_applies_an_adapter(family: str, tmp_path: Path) -> None:
    environment("llama-cpp")
    dense = resolve(save_tiny(family, tmp_path / "dense"))
    form = AdapterConfig(rank=4, alpha=12)
    source = write_quantized(dense, tmp_path / "q", AffineScheme(bits=3, group_size=32), form)
    path, _ = convert(ConvertRequest(source=str(source), to="gguf", dtype="fp32", out=tmp_path / "g"))
    found = read("llama-cpp", "llama_cpp_logits.py", path, "256")
    with torch.no_grad():
        with_it, without = (
            load_model(resolve(source), dtype=torch.float32, adapter=adapter)(TOKENS).logits[:, -1].log_softmax(-1)
            for adapter in (True, False)
        )
    # It rounds the inputs of packed layers to eight bits.
    np.testing.assert_allclose(found, with_it.numpy(), atol=0.3)
    assert np.abs(found - with_it.numpy()).mean() < 0.1 * (with_it - without).abs().mean()


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q2_0"), (1, "Q1_0")])
def test_llama_cpp_computes_few_bits(bits: int, kind: str, tmp_path: Path) -> None:
    environment("llama-cpp")
    dense = save_tiny("llama", tmp_path / "dense", hidden_size=256, intermediate_size=384, head_dim=64)
    packed = {"method": "rtn", "bits": bits, "group_size": 128, "symmetric": True}
    asked = QuantizeRequest(source=str(dense), out=tmp_path / "q", device="cpu", offline=True, **packed)
    source, _ = quantize(asked)
    path, _ = convert(ConvertRequest(source=str(source), engine="llama.cpp", dtype="fp32", out=tmp_path / "g"))
    header = read_header(path / "model.gguf")
    assert {tensor.kind.name for name, tensor in header.tensors.items() if ".ffn_" in name and "norm" not in name} == {
        kind
    }
    with torch.no_grad():
        ours = load_model(resolve(source), dtype=torch.float32)(TOKENS).logits[:, -1].log_softmax(-1).numpy()
    found = read("llama-cpp", "llama_cpp_logits.py", path, str(ours.shape[-1]))
    # It rounds the inputs of packed layers to eight bits.
    np.testing.assert_allclose(found, ours, atol=0.3)
    assert np.abs(found - ours).mean() < 0.06


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_llama_cpp_computes_k_quants(bits: int, tmp_path: Path) -> None:
    environment("llama-cpp")
    dense = save_tiny("llama", tmp_path / "dense", hidden_size=256, intermediate_size=512, head_dim=64)
    packed = {"method": "rtn", "bits": bits, "k_quant": True}
    source, _ = quantize(QuantizeRequest(source=str(dense), out=tmp_path / "q", device="cpu", offline=True, **packed))
    path, _ = convert(ConvertRequest(source=str(source), engine="llama.cpp", dtype="fp32", out=tmp_path / "g"))
    model = load_model(resolve(source), dtype=torch.float32)

    def as_it_rounds(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        blocks = inputs[0].unflatten(-1, (-1, 256))  # Q8_K: eight bits of the largest of 256
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / step).round() * step).flatten(-2)

    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(as_it_rounds)
    with torch.no_grad():
        ours = model(TOKENS).logits[:, -1].log_softmax(-1).numpy()
    found = read("llama-cpp", "llama_cpp_logits.py", path, str(ours.shape[-1]))
    # Keys and values in float16 round some inputs the other way, and so on through the layers.
    np.testing.assert_allclose(found, ours, atol=0.5)
    assert np.abs(found - ours).mean() < 0.09


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_llama_cpp_computes_packed_experts(family: str, tmp_path: Path) -> None:
    environment("llama-cpp")
    dense = save_tiny(family, tmp_path / "dense", **({"norm_topk_prob": True} if family == "qwen3_moe" else {}))
    packed = QuantizeRequest(
        source=str(dense), out=tmp_path / "q", method="rtn", bits=3, group_size=32, device="cpu", offline=True
    )
    source, _ = quantize(packed)
    path, _ = convert(ConvertRequest(source=str(source), engine="llama.cpp", dtype="fp32", out=tmp_path / "g"))
    with torch.no_grad():
        ours = load_model(resolve(source), dtype=torch.float32)(TOKENS).logits[:, -1].log_softmax(-1).numpy()
    found = read("llama-cpp", "llama_cpp_logits.py", path, str(ours.shape[-1]))
    # It rounds the inputs of packed layers to eight bits.
    np.testing.assert_allclose(found, ours, atol=0.15)
    assert np.abs(found - ours).mean() < 0.03


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_exllamav3_on_a_cpu(bits: int, tmp_path: Path) -> None:
    environment("exllamav3")
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    dense = resolve(save_tiny("llama", tmp_path / "dense", **wide))
    source = write_quantized(dense, tmp_path / "q", TrellisScheme.model_validate({"bits": bits, "state_bits": 16}))
    path, _ = convert(ConvertRequest(source=str(source), engine="exllamav3", out=tmp_path / "e"))
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(bits)).half().float()
    with torch.no_grad():
        ours = load_model(resolve(source), dtype=torch.float32).get_decoder().layers[0].mlp(rows).numpy()
    found = read("exllamav3", "exllamav3_mlp.py", path, given=rows)
    # Its code for CPUs takes 510 · k from a sum of bytes, where its GPU kernels round that to half precision.
    assert np.linalg.norm(found - ours) < 3e-3 * np.linalg.norm(ours)

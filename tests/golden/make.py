"""Writes the golden artifacts anew: ``python -m tests.golden.make FOLDER``, an absolute path that may be published.

They are what ulbq wrote when this file was last run; later versions must read them as they are. So this is run when a
schema changes on purpose, and the artifacts of before move to a folder of their own, where they stay.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.campaign.process import command
from tests.models.tiny import save_tiny
from ulbq.models.load import load_model
from ulbq.models.source import resolve

_TEXT = ("--samples", "4", "--sequence-length", "32", "--calibration", "@text.txt")
_PLAIN = ("--device", "cpu", "--offline", "-q")
_QUANTIZE = ("quantize", "@dense", *_PLAIN, "--method")

COMMANDS: dict[str, tuple[str, ...]] = {
    "affine": (*_QUANTIZE, "gptq", "--bits", "3", "--group-size", "32", *_TEXT),
    "affine-rotated": (*_QUANTIZE, "rtn", "--bits", "2", "--group-size", "32", "--rotate"),
    "dual-binary": (
        *(*_QUANTIZE, "db-llm", "--group-size", "32", "--epochs", "1", *_TEXT),
        *("--end-to-end", "ce", "--end-to-end-data", "self", "--end-to-end-samples", "2"),
    ),
    "codebook": (*_QUANTIZE, "claq", "--target-bits", "3.2", "--outlier-bits", "0.05", *_TEXT),
    "trellis": (*_QUANTIZE, "trellis", "--target-bits", "2.8", "--end-to-end", "ce", *_TEXT),
    "binary-mos": (*_QUANTIZE, "binary-mos", "--epochs", "1", *_TEXT, "--fit-temperature"),
    "adapted": (*_QUANTIZE, "apiq", "--group-size", "32", "--rank", "2", "--epochs", "1", *_TEXT),
    "finetuned": (
        *(
            "finetune",
            "@affine",
            "--task",
            "instructions",
            "--data",
            "@rows.jsonl",
            "--samples",
            "8",
            "--validation-samples",
            "2",
        ),
        *("--sequence-length", "64", "--epochs", "1", "--batch-size", "2", "--rank", "2", *_PLAIN),
    ),
    "tied-scales": (*_QUANTIZE, "db-llm", "--tied-scales", "--group-size", "32", "--epochs", "1", *_TEXT),
    "packed-tables": (
        *_QUANTIZE,
        "rtn",
        "--bits",
        "4",
        "--group-size",
        "32",
        "--embedding-bits",
        "8",
        "--head-bits",
        "6",
    ),
    "k-quant": ("quantize", "@wide", *_PLAIN, "--method", "rtn", "--bits", "3", "--k-quant"),
    "sweep": (
        "sweep",
        "@dense",
        "--method",
        "rtn",
        "--bits",
        "2,3",
        "--set",
        "group_size=32",
        "--device",
        "cpu",
        "--offline",
        "-q",
    ),
    "saliency": ("saliency", "@dense", *_TEXT, *_PLAIN),
    "dense16": ("convert", "@affine", "--to", "dense", "--offline", "-q"),
}
"""By what each is made; ``@name`` stands for what lies beside it."""

SOURCES, SCORES = ("dense", "wide"), ("saliency", "sweep")
"""What they are made of, and those that are no model."""

KEPT = "golden"
TOKENS = torch.arange(24).unsqueeze(0)


def main(folder: Path) -> None:
    """Make all of them in a folder, and what they must compute; ``golden`` in it is what belongs here."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)))
    rows = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny("llama", folder / "dense", tied=False, num_hidden_layers=2)
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 1}
    save_tiny("llama", folder / "wide", num_hidden_layers=1, dtype=torch.bfloat16, **wide)
    logits = {}
    for name, words in COMMANDS.items():
        spelled = [str(folder / word[1:]) if word.startswith("@") else word for word in words]
        told = command([*spelled, "-o", str(folder / name)], folder)
        if told.code != 0:
            raise SystemExit(f"{name}: {told.err}")
        if name not in SCORES:
            with torch.inference_mode():
                model = load_model(resolve(folder / name, offline=True), dtype=torch.float32)
                logits[name] = model(TOKENS).logits[0, -4:].contiguous()
        shutil.copytree(folder / name, folder / KEPT / name)
    for name in SOURCES:
        shutil.copytree(folder / name, folder / KEPT / name)
    save_file(logits, folder / KEPT / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

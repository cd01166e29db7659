"""What the kind and the number of calibration samples bring: settings for ``ulbq sweep``, and chats for them.

    python benchmarks/calibration.py /tmp/kinds --tokens 16 64
    (cd /tmp/kinds && ulbq sweep smollm2-135m --settings settings.yaml -o sweep)
    python benchmarks/swept.py /tmp/kinds/sweep benchmarks/results/swept-calibration-cpu.json

Kinds are WikiText-2 (``train``), samples that the model writes itself, and chats: questions and answers of GSM8K
(``train``) in the model's template. A setting is two bits by one method from so many thousand tokens (1,024) of one
kind, in samples of 512. Methods that train do so for two epochs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from ulbq.data.registry import resolve_dataset

METHODS: dict[str, dict[str, Any]] = {"gptq": {}, "trellis": {}, "claq": {}, "efficientqat": {"epochs": 2}}
KINDS = {"wikitext2": "wikitext2", "self": "self", "chat": "chats.jsonl"}
LENGTH = 512


def chats(path: Path) -> None:
    """Write a chat a line."""
    rows = resolve_dataset("openai/gsm8k", "main", "train")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            print(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="thousands of them")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    chats(options.folder / KINDS["chat"])
    settings = [
        {
            "name": f"{method}-{kind}-{thousands}k",
            "method": method,
            "bits": 2,
            "calibration": calibration,
            "samples": 1024 * thousands // LENGTH,
            "sequence_length": LENGTH,
            **own,
        }
        for thousands in options.tokens
        for method, own in METHODS.items()
        for kind, calibration in KINDS.items()
    ]
    (options.folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The command lines of README and docs do what they say, on tiny models in place of the reader's.

What takes hours is planned (``--dry-run``), what reads much reads little.
"""

import io
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.evaluation.sample import write_mirror, write_rows
from tests.models.tiny import save_tiny
from tests.test_docs import PAGES, ROOT, Line, command_lines
from tests.told import Ulbq
from ulbq.models import source

pytestmark = pytest.mark.slow

_LESS = {
    **dict.fromkeys(("quantize", "sweep", "saliency", "finetune"), ("--dry-run",)),
    "eval": ("--limit", "1", "--context", "16", "--dtype", "fp32"),
    "generate": ("--max-new-tokens", "2"),
}
_CHAT = {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "four"}]}
_TEXT = [{"text": f"{n} quick brown foxes jump over {n + 1} lazy dogs. " * 40} for n in range(1000)]
_FILES = {
    "my-texts.jsonl": _TEXT,
    "answers.jsonl": [{"instruction": f"Add {n} and one.", "output": str(n + 1)} for n in range(640)],
    "chats.jsonl": [_CHAT] * 640,
}
_SETS = {
    **dict.fromkeys(("Salesforce/wikitext/wikitext-2-raw-v1/train.jsonl", "allenai/c4/en/train.jsonl"), _TEXT),
    "tatsu-lab/alpaca/train.jsonl": _FILES["answers.jsonl"],
    "DKYoon/SlimPajama-6B/train.jsonl": _TEXT,
    "llm-adapters/math/train.jsonl": _FILES["answers.jsonl"],
    "openai/gsm8k/main/train.jsonl": [{"question": f"{n} + 1?", "answer": f"Add. #### {n + 1}"} for n in range(640)],
}
_SIZES = {"num_key_value_heads": 4, "max_position_embeddings": 4096}
_MADE = {
    "q2": ("--method", "db-llm", "--group-size", "64", "--epochs", "0"),
    "q4": ("--method", "rtn", "--bits", "4"),
    "q": ("--method", "efficientqat", "--bits", "2", "--epochs", "0"),
    "trellis": ("--method", "trellis", "--state-bits", "16"),
}
_CALLED = {"MODEL": "model", "ARTIFACT": "q", "artifact": "q"}


def lines() -> Iterator[Line]:
    """Every line of a block of code, each once."""
    seen = set()
    for page in PAGES:
        for line in command_lines(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")):
            if line.whole and tuple(line.words) not in seen:
                seen.add(tuple(line.words))
                yield line


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, what was made from it, data sets and a reader's own files."""
    from ulbq.commands.app import main

    root = tmp_path_factory.mktemp("world")
    model = save_tiny("llama", root / "model", tied=False, hidden_size=256, intermediate_size=512, **_SIZES)
    write_mirror(root / "data")
    for file, rows in _SETS.items():
        write_rows(root / "data" / file, rows)
    for name, rows in _FILES.items():
        (root / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (root / "settings.yaml").write_text("- {method: gptq, bits: 2}\n- {method: rtn}\n", encoding="utf-8")
    few = ("--calibration", str(root / "my-texts.jsonl"), "--samples", "4", "--sequence-length", "32")
    for name, options in _MADE.items():
        sampled = () if "rtn" in options else few
        assert main(["quantize", str(model), *options, *sampled, "-o", str(root / name), "--quiet"]) == 0
    assert main(["convert", str(root / "trellis"), "--to", "exl3", "-o", str(root / "exl3"), "--quiet"]) == 0
    return root


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{line.where}-{line.words[0]}") for line in lines()])
def test_it_runs(line: Line, world: Path, tmp_path: Path, ulbq: Ulbq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ULBQ_DATA_DIR", str(world / "data"))
    monkeypatch.setattr(source, "default_model", lambda **_: source.resolve(world / "model"))
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(world / "q2", tmp_path / "artifacts" / "q2")
    words = [str(world / "model") if word == "MODEL" else word for word in line.words]
    for before, word in pairwise(words):
        name = word.strip("./")
        made = world / _CALLED.get(name, name)
        if before not in ("-o", "--output") and not Path(word).is_absolute() and made.exists() and name:
            (shutil.copytree if made.is_dir() else shutil.copy)(made, tmp_path / name)
    if words[-2:] == ["--prompt", "-"]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once upon a time")))
    listed = any(word.startswith("--list-") for word in words)
    told = ulbq(*words, *(() if listed else _LESS.get(words[0], ())))
    assert told.code == 0, told.err

"""A tiny model, data and one artifact of every kind; and every command that makes one, as words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.process import command

_SHOWN = ("--device", "cpu", "--offline", "-q")
_PLAIN = ("--offline", "-q")
OUT = "q"


def _nothing(world: Path, out: Path) -> None:
    """Most commands find nothing where they write."""


def _edited(world: Path, out: Path) -> None:
    """An artifact whose chat template was edited."""
    shutil.copytree(world / "affine", out)
    with (out / "chat_template.jinja").open("a") as file:
        file.write("{# edited #}")


def _standing(world: Path, out: Path) -> None:
    """An artifact of other settings."""
    shutil.copytree(world / "affine", out)


@dataclass(frozen=True)
class Command:
    """A command that changes files.

    Attributes:
        words: before ``-o``; ``@name`` stands for what lies in the world under that name.
        in_place: whether it changes what ``prepare`` put there, and is given that as its source.
        prepare: what lies at its output already.
    """

    words: tuple[str, ...]
    in_place: bool = False
    prepare: Callable[[Path, Path], None] = _nothing

    def spelled(self, world: Path, out: Path) -> list[str]:
        """The words of one run."""
        words = [str(world / word[1:]) if word.startswith("@") else word for word in self.words]
        return [words[0], str(out), *words[1:]] if self.in_place else [*words, "-o", str(out)]


_DRAWN = ("--samples", "2", "--sequence-length", "16", "--calibration")
_TEXT = (*_DRAWN, "@text.txt")
_QUANTIZE = ("quantize", "@dense", "--group-size", "32", *_SHOWN, "--method")
_TUNE = ("finetune", "@affine", *_SHOWN, "--task")

COMMANDS = {
    "saliency": Command(("saliency", "@dense", *_TEXT, *_SHOWN)),
    "quantize rtn": Command((*_QUANTIZE, "rtn", "--bits", "3")),
    "quantize rtn --force": Command((*_QUANTIZE, "rtn", "--bits", "2", "--force"), prepare=_standing),
    "quantize gptq": Command((*_QUANTIZE, "gptq", "--bits", "2", *_TEXT)),
    "quantize db-llm, end to end": Command(
        (*_QUANTIZE, "db-llm", "--epochs", "1", *_TEXT, "--end-to-end", "ce", "--end-to-end-data", "self",
         "--end-to-end-samples", "2")
    ),
    "quantize claq": Command(("quantize", "@dense", *_SHOWN, "--method", "claq", "--target-bits", "3.2", *_TEXT)),
    "quantize trellis": Command(("quantize", "@dense", *_SHOWN, "--method", "trellis", "--target-bits", "2.8", *_TEXT)),
    "quantize trellis, epochs": Command(
        ("quantize", "@dense", *_SHOWN, "--method", "trellis", "--epochs", "1", *_TEXT, "--end-to-end", "ce",
         "--end-to-end-data", "self", "--end-to-end-samples", "2")
    ),
    "quantize binary-mos": Command(
        ("quantize", "@dense", *_SHOWN, "--method", "binary-mos", "--epochs", "1", *_TEXT, "--fit-temperature")
    ),
    "quantize apiq, self, end to end": Command(
        (*_QUANTIZE, "apiq", "--rank", "2", "--epochs", "1", "--end-to-end", "kl", "--teacher", "cached", *_DRAWN,
         "self")
    ),
    "finetune instructions": Command(
        (*_TUNE, "instructions", "--data", "@rows.jsonl", "--samples", "4", "--validation-samples", "2",
         "--sequence-length", "64", "--epochs", "1", "--batch-size", "2", "--rank", "2", "--save-every", "1")
    ),
    "finetune end-to-end": Command(
        (*_TUNE, "end-to-end", "--data", "@text.txt", "--samples", "2", "--sequence-length", "16", "--epochs", "2")
    ),
    "convert dense": Command(("convert", "@affine", "--to", "dense", *_PLAIN)),
    "convert gptq": Command(("convert", "@affine", "--to", "gptq", *_PLAIN)),
    "convert compressed-tensors": Command(("convert", "@affine", "--to", "compressed-tensors", *_PLAIN)),
    "convert auto-round": Command(("convert", "@affine", "--to", "auto-round", *_PLAIN)),
    "convert gguf": Command(("convert", "@affine", "--to", "gguf", *_PLAIN)),
    "convert gguf, adapter": Command(("convert", "@adapted", "--to", "gguf", *_PLAIN)),
    "convert mlx": Command(("convert", "@affine", "--to", "mlx", *_PLAIN)),
    "convert half": Command(("convert", "@affine", "--to", "half", *_PLAIN)),
    "eval": Command(
        ("eval", "@affine", "--perplexity", "wikitext2", "--fidelity", "--context", "32", "--limit", "2", "--data-dir",
         "@mirror", *_SHOWN)
    ),
    "sweep": Command(
        ("sweep", "@dense", "--method", "rtn,gptq", "--bits", "3", "--set", "group_size=32", *_TEXT, "--context", "32",
         "--limit", "2", "--data-dir", "@mirror", *_SHOWN)
    ),
    "inspect --reseal": Command(("inspect", "--reseal", "-q"), in_place=True, prepare=_edited),
}  # fmt: skip

READERS = {
    "generate": ("generate", "@affine", "-p", "Line 7", "-n", "4", "--device", "cpu", "--offline"),
    "inspect": ("inspect", "@affine", "--verify"),
}
"""Commands that change no file."""

ARTIFACTS = {
    "affine": "quantize rtn",
    "dual_binary": "quantize db-llm, end to end",
    "codebook": "quantize claq",
    "trellis": "quantize trellis",
    "binary_mos": "quantize binary-mos",
    "adapted": "quantize apiq, self, end to end",
    "saliency": "saliency",
    "finetuned": "finetune instructions",
    "dense16": "convert dense",
    "gptq": "convert gptq",
    "compressed": "convert compressed-tensors",
    "gguf": "convert gguf",
    "lora": "convert gguf, adapter",
    "mlx": "convert mlx",
    "half": "convert half",
    "evaluation": "eval",
    "sweep": "sweep",
}
"""What lies in the world, by the command that makes it."""


def build(folder: str, world: str) -> None:
    """Fill an empty folder."""
    from tests.evaluation.sample import write_mirror
    from tests.models.tiny import save_tiny

    place = Path(world)
    (place / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)))
    rows = [{"instruction": f"say {i}", "output": f"it is {i * i}"} for i in range(16)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_mirror(place / "mirror")
    save_tiny("llama", place / "dense", tied=False, num_hidden_layers=2)
    for name, made_by in ARTIFACTS.items():
        told = command(COMMANDS[made_by].spelled(place, place / name), place)
        if told.code != 0:
            raise RuntimeError(f"{made_by}: {told.err}")

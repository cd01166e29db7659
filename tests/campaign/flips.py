"""One bit that is another: in files of finished artifacts, which are read, and of unfinished runs, which go on."""

import json
import re
import shutil
import signal
from functools import cache
from pathlib import Path

from tests.campaign.kills import TEMPORARY
from tests.campaign.outcome import clear, content, done, hashes, modest, no_litter, reference, refused
from tests.campaign.process import KILL, Fault, Told, command
from tests.campaign.world import COMMANDS, OUT

FOR_PEOPLE = frozenset({"README.md", "report.html", "finetune.html", "saliency.html", "samples.jsonl", "table.csv"})
"""Read by people alone."""

_SAID = ("--device", "cpu", "--offline", "-q")
_TEXT = ("--samples", "2", "--sequence-length", "16", "--calibration", "@text.txt")
_TUNED = (
    "--data",
    "@rows.jsonl",
    "--samples",
    "2",
    "--validation-samples",
    "1",
    "--sequence-length",
    "64",
    "--epochs",
    "1",
)
_SCORED = ("--perplexity", "wikitext2", "--context", "32", "--limit", "2", "--data-dir", "@mirror", *_SAID)

READERS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "@it", "--verify", "-q"),
    "generate": ("generate", "@it", "-p", "Line 7", "-n", "4", *_SAID),
    "generate gguf": ("generate", "@it/model.gguf", "-p", "Line 7", "-n", "4", *_SAID),
    "eval": ("eval", "@it", *_SCORED, "-o", "@out"),
    "eval gguf": ("eval", "@it/model.gguf", "--no-fidelity", *_SCORED, "-o", "@out"),
    "eval --compare": ("eval", "--compare", "@it", "@evaluation", "-q", "-o", "@out"),
    "convert": ("convert", "@it", "--to", "dense", "--offline", "-q", "-o", "@out"),
    "convert half": ("convert", "@it", "--to", "half", "--offline", "-q", "-o", "@out"),
    "quantize": ("quantize", "@it", "--method", "rtn", *_SAID, "-o", "@out"),
    "quantize on": (
        *("quantize", "@it", "--method", "db-llm", "--group-size", "32", "--epochs", "1"),
        *(*_TEXT, *_SAID, "-o", "@out"),
    ),
    "quantize by saliency": (
        *("quantize", "@dense", "--method", "ulb-sapr", "--saliency", "@it", "--epochs", "1", "--rank", "2"),
        *(*_TEXT, *_SAID, "-o", "@out"),
    ),
    "finetune": ("finetune", "@it", "--task", "instructions", *_TUNED, "--rank", "2", *_SAID, "-o", "@out"),
}  # fmt: skip
"""Commands that read an artifact; ``@it`` is that, ``@out`` what they write."""

KINDS: dict[str, tuple[str, ...]] = {
    "affine": ("inspect", "generate", "convert", "eval", "finetune"),
    "dual_binary": ("inspect", "generate", "quantize on", "convert half"),
    "codebook": ("inspect", "generate", "convert"),
    "trellis": ("inspect", "generate", "convert"),
    "binary_mos": ("inspect", "generate", "convert half"),
    "adapted": ("inspect", "generate", "convert"),
    "finetuned": ("inspect", "generate"),
    "saliency": ("inspect", "quantize by saliency"),
    "dense16": ("inspect", "generate", "quantize"),
    "gptq": ("inspect",),
    "compressed": ("inspect",),
    "gguf": ("inspect", "generate gguf", "eval gguf"),
    "lora": ("inspect",),
    "mlx": ("inspect", "generate"),
    "half": ("inspect", "generate"),
    "evaluation": ("inspect", "eval --compare"),
    "sweep": ("inspect",),
}
"""Artifacts of the world, and who reads them."""

# How fast it was, when, and where.
_TIMES = re.compile(r'"(seconds|created|digest|tokens_per_second|path|given|versions?|phases)"')


def files(folder: str, world: str, kind: str) -> list[tuple[str, int]]:
    """Scenario: names and sizes of an artifact's files."""
    path = Path(world) / kind
    return [(name, (path / name).stat().st_size) for name in hashes(path)]


def read(folder: str, world: str, kind: str, file: str, bit: int) -> dict[str, str]:
    """Scenario: flip one bit of a file, and have every reader of its artifact run.

    Returns:
        By reader: "refused", "the same" for a result that is equal to the bit, "for people" for a file that has no
        part in it.
    """
    place = Path(folder) / "place"
    found = {}
    for reader in KINDS[kind]:
        good = _good(folder, world, kind, reader)
        clear(place)
        shutil.copytree(Path(world) / kind, place / "it")
        flip(place / "it" / file, bit)
        told = _run(place, Path(world), reader)
        modest(told)
        try:
            found[reader] = _judged(told, file, reader, good, _result(place, told))
        except AssertionError as error:
            raise AssertionError(f"{reader}: {error}") from error
    return found


def _judged(told: Told, file: str, reader: str, good: str, result: str) -> str:
    if told.code != 0:
        refused(told, 3)
        return "refused"
    done(told)
    if reader == "inspect":
        raise AssertionError("--verify finds nothing")
    if result == good:
        return "for people" if file in FOR_PEOPLE else "the same"
    raise AssertionError(f"another result, and no word: {result[:300]} for {good[:300]}")


@cache
def _good(folder: str, world: str, kind: str, reader: str) -> str:
    place = Path(folder) / "place"
    clear(place)
    shutil.copytree(Path(world) / kind, place / "it")
    told = _run(place, Path(world), reader)
    done(told)
    return _result(place, told)


def _run(place: Path, world: Path, reader: str) -> Told:
    words = []
    for word in READERS[reader]:
        if word.startswith("@it"):
            words.append(f"{place / 'it'}{word[3:]}")
        elif word == "@out":
            words.append(str(place / "out"))
        else:
            words.append(str(world / word[1:]) if word.startswith("@") else word)
    return command(words, place)


def _result(place: Path, told: Told) -> str:
    """All that a command gave, but for times."""
    out = place / "out"
    scores = ""
    if (out / "results.json").exists():
        lines = (out / "results.json").read_text().splitlines()
        scores = "\n".join(line for line in lines if not _TIMES.search(line))
    return json.dumps([told.out, content(out), scores], sort_keys=True)


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    # What tells times is a few bytes longer or shorter in another run.
    data[min(bit // 8, len(data) - 1)] ^= 1 << bit % 8
    # A fine-tuned artifact shares its packed files with the one that it was made from, which stays as it is here.
    path.unlink()
    path.write_bytes(data)


def left_at(folder: str, name: str, world: str, at: int) -> list[tuple[str, int]]:
    """Scenario: names and sizes of the files that a run leaves which is killed at a call.

    Files that safetensors has not finished are none of them: each run names them anew, and the next throws them away.
    """
    place = Path(folder) / "place"
    _leave(place, name, Path(world), at)
    path = place / f"{OUT}.partial"
    return [(file, (path / file).stat().st_size) for file in hashes(path) if not TEMPORARY.search(file)]


def go_on(folder: str, name: str, world: str, at: int, file: str, bit: int) -> str:
    """Scenario: a run that is killed at a call, one bit of what it left flipped, and the same command again.

    Returns:
        "refused", or "the same" for an artifact that is what it would have been.
    """
    place = Path(folder) / "place"
    known = reference(name, world, str(place))
    words = _leave(place, name, Path(world), at)
    flip(place / f"{OUT}.partial" / file, bit)
    before = hashes(place / f"{OUT}.partial")
    told = command(words, place)
    if told.code == 0:
        done(told)
        assert content(place / OUT) == known.made, "another result, and no word"
        no_litter(place)
        return "the same"
    refused(told, 3)
    assert not (place / OUT).exists()
    # Whoever reads the sentence can still look at the run, and discard it.
    after = hashes(place / f"{OUT}.partial")
    recorded = {name for name in before if not name.split("/")[-1].startswith(".tmp")}
    assert recorded <= after.keys() | {".lock"}, f"lost: {sorted(recorded - after.keys())}"
    done(command([*words, "--force"], place))
    assert content(place / OUT) == known.made, "another result after --force"
    no_litter(place)
    return "refused"


def _leave(place: Path, name: str, world: Path, at: int) -> list[str]:
    asked = COMMANDS[name]
    words = asked.spelled(world, place / OUT)
    clear(place)
    asked.prepare(world, place / OUT)
    told = command(words, place, Fault(KILL, at))
    assert told.code == -signal.SIGKILL, told.err
    return words

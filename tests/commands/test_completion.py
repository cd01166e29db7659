"""The completion scripts: as the generator writes them, and at work in the shells that are installed."""

import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from ulbq.commands import completion
from ulbq.commands.app import app
from ulbq.commands.options import Quiet, Source
from ulbq.commands.sections import SectionedCommand

ROOT = Path(__file__).resolve().parents[2]


def _shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("name", completion.SCRIPTS)
def test_scripts_are_what_the_generator_writes(name):
    written = (ROOT / "completions" / name).read_text(encoding="utf-8")
    assert written == completion.SCRIPTS[name](app), "run 'make completions'"


def _sample() -> typer.Typer:
    """An app with every kind of parameter, so that these tests do not move with the commands' own options."""
    sample = typer.Typer(rich_markup_mode=None, add_completion=False)

    @sample.callback()
    def group(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None: ...

    @sample.command(cls=SectionedCommand)
    def quantize(
        source: Source = None,
        out: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder.")] = None,
        method: Annotated[Literal["rtn", "db-llm"], typer.Option("--method", help="Recipe.")] = "rtn",
        text: Annotated[
            str, typer.Option("--text", metavar="NAME|FILE", help="Text.", autocompletion=lambda: ["wikitext2", "self"])
        ] = "self",
        sets: Annotated[
            str | None, typer.Option("--sets", metavar="NAME,…", autocompletion=lambda: ["wikitext2", "c4", "ptb"])
        ] = None,
        train: Annotated[bool, typer.Option("--train/--freeze", help="It's [trained]: yes.")] = True,
        device: Annotated[
            str, typer.Option("--device", metavar="NAME", autocompletion=lambda: ["auto", "cpu", "cuda"])
        ] = "auto",
        data_dir: Annotated[str | None, typer.Option("--data-dir", metavar="DIR", help="Folder of data sets.")] = None,
        seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed.")] = 0,
        quiet: Quiet = False,
    ) -> None:
        """Make it small. And more words."""

    @sample.command()
    def inspect() -> None:
        """Look at it."""

    @sample.command("eval")
    def evaluate(sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE")] = None) -> None:
        """Measure them."""

    @sample.command(hidden=True)
    def secret() -> None:
        """Not shown."""

    return sample


CASES = [
    ("", {"quantize", "inspect", "eval"}),
    ("qu", {"quantize"}),
    ("--v", {"--version"}),
    ("quantize --t", {"--text", "--train"}),
    ("quantize --method ", {"rtn", "db-llm"}),
    ("quantize --method=d", {"db-llm"}),
    ("quantize --device c", {"cpu", "cuda"}),
    ("quantize --text w", {"wikitext2", "weights", "words.txt"}),
    ("quantize --sets w", {"wikitext2"}),
    ("quantize --sets c4,", {"c4,wikitext2", "c4,c4", "c4,ptb"}),
    ("quantize --sets c4,p", {"c4,ptb"}),
    ("eval weights w", {"weights", "words.txt"}),
    ("quantize --output ", {"weights"}),
    ("quantize -o w", {"weights"}),
    ("quantize --seed ", set()),
    ("quantize --quiet ", {"weights", "words.txt", "other.gguf"}),
    ("quantize w", {"weights", "words.txt"}),
    ("inspect ", set()),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two files and a folder in it."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "words.txt").touch()
    (tmp_path / "other.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _bash(script: Path, typed: str) -> set[str]:
    program = f"""
source {script}
COMP_WORDBREAKS=$' \\t\\n=:'
COMP_WORDS=("$@")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_ulbq
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    # bash hands over '=' as a word of its own
    words = ["ulbq", *typed.replace("=", " = ").split(" ")]
    shell = [_shell("bash"), "--norc", "-c", program, "bash", *words]
    return set(subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split())


def _fish(script: Path, typed: str) -> set[str]:
    program = f"source {script}; complete --do-complete 'ulbq {typed}'"
    shell = [_shell("fish"), "--no-config", "-c", program]
    lines = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        line.partition("\t")[0].rstrip("/").partition("=")[2] or line.partition("\t")[0].rstrip("/") for line in lines
    }


@pytest.mark.parametrize(("typed", "offered"), CASES)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completions_at_work(folder, shell, typed, offered):
    name, ask = {"bash": ("ulbq.bash", _bash), "fish": ("ulbq.fish", _fish)}[shell]
    script = folder.parent / f"{folder.name}-{name}"
    script.write_text(completion.SCRIPTS[name](_sample()))
    assert ask(script, typed) == offered


def test_zsh_reads_its_script(tmp_path):
    shell = _shell("zsh")
    script = tmp_path / "_ulbq"
    script.write_text(completion.zsh(_sample()))
    subprocess.run([shell, "-n", str(script)], check=True)


def test_write_puts_every_script_into_the_folder(tmp_path):
    completion.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(completion.SCRIPTS)

"""Shell completion: what the program answers, and the scripts at work in the shells that are installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.completion_app import app as sample
from ulbq.commands import completion
from ulbq.commands.app import app
from ulbq.pipeline.recipes import names as recipe_names

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "completions"

CASES = [
    ("", {"quantize", "inspect", "eval"}),
    ("qu", {"quantize"}),
    ("--v", {"--version"}),
    ("--version ", {"quantize", "inspect", "eval"}),
    ("quantize --t", {"--text", "--train"}),
    ("quantize --fr", {"--freeze"}),
    ("quantize --method ", {"rtn", "db-llm"}),
    ("quantize --method=d", {"db-llm"}),
    ("quantize --method=", {"rtn", "db-llm"}),
    ("quantize --device c", {"cpu", "cuda"}),
    ("quantize --text w", {"wikitext2", ":files"}),
    ("quantize --sets w", {"wikitext2", ":list"}),
    ("quantize --sets c4,", {"c4,wikitext2", "c4,c4", "c4,ptb", ":list"}),
    ("quantize --sets c4,p", {"c4,ptb", ":list"}),
    ("eval weights w", {":files"}),
    ("quantize --output ", {":folders"}),
    ("quantize -o w", {":folders"}),
    ("quantize --seed ", set()),
    ("quantize --seed x --method d", {"db-llm"}),
    ("quantize --quiet ", {":files"}),
    ("inspect ", set()),
]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Ask an app in this process; returns the lines of its answer."""

    def ask(app, typed, *, marks=True):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("_ULBQ_COMPLETE", "complete_fish")
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"ulbq {typed}")
        if marks:
            monkeypatch.setenv("_ULBQ_MARKS", "1")
        with pytest.raises(SystemExit):
            completion.answer(app)
        return capsys.readouterr().out.strip("\n").split("\n")

    return ask


@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_what_may_stand_at_the_cursor(answers, typed, offered):
    assert {line.partition("\t")[0] for line in answers(sample, typed)} == offered | ({""} if not offered else set())


def test_a_description_is_one_sentence_on_one_line(answers):
    told = "It's [trained], " + "and " * 30 + "more: yes"
    assert answers(sample, "quantize --tr") == [f"--train\t{told}"]
    assert answers(sample, "quantize --fr") == [f"--freeze\tNot: {told}"]
    assert answers(sample, "qu") == ["quantize\tMake it small"]


def test_scripts_that_typer_installs_get_no_marks(answers):
    assert answers(sample, "quantize --text w", marks=False) == ["wikitext2"]
    assert answers(sample, "quantize --sets c4,p", marks=False) == ["c4,ptb"]
    assert answers(sample, "quantize -o ", marks=False) == [""]  # nothing, upon which a shell offers its files


def test_the_commands_own_values(answers):
    assert answers(app, "quantize --recipe ") == [*recipe_names(), ":files"]
    assert "gsm8k" in answers(app, "finetune --task ")
    assert "piqa,arc_easy" in answers(app, "eval --tasks piqa,")
    assert answers(app, "convert q --to gp") == ["gptq"]
    assert answers(app, "inspect ") == [":files"]


@pytest.mark.parametrize("typed", ["", "quantize --", "quantize --recipe ", "eval --tasks ", "finetune --task "])
def test_a_tab_imports_nothing_heavy(typed):
    program = (
        "import atexit, sys; from ulbq.commands.start import main; "
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)); main()"
    )
    asked = {"_ULBQ_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(["ulbq", *typed.split(" ")])}
    asked["COMP_CWORD"] = str(asked["COMP_WORDS"].count("\n"))
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()
    assert not {"torch", "transformers", "datasets", "lm_eval", "numpy", "rich"} & set(done.stderr.split())


def test_a_shell_is_set_up(tmp_path):
    program = "import sys; from ulbq.commands.start import main; sys.exit(main())"
    asked = ["bash", "--norc", "-c", '"$0" -c "$1" --install-completion; exit $?', sys.executable, program]
    done = subprocess.run(asked, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert "bash completion installed" in done.stdout
    assert "_ULBQ_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "ulbq.sh").read_text()
    assert "ulbq.sh" in (tmp_path / ".bashrc").read_text()


SHELL_CASES = [
    ("qu", {"quantize"}),
    ("quantize --t", {"--text", "--train"}),
    ("quantize --method=d", {"db-llm"}),
    ("quantize --text w", {"wikitext2", "weights", "words.txt"}),
    ("quantize --text=w", {"wikitext2", "weights", "words.txt"}),
    ("quantize --sets c4,p", {"c4,ptb"}),
    ("eval weights w", {"weights", "words.txt"}),
    ("quantize -o ", {"weights"}),
    ("quantize ~/we", {"weights"}),
    ("quantize --seed ", set()),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current and the home folder, with two files and a folder in it, and the sample as ``ulbq``."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    (home / "weights").mkdir(parents=True)
    (home / "words.txt").touch()
    (home / "other.gguf").touch()
    programs.mkdir()
    (programs / "ulbq").write_text(
        f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m tests.commands.completion_app\n'
    )
    (programs / "ulbq").chmod(0o755)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return home


def _bash(shell: str, typed: str, folder: Path) -> str:
    program = f"""
source '{SCRIPTS / "ulbq.bash"}'
[[ $(complete -p ulbq) == 'complete -F _ulbq ulbq' ]] || exit 1
COMP_WORDBREAKS=$' \\t\\n=:'
COMP_WORDS=("$@")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_ulbq ulbq
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    # bash hands over '=' as a word of its own
    words = ["ulbq", *typed.replace("=", " = ").split(" ")]
    return _output([shell, "--norc", "-c", program, "bash", *words])


def _zsh(shell: str, typed: str, folder: Path) -> str:
    found = folder.parent / "found"
    found.touch()
    # A second zsh in a terminal of its own, in which the key is pressed; what it would show is noted.
    note = (
        'compadd() { [[ " $* " == *" -"[OAD]" "* ]] || '
        '{ local -a fit; builtin compadd -A fit "$@"; print -rl -- $fit >> $noted }; builtin compadd "$@" }'
    )
    lines = [
        f"PS1='' noted='{found}' fpath=('{SCRIPTS}' $fpath)",
        "autoload -Uz compinit && compinit -u -D",
        note,
        'leave() { print "<END>"; exit }; comppostfuncs=(leave); bindkey "^I" complete-word',
        'print "<READ""Y>"',
    ]
    program = "zmodload zsh/zpty; zpty tab $1 -f -i; shift; typed=$1; shift; "
    program += 'for line in "$@"; do zpty -w tab "$line"; done; zpty -r tab line "*<READY>*"; '
    program += 'zpty -w -n tab "$typed"$\'\\t\'; zpty -r tab line "*<END>*"'
    _output([shell, "-f", "-c", program, "zsh", shell, f"ulbq {typed}", *lines])
    return found.read_text()


def _fish(shell: str, typed: str, folder: Path) -> str:
    program = f"source '{SCRIPTS / 'ulbq.fish'}'; complete --do-complete 'ulbq {typed}'"
    lines = [line.partition("\t")[0] for line in _output([shell, "--no-config", "-c", program]).splitlines()]
    behind_equals = typed.rpartition(" ")[2].partition("=")
    start = f"{behind_equals[0]}=" if behind_equals[1] else ""
    assert all(line.startswith(start) for line in lines)
    return "\n".join(line.removeprefix(start) for line in lines)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(("typed", "offered"), SHELL_CASES)
@pytest.mark.parametrize("ask", [_bash, _zsh, _fish], ids=lambda ask: ask.__name__.strip("_"))
def test_scripts_at_work(folder, ask, typed, offered):
    name = ask.__name__.strip("_")
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"{name} is not installed")
    found = ask(shell, typed, folder).split("\n")
    assert {word.rstrip("/").removeprefix("~/") for word in found} - {""} == offered

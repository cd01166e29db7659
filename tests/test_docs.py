"""README and docs/: every link leads somewhere, every command line is one that ulbq takes, and README stays short."""

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer

from ulbq.commands.app import app
from ulbq.errors import UlbqError
from ulbq.pipeline.recipes import names as recipe_names

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 150

_FENCE = re.compile(r"^( *)(```+)(.*?)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_ENVIRONMENT = re.compile(r"[A-Za-z_]\w*=")
_ENDS = frozenset({"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "(", ")"})
_BENCHMARK = re.compile(r"python\s+benchmarks/(\w+)\.py((?:\s+[^\s`|;()]+)*)")
_WANTED = re.compile(r'add_argument\("(--[\w-]+)".*required=True')
_LEFT_OUT = "…"
_WORK = {
    "saliency": ("saliency.saliency", "saliency.plan"),
    "quantize": ("quantize.quantize", "quantize.plan"),
    "sweep": ("sweep.sweep", "sweep.plan"),
    "recommend": ("recommend.recommend",),
    "eval": ("evaluate.evaluate",),
    "generate": ("generate.generate", "converse.converse"),
    "serve": ("serve.serve",),
    "finetune": ("finetune.prepare",),
    "convert": ("convert.convert",),
    "inspect": ("inspect.inspect", "reseal.reseal"),
    "push": ("push.push", "push.plan"),
    "list": ("listing.artifacts",),
    "doctor": ("doctor.checks",),
}
"""What each command calls for its work, in ``ulbq.pipeline``."""


class Line(NamedTuple):
    """A command line as a page shows it: the words after ``ulbq``."""

    where: str
    words: list[str]
    whole: bool
    """From a block of code, so that it must run as it stands; else a few words within a sentence."""

    def __str__(self) -> str:
        return f"{self.where}: ulbq {' '.join(self.words)}"


def prose(text: str) -> str:
    """Markdown without blocks of code; as many lines as before."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in _HEADING.findall(prose(text))]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    broken = []
    for target in _LINK.findall(_CODE.sub("", prose(text))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (page.parent / path).resolve() if path else page
        sound = found.is_file() and found.is_relative_to(ROOT)
        if sound and anchor:
            sound = anchor in anchors(text if found == page else found.read_text(encoding="utf-8"))
        if not sound:
            broken.append(target)
    return broken


def command_lines(name: str, text: str) -> Iterator[Line]:
    """Every command line of a page: in blocks of code, and within sentences and tables."""
    for block in _FENCE.finditer(text):
        if block[3].strip() not in ("", "bash", "sh", "shell", "console"):
            continue
        first = text.count("\n", 0, block.start(4)) + 1
        for number, line in _joined(block[4], first):
            yield from (Line(f"{name}:{number}", words, whole=True) for words in ulbq_words(line))
    for span in _CODE.finditer(prose(text)):
        shown = " ".join(span[2].replace(r"\|", "|").split())
        for words in ulbq_words(shown) if "ulbq " in shown else ():
            number = prose(text).count("\n", 0, span.start()) + 1
            yield Line(f"{name}:{number}", words, whole=False)


def ulbq_words(line: str) -> Iterator[list[str]]:
    """The words after ``ulbq`` of each command of a shell line: behind a prompt, pipes, settings and ``-m``."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quotation mark that is none of the shell's
        return
    commands: list[list[str]] = [[]]
    redirected = False
    for word in words:
        if word in _ENDS:
            redirected = word[-1] in "<>"
            if not redirected:
                commands.append([])
        elif not redirected:
            commands[-1].append(word)
    for command in commands:
        while command and (command[0] == "$" or _ENVIRONMENT.match(command[0])):
            del command[0]
        if command[:1] in (["torchrun"], ["python"]) and "-m" in command:
            del command[: command.index("-m") + 1]
        if command[:1] == ["ulbq"] and len(command) > 1:
            yield command[1:]


def complaint(line: Line, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why ulbq does not take a command line; None where it does. Nothing runs."""
    group: Any = typer.main.get_command(app)
    name, *words = line.words
    if name.startswith("-"):
        taken = group.get_params(typer.Context(group))
        return None if any(name in option.opts for option in taken) else f"no option {name}"
    command = group.commands.get(name)
    if command is None:
        return None if _stands_in(name) and not line.whole else f"no command {name}"
    options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"-h", "--help"}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in options:
            return f"no option {word}"
    if not line.whole:
        words = _without_gaps(words)
    try:
        with group.make_context("ulbq", [], resilient_parsing=True) as outer:
            context = command.make_context(name, words, parent=outer)
        _check_values(name, context, monkeypatch)
    except typer.Exit:  # as --list-recipes ends
        return None
    except (typer.TyperException, UlbqError, ValueError) as error:
        message: str = getattr(error, "message", "") or str(error)
        return None if message.startswith("Missing ") and not line.whole else message
    return None


def _joined(block: str, first: int) -> Iterator[tuple[int, str]]:
    """Lines of a block with their numbers; one that ends in a backslash goes on in the next."""
    begun = ""
    for number, line in enumerate(block.splitlines(), first):
        if line.rstrip().endswith("\\"):
            begun += line.rstrip()[:-1] + " "
            continue
        yield number, begun + line
        begun = ""


def _without_gaps(words: list[str]) -> list[str]:
    """Without what a sentence leaves out: an ellipsis, values like ``RATE``, options at the end without a value."""
    kept: list[str] = []
    for word in words:
        if _stands_in(word) and kept and kept[-1].startswith("-"):
            kept.pop()
        elif word != _LEFT_OUT:
            kept.append(word)
    while kept and kept[-1].startswith("-") and "=" not in kept[-1]:
        kept.pop()
    return kept


def _stands_in(word: str) -> bool:
    """Whether a word is written as one that the reader shall replace."""
    return word.isalpha() and word.isupper()


def _check_values(name: str, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that the parser leaves to the command: it runs up to its work. Raises what the command would raise."""
    given = context.params
    if name == "quantize" and str(given.get("recipe")).endswith(".yaml"):  # a file of the reader's
        return
    from ulbq.config.quantize import check_options

    class Checked(Exception):
        """The request holds together."""

    def check(request: Any, *_: object, **__: object) -> None:
        if name == "quantize":
            check_options(request)
        raise Checked

    command = importlib.import_module(f"ulbq.commands.{name}")
    with monkeypatch.context() as patch:
        patch.setattr(command, "read_source", lambda source, *_, **__: source or "q2", raising=False)
        patch.setattr(command, "check_out", lambda *_, **__: None, raising=False)
        patch.setattr(command, "_read_prompt", lambda: "Once", raising=False)
        for module, _, function in (path.partition(".") for path in _WORK[name]):
            patch.setattr(importlib.import_module(f"ulbq.pipeline.{module}"), function, check)
        with pytest.raises(Checked):
            context.command.callback(**given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_those_that_ulbq_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list(command_lines(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")))
    wrong = [f"{line}: {why}" for line in lines if (why := complaint(line, monkeypatch))]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_of_benchmarks_have_what_these_want(page: Path) -> None:
    wrong = []
    for name, given in _BENCHMARK.findall(page.read_text(encoding="utf-8")):
        wanted = _WANTED.findall((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        # A script alone stands for itself.
        wrong += [f"{name}.py wants {option}" for option in wanted if given and option not in given.split()]
    assert wrong == []


def test_readme_is_short_and_shows_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_README
    assert sum(line.whole for line in command_lines("README.md", text)) >= 10


def test_figures_are_those_of_the_benchmarks() -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "run: python benchmarks/tables.py"


def test_every_page_can_be_reached() -> None:
    """Every page of docs/ stands in README or in the site's navigation; the site's own build checks the latter."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if str(page.relative_to(ROOT / "docs")) not in nav] == []


def test_recipes_that_pages_name_are_shipped() -> None:
    named = {
        (page.name, recipe)
        for page in PAGES
        for recipe in re.findall(r"--recipe ([a-z][\w.-]*\w)", page.read_text(encoding="utf-8"))
    }
    assert named
    assert [one for one in named if one[1] not in recipe_names()] == []


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What the site hooks in."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_family_that_was_tried_has_its_row(hooks: ModuleType) -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    taken = [row for row in measured["families"] if not row["quantize"]]
    assert len(taken) >= 75
    # The matrix has no family that was written and does not load, or that lost a tensor.
    assert [row["family"] for row in taken if row["lost"] or row["difference"] > 1e-4] == []
    lines = list(hooks.families(measured))
    shown = [line for line in lines if re.match(r"\| `[\w-]+` \| \d+% \| = \| (yes|no) \|", line)]
    assert len(shown) == len(taken)


def test_the_reference_has_every_option(hooks: ModuleType) -> None:
    written = "\n".join(hooks.commands())
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        part = re.split(r"^## ", written.partition(f"## ulbq {name}\n")[2], flags=re.MULTILINE)[0]
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert [option for option in options if option.startswith("-") and option not in part] == []


# The checks themselves: each must see what is wrong, and take what is right.


@pytest.mark.parametrize(
    "link", ["[x](no-such.md)", "[x](docs/index.md#no-such)", "[x](#no-such)", "[x](../outside.md)", "[x](docs/)"]
)
def test_a_broken_link_is_seen(link: str) -> None:
    assert broken_links(README, f"# Here\n\nSee {link}.\n") != []


def test_a_sound_link_is_taken() -> None:
    text = "# Here `x`, and there\n\n[a](#here-x-and-there) [b](docs/index.md#install) [c](https://x.invalid/)\n"
    text += "`[d](no-such.md)`\n```\n[e](no-such.md)\n```\n"
    assert broken_links(README, text) == []


@pytest.mark.parametrize(
    "shown",
    [
        "```\nulbq quantize --no-such\n```",
        "```\nulbq quantise\n```",
        "```\nulbq quantize --method db-lm\n```",
        "```\nulbq quantize --samples many\n```",
        "```\nulbq quantize --method rtn --epochs 3\n```",
        "```\nulbq quantize --stage no:epochs=1 --method ulb-sapr\n```",
        "```\nulbq quantize --activation-memory much\n```",
        "```\nulbq quantize --recipe no-such\n```",
        "```\nulbq saliency M | ulbq quantize --bits two  # why\n```",
        "```\n$ A=1 ulbq eval \\\n    --no-such\n```",
        "```\ntorchrun --nproc-per-node 4 -m ulbq eval q/ --no-such\n```",
        "```\nulbq generate --prompt 'a | b' --top-p much\n```",
        "```\nulbq finetune q/\n```",
        "Text with `ulbq eval --no-such` in it",
        "| `ulbq saliency … \\| ulbq quantize --no-such` |",
        "Text with `ulbq convert --to gguff` in it",
    ],
)
def test_a_wrong_command_line_is_seen(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line for line in command_lines("x.md", shown) if complaint(line, monkeypatch)]


@pytest.mark.parametrize(
    ("shown", "count"),
    [
        ("```\nulbq quantize --method db-llm | ulbq eval --tasks piqa   # both\n```", 2),
        ("```\ncat a.txt | ulbq generate q/ --prompt - > b.txt\n```", 1),
        ("```\nA=1 ulbq quantize M \\\n    --method gptq \\\n    --bits 3\n```", 1),
        ("```\nulbq quantize --list-recipes\nulbq finetune --list-tasks\n```", 2),
        ("`ulbq eval --perplexity --context --tasks` and `ulbq quantize ARTIFACT --method …`", 2),
        ("```python\nulbq nothing\n```", 0),
        ("pip install ulbq, then `ulbq` and `import ulbq`", 0),
    ],
)
def test_a_sound_command_line_is_taken(shown: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list(command_lines("x.md", shown))
    assert len(lines) == count
    assert [line for line in lines if complaint(line, monkeypatch)] == []

"""The cut of the library: who imports whom, what stays light, and what library code never does.

Everything but the last test reads the source, so that imports inside functions and for type checkers count as well.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each row imports only from itself and the rows above it.
ROWS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "distributed", "limits", "printable", "runtime", "progress", "tracking", "import_hook"}),
    frozenset({"config"}),
    frozenset({"artifacts"}),
    frozenset({"formats"}),
    frozenset({"kernels"}),
    frozenset({"nn"}),
    frozenset({"models"}),
    frozenset({"blockwise"}),
    frozenset({"data"}),
    frozenset({"quantizers"}),
    frozenset({"solvers"}),
    frozenset({"training"}),
    frozenset({"finetuning"}),
    frozenset({"sensitivity"}),
    frozenset({"methods"}),
    frozenset({"evaluation"}),
    frozenset({"export"}),
    frozenset({"serving"}),
    frozenset({"pipeline"}),
    frozenset({"api"}),
    frozenset({"commands"}),
    frozenset({"__main__"}),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}

LIBRARY = sorted((ROOT / "ulbq").rglob("*.py"))
COMMANDS = sorted((ROOT / "commands").glob("*.py"))

LATE = {"datasets", "lm_eval"}

# Required for what the next commands import; each leaves this set with the issue that brings it.
AHEAD: set[str] = set()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "commands":
        parts.insert(0, "ulbq")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def _imports(path: Path, nodes: list[ast.AST] | None = None) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import among ``nodes`` (default: anywhere in the file)."""
    package = _module(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in nodes if nodes is not None else ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])


def _where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_part_of_the_library_has_a_row():
    parts = {_module(path).split(".")[1] for path in LIBRARY if path != ROOT / "ulbq" / "__init__.py"}
    assert parts <= RANK.keys(), "add the new part to ROWS"


def test_rows_import_only_from_rows_above():
    wrong = []
    for path in [*LIBRARY, *COMMANDS]:
        own = _module(path).split(".")[1:]
        if not own:  # ulbq/__init__.py may open any door of the library
            continue
        for line, name in _imports(path):
            parts = name.split(".")
            if parts[0] == "ulbq" and len(parts) > 1 and RANK.get(parts[1], 0) > RANK[own[0]]:
                wrong.append(f"{_where(path, line)}: {own[0]} imports {name}")
    assert not wrong


def test_commands_name_the_library_absolutely_and_their_siblings_relatively():
    wrong = []
    for path in COMMANDS:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and (
                node.level > 1 or (node.level == 0 and (node.module or "").startswith(("ulbq.commands", "commands")))
            ):
                wrong.append(_where(path, node.lineno))
    assert not wrong


def test_data_libraries_are_imported_late():
    """A machine that only quantizes need not have them: no door to them opens while a module is imported."""
    at_import = {path: {name for _, name in _imports(path, list(_tree(path).body))} for path in LIBRARY}
    doors = {_module(path) for path, names in at_import.items() if any(n.split(".")[0] in LATE for n in names)}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, names in at_import.items()
        for name in names
        if any(f"{name}.".startswith(f"{door}.") for door in doors)
    ]
    assert not wrong


def test_library_never_prints_exits_or_catches_everything():
    wrong = []
    for path in LIBRARY:
        for node in ast.walk(_tree(path)):
            match node:
                case ast.Call(func=ast.Name(id="print" | "exit" | "quit" | "input")):
                    wrong.append(_where(path, node.lineno))
                case ast.Call(func=ast.Attribute(value=ast.Name(id="sys" | "os"), attr="exit" | "_exit")):
                    wrong.append(_where(path, node.lineno))
                case ast.ExceptHandler(type=None | ast.Name(id="Exception" | "BaseException"), body=[*_, last]) if not (
                    isinstance(last, ast.Raise) and last.exc is None
                ):
                    wrong.append(_where(path, node.lineno))
                case ast.ImportFrom() if any(alias.name == "*" for alias in node.names):
                    wrong.append(_where(path, node.lineno))
    assert not wrong


def test_library_asserts_nothing():
    """What cannot be is an error with a message, or the types say so: Python's ``-O`` leaves assertions out."""
    wrong = [
        _where(path, node.lineno)
        for path in [*LIBRARY, *COMMANDS]
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert not wrong


def test_functions_fit_a_screen():
    """At most 60 lines and 10 parameters, but for kernels, whose parameters are a launch's."""
    wrong = []
    for path in [*LIBRARY, *COMMANDS]:
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
            if not kernel and (lines > 60 or len(parameters) > 10):
                wrong.append(f"{_where(path, node.lineno)}: {lines} lines, {len(parameters)} parameters")
    assert not wrong


def test_one_function_puts_a_cause_in_one_line():
    found = [path for path in LIBRARY if re.search(r"""(" "|' ')\.join\(.*\.split\(\)\)""", path.read_text("utf-8"))]
    assert [str(path.relative_to(ROOT)) for path in found] == ["ulbq/printable.py"]


# Whole commands, such as 'ulbq inspect --verify', and options of other programs.
_FOREIGN = re.compile(
    r"['`]ulbq \w+ .*|ulbq (quantize --method|finetune --task|convert DIR --for)|pip install|llama-gguf-split|vLLM|"
    r"vllm\.|sglang|llama-cli|mlx_lm|--quantization humming|--nproc-per-node|^-o$"
)


def test_messages_name_fields_not_flags():
    """Python's callers have no flags; the command line shows fields as it takes them."""
    wrong = []
    for path in LIBRARY:
        tree = _tree(path)
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                flag = re.search(r"(?<![\w-])(--[a-z][a-z-]+|-o\b)", node.value)
                if flag and not _FOREIGN.search(node.value) and "config" not in path.parts:
                    wrong.append(f"{_where(path, node.lineno)}: {flag[0]}")
    assert not wrong


def test_no_two_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for path in [*LIBRARY, *COMMANDS]:
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(_where(path, node.lineno))
    assert [where for where in places.values() if len(where) > 1] == []


def test_tests_mirror_the_library():
    """``tests/nn/test_adapter_more.py`` tests ``ulbq/nn/adapter.py``; those of the pipeline, what a run does too."""
    wrong = []
    for path in (ROOT / "tests").glob("*/test_*.py"):
        folder = ROOT / "commands" if path.parent.name == "commands" else ROOT / "ulbq" / path.parent.name
        modules = {module.stem for module in folder.rglob("*.py")} | {one.name for one in folder.glob("*/")}
        if (
            modules
            and folder.name != "pipeline"
            and not any(f"{path.stem}_".startswith(f"test_{one}_") for one in modules)
        ):
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def test_what_is_imported_is_declared(project):
    """Every third-party import stands in pyproject.toml, and every requirement is imported somewhere."""
    required = {_distribution(requirement) for requirement in project["project"]["dependencies"]}
    extras = project["project"]["optional-dependencies"]
    extra = {_distribution(requirement) for name in ("eval", "gpu", "images", "serve") for requirement in extras[name]}
    owners = metadata.packages_distributions()
    used, wrong = set(), []
    for path in [*LIBRARY, *COMMANDS]:
        for line, name in _imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "ulbq":
                continue
            found = {_distribution(owner) for owner in owners.get(top, [top])}
            used |= found
            if not found & (required | extra):
                wrong.append(f"{_where(path, line)}: {top}")
    assert not wrong
    assert not required - used - AHEAD, "declared but never imported"


def test_every_package_is_shipped(project):
    folders = {_module(path) for path in [*LIBRARY, *COMMANDS] if path.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_foundations_and_artifacts_import_neither_torch_nor_transformers():
    foundations = tuple(
        f"ulbq.{part}" for part in ("errors", "distributed", "limits", "progress", "runtime", "config", "artifacts")
    )
    light = [_module(path) for path in LIBRARY if _module(path).startswith(foundations) and path.name != "shards.py"]
    program = f"import sys, {', '.join(light)}; print(*(sys.modules.keys() & {{'torch', 'transformers', 'datasets'}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _distribution(requirement: str) -> str:
    """The normal form of a requirement's name."""
    name = requirement
    for separator in "[<>=~!; ":
        name = name.partition(separator)[0]
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.fixture(scope="module")
def project() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

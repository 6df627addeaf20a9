"""The walls of the house: which room may import which, where the environment and other ranks may be touched, and how
long a file or a function may grow. Read from the syntax trees, so that imports inside functions count as well."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "erniekit"

# Top to bottom. A room may import what stands below its own line, nothing beside it and nothing above.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("recipes",),
    ("training", "rollout"),
    ("checkpoint",),
    ("parallel", "precision", "adapters"),
    ("models", "data"),
    ("ops", "losses"),
    ("config",),
    ("base",),
    ("version",),
)
LEVEL = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
WITHOUT_PADDLE = ("base", "config", "data", "checkpoint")  # convert, verify, init, check and show never load it
MAX_LINES, MAX_STATEMENTS, MAX_RECIPE_LINES = 400, 50, 250

MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
SOURCES = sorted(
    path
    for folder in ("erniekit", "scripts", "tests")
    for pattern in ("*.py", "*.cpp", "*.sh")
    for path in (ROOT / folder).rglob(pattern)
)


def room_of(path: Path) -> str:
    """The room a module stands in; the package's own __init__ is the room "" above all others."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    """a.b.c for an attribute chain on a name, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def uses(path: Path, prefix: str) -> list[str]:
    """Places in `path` that import `prefix` (or something in it) or reach it as an attribute."""
    tree = TREES[path]
    names = [*imported_names(tree), *((n.lineno, dotted(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute))]
    found = sorted({line for line, name in names if name == prefix or name.startswith(prefix + ".")})
    return [f"{path.relative_to(ROOT)}:{line}" for line in found]


def wrong_imports(path: Path) -> list[str]:
    """Imports of `path` that go sideways or upwards."""
    here, wrong = room_of(path), []
    for line, name in imported_names(TREES[path]):
        first, _, rest = name.partition(".")
        if first != "erniekit":
            continue
        there = rest.split(".")[0]
        if there == here or (there in LEVEL and here != "" and LEVEL[there] > LEVEL[here]):
            continue
        if here == "" and there in LEVEL:
            continue
        wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_every_module_stands_in_a_known_room() -> None:
    assert {room_of(path) for path in MODULES} <= {"", *LEVEL}


def test_every_room_is_a_package() -> None:
    assert [str(path.parent) for path in MODULES if not (path.parent / "__init__.py").is_file()] == []


def test_imports_go_downwards_only() -> None:
    assert [wrong for path in MODULES for wrong in wrong_imports(path)] == []


def test_recipes_do_not_know_each_other() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        if room_of(path) == "recipes" and path.name != "__init__.py"  # which picks one by the stage
        for line, name in imported_names(TREES[path])
        if name.startswith("erniekit.recipes")
    ]
    assert wrong == []


def test_only_parallel_talks_to_other_ranks() -> None:
    assert [use for path in MODULES if room_of(path) != "parallel" for use in uses(path, "paddle.distributed")] == []


def test_only_runtime_reads_the_environment() -> None:
    runtime = PACKAGE / "base" / "runtime.py"
    readers = ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")
    assert [use for path in MODULES if path != runtime for name in readers for use in uses(path, name)] == []


@pytest.mark.parametrize("room", WITHOUT_PADDLE)
def test_rooms_that_work_without_paddle(room: str) -> None:
    """checkpoint/*_io.py and load.py are the bridges to models in memory; no other file there knows paddle."""
    bridges = {PACKAGE / "checkpoint" / "load.py", *(PACKAGE / "checkpoint").glob("*_io.py")}
    files = [path for path in MODULES if room_of(path) == room and path not in bridges]
    assert [use for path in files for use in uses(path, "paddle")] == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("erniekit", "paddle numpy yaml jinja2 rich sentencepiece torch"),
        ("erniekit.cli.main", "paddle numpy yaml jinja2 rich sentencepiece torch"),
        ("erniekit.config", "paddle torch"),
    ],
)
def test_light_imports(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({heavy.split()!r})))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_no_file_grows_beyond_its_reason() -> None:
    """At most 400 lines, unless the head of the file says "Long because ..."."""
    grown = []
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_LINES and not re.search("long because", "\n".join(lines[:40]), re.IGNORECASE):
            grown.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert grown == []


def test_recipes_stay_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in MODULES if room_of(path) == "recipes"}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_RECIPE_LINES} == {}


def statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Statements in a function's body, those of nested blocks included; the docstring does not count."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1 - bool(ast.get_docstring(function))


def test_no_function_grows_beyond_its_reason() -> None:
    """At most 50 statements, unless a comment "long because ..." stands on or right under its first line."""
    grown = []
    for path, tree in TREES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or statements(node) <= MAX_STATEMENTS:
                continue
            head = lines[node.lineno - 1 : node.body[0].lineno]
            if not any(re.search("# .*long because", line, re.IGNORECASE) for line in head):
                grown.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {statements(node)} statements")
    assert grown == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("ERNIE*/*/*.yaml")), ids=lambda p: p.name)
def test_shipped_configs(path: Path) -> None:
    """Each begins with its command and is accepted (test_examples.py judges more); `check` adds what is absent here."""
    from erniekit.config.load import load_config

    assert f"erniekit train {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8").splitlines()[0]
    assert load_config(path, []).path is not None


def run_tool(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("ruff"), reason="needs ruff")
def test_ruff() -> None:
    run_tool("-m", "ruff", "check", ".")


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="needs mypy")
def test_types() -> None:
    run_tool("-m", "mypy")


@pytest.mark.skipif(not importlib.util.find_spec("importlinter"), reason="needs import-linter")
def test_import_linter() -> None:
    run_tool("-c", "from importlinter.cli import lint_imports_command as lint; lint()")

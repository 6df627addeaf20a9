"""What README.md and docs/ show is true: commands, options and config keys are known, quick commands run, paths and
links lead somewhere, Python examples use what the package offers."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = ("help", "version", "env", "check", "show")  # these verbs are run exactly as the page shows them
PATH = re.compile(r"`((?:erniekit|scripts|tests|examples|docs)/[\w./-]*)`")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every command of the bash blocks, continued lines joined."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def known_keys() -> set[str]:
    from erniekit.config.run import ALIASES, KEYS

    return {*KEYS, *ALIASES, "extends"}


def check_erniekit(words: list[str], erniekit) -> None:
    verb, arguments = words[1], words[2:]
    help_text = erniekit(verb, "-h").stdout if verb not in ("help", "version") else ""
    configs = [word for word in arguments if word.endswith(".yaml")]
    overrides = [word for word in arguments if re.match(r"\w+=", word)]
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", help_text), f"erniekit {verb} has no option {option}"
    for config in configs:
        assert (ROOT / config).is_file(), f"{config} is not there"
    assert {word.partition("=")[0] for word in overrides} <= known_keys()
    if configs:
        erniekit("check", *configs, *overrides)


def check_script(words: list[str]) -> None:
    script = ROOT / words[1]
    assert script.is_file(), f"{words[1]} is not there"
    text = script.read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
        assert option in text, f"{words[1]} has no option {option}"


def check_install(words: list[str]) -> None:
    offered = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE))
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= offered, f"setup.py has no extra {extras}"


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS, ids=[command for _, command in ALL_COMMANDS])
def test_command_is_known(page: Path, command: str, erniekit) -> None:
    words = shlex.split(command)
    if words[0] == "erniekit":
        check_erniekit(words, erniekit)
    elif words[0] in ("bash", "python") and words[1].startswith("scripts/"):
        check_script(words)
    elif words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
        check_install(words)
    else:
        pytest.fail(f"{page.name} shows a command that nothing checks: {command}")


QUICK_COMMANDS = sorted({command for _, command in ALL_COMMANDS if shlex.split(command)[1] in QUICK})


@pytest.mark.parametrize("command", QUICK_COMMANDS)
def test_quick_command_runs(command: str, erniekit) -> None:
    assert erniekit(*shlex.split(command)[1:]).stdout


def test_verbs_of_the_readme_exist(erniekit) -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| verb | does |")[2].partition("\n\n")[0]
    verbs = {verb for row in table.splitlines() for verb in re.findall(r"`([a-z]+)[^`]*`", row.split(" | ")[0])}
    assert {"train", "convert", "help"} <= verbs
    listed = erniekit("help").stdout
    assert [verb for verb in sorted(verbs) if not re.search(rf"\b{verb}\b", listed)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = set(re.findall(r"`([a-z_0-9]+): [^`]+`", text)) - {"key"}
    for block in blocks(page, "yaml"):
        shown |= set(re.findall(r"^(\w+):", block, re.MULTILINE))
    assert shown <= known_keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lost = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            lost.append(target)
    assert lost == []


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_use_what_is_there(page: Path) -> None:
    import erniekit

    for block in blocks(page, "python"):
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "erniekit"
        }
        assert used <= set(erniekit.__all__)

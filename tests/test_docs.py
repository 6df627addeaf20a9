"""What README.md and docs/ show is true: commands, options and config keys are known, YAML is read,
paths and links lead somewhere, Python examples use what the package offers, the Chinese pages show the same blocks.

tests/end_to_end/test_pages.py runs the commands of the pages. A block whose fence says `elsewhere` needs what a test
does not have (a GPU, a network, another program, minutes): it is looked at and not run.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRANSLATED = {
    f"{name}.md"
    for name in (
        "getting-started", "data", "config", "checkpoints", "training", "lora", "preferences",
        "troubleshooting", "serving", "verbs", "parallel", "fp8",
    )
}
CHINESE = sorted((ROOT / "docs" / "zh").glob("*.md"))
PATH = re.compile(r"`((?:erniekit|scripts|tests|examples|docs)/[\w./-]*)`")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [text for found, _, text in fences(page) if found == language]


def fences(page: Path) -> list[tuple[str, str, str]]:
    """Language, further words of the fence, and text of every fenced block."""
    return re.findall(r"^```(\w*)[ ]?(.*)\n([\s\S]*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE)


def our_yaml(page: Path) -> list[str]:
    """The YAML blocks of a page that are configs of ours, not of another toolkit."""
    return [text for language, further, text in fences(page) if language == "yaml" and "foreign" not in further]


def lines_of(text: str) -> list[str]:
    """The commands of a bash block, continued lines joined."""
    lines = map(str.strip, text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


ALL_COMMANDS = [
    (page, line)
    for page in PAGES
    for language, _, text in fences(page)
    if language == "bash" and page not in CHINESE  # which show the same blocks
    for line in lines_of(text)
]
FOREIGN = (
    "vllm", "curl", "hf", "modelscope", "aistudio", "tensorboard", "nvidia-smi", "fastdeploy", "docker", "sbatch",
    "kubectl", "torchrun",
)  # fmt: skip


def known_keys() -> set[str]:
    from erniekit.config.run import ALIASES, KEYS

    return {*KEYS, *ALIASES, "extends"}


def check_erniekit(page: Path, words: list[str]) -> None:
    from erniekit.cli.verbs import VERBS

    verb, arguments = VERBS[words[1]], words[2:]
    made = {word for _, further, _ in fences(page) for word in further.split()}
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", verb.help()), f"erniekit {verb.name} has no option {option}"
    for config in (word for word in arguments if word.endswith(".yaml")):
        assert (ROOT / config).is_file() or config in made or config.startswith("output/"), f"{config} is not there"
    assert {word.partition("=")[0] for word in arguments if re.match(r"\w+=", word)} <= known_keys()


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
def test_command_is_known(page: Path, command: str) -> None:
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "erniekit":
        check_erniekit(page, words)
    elif words[0] in ("bash", "python") and words[1].startswith("scripts/"):
        check_script(words)
    elif words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
        check_install(words)
    elif words[:2] == ["python", "-c"]:
        ast.parse(words[2])
    elif words[:2] == ["python", "-m"] and words[2].startswith(("fastdeploy.", "paddle.distributed.launch")):
        pass  # another program's, written from its documentation
    elif words[0] not in FOREIGN:
        pytest.fail(f"{page.name} shows a command that nothing checks: {command}")


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
    for block in our_yaml(page):
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


def test_chinese_pages_are_there_and_show_the_same_blocks() -> None:
    assert {page.name for page in CHINESE} == TRANSLATED
    for page in CHINESE:
        assert fences(page) == fences(ROOT / "docs" / page.name), page.name
        assert len(re.findall("[\u4e00-\u9fff]", page.read_text(encoding="utf-8"))) > 300, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_yaml_is_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from erniekit.config.load import load_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    for number, block in enumerate(our_yaml(page)):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        load_config(tmp_path / f"{number}.yaml")


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


def test_rows_of_preferences_are_read(tmp_path: Path) -> None:
    from erniekit.data.sources import RowReport, list_sources, read_samples

    shown = [
        (row, "KTO" if "judged" in name else "DPO")
        for language, name, text in fences(ROOT / "docs" / "preferences.md")
        if language == "json"
        for row in text.splitlines()
    ]
    for row, stage in shown:
        (tmp_path / "row.jsonl").write_text(row, encoding="utf-8")
        (source,) = list_sources([str(tmp_path / "row.jsonl")], None, None, stage=stage, key="train_dataset")
        report = RowReport()
        assert len(list(read_samples(source, report, stage=stage))) == 1, report.bad
        assert report.unused_keys == set()
    assert len(shown) == 8

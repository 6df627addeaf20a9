"""The configs and data files under examples/: made from their bases, accepted by `check`, read by our readers."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from erniekit.base.errors import ConfigError, MeshError
from erniekit.cli.main import main
from erniekit.cli.verbs import VERBS
from erniekit.config.layout import layout_of
from erniekit.config.load import load_config
from erniekit.config.parallel import DEVICE_DEGREES, UNBUILT_DEGREES
from erniekit.config.readiness import not_built, require_built
from erniekit.config.run import RunConfig
from erniekit.data.sources import RowReport, list_sources, read_samples

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
OWN = set(CONFIGS.glob("ERNIE-4.5-tiny/*/*.yaml"))
STAND_INS = sorted(set(CONFIGS.rglob("*.yaml")) - OWN - set(CONFIGS.glob("_bases/*")))
OFFICIAL = (ROOT / "tests" / "data" / "erniekit_configs.txt").read_text(encoding="utf-8").splitlines()[1:]


def label(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def verb_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").split(maxsplit=3)[2]


def kind_of(path: Path) -> str:
    verb = verb_of(path)
    return load_config(path).model.stage if verb == "train" else verb


def refused(config: RunConfig) -> set[str]:
    """The keys for which `train` refuses a config."""
    try:
        require_built(config)
    except ConfigError as error:
        return {problem.split(": ")[1] for problem in error.problems}
    return set()


def test_configs_are_what_their_bases_make() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "expand_configs.py"))["configs"]()
    assert sorted(made) == STAND_INS
    assert [str(path) for path, text in made.items() if path.read_bytes() != text.encode()] == []


def test_there_is_a_stand_in_for_every_official_file() -> None:
    assert set(OFFICIAL) - set(map(label, STAND_INS)) == set()
    assert Counter(map(kind_of, STAND_INS))["VL-SFT"] == 11
    keys = {key for path in STAND_INS for key in re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert len(keys) >= 139


@pytest.mark.parametrize("path", STAND_INS, ids=label)
def test_check_accepts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, hardware, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# erniekit {verb_of(path)} {path.relative_to(ROOT)}"
    assert verb_of(path) in VERBS
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"{path}: fine\n")
    config = load_config(path)
    for line in not_built(config):
        assert re.search(r": \S+: .+ needs ", line) and line in out
    devices = math.prod(config.value(name) for name in DEVICE_DEGREES if config.value(name) > 1)
    assert re.match(rf"# Hardware: {devices} ", hardware)


@pytest.mark.parametrize("path", sorted(OWN), ids=label)
def test_our_own_configs_are_ready(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, hardware, expect, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# erniekit train {path.relative_to(ROOT)}"
    assert hardware.startswith("# Hardware: ") and re.match(r"# Expect:   .*\d", expect)
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"{path}: fine\n")
    require_built(load_config(path))


@pytest.mark.parametrize("path", STAND_INS, ids=label)
def test_train_refuses_by_name_what_it_cannot_do(path: Path) -> None:
    config, name = load_config(path), path.stem
    wanted = {key for key in UNBUILT_DEGREES if config.value(key) > 1}
    wanted |= {"input_dir", "split"} if "offline" in name else set()
    if config.model.stage == "VL-SFT":  # and more
        assert {*wanted, "stage"} <= refused(config)
    elif verb_of(path) == "train":
        assert refused(config) == wanted


@pytest.mark.parametrize("path", STAND_INS, ids=label)
def test_degrees_ask_for_ranks(path: Path) -> None:
    config = load_config(path)
    built = set(DEVICE_DEGREES) - set(UNBUILT_DEGREES)
    ranks = math.prod(config.value(name) for name in built if config.value(name) > 1)
    assert layout_of(config, ranks).tensor == max(config.parallel.tensor_parallel_degree, 1)
    if ranks > 1:
        with pytest.raises(MeshError, match=f"{path} --nproc {ranks}; or set tensor_parallel_degree=1"):
            layout_of(config, 1)


# ---------------------------------------------------------------------- data
DATA = ROOT / "examples" / "data"
FILES = sorted(DATA.glob("*.jsonl"))


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_data_files_have_the_names_that_official_configs_use() -> None:
    kinds = ("sft", "sft_think", "dpo", "function-call", "pt")
    wanted = {f"{kind}-{part}.jsonl" for kind in kinds for part in ("train", "eval")}
    wanted |= {"dpo-alpaca-train.jsonl", "dpo-messages-train.jsonl", "kto-train.jsonl", "kto-eval.jsonl"}  # our own
    assert {path.name for path in FILES} == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_data_files_are_small_and_in_two_languages(path: Path) -> None:
    found = [json.dumps(row, ensure_ascii=False) for row in rows(path.name)]
    chinese = [row for row in found if re.search("[\u4e00-\u9fff]", row)]
    assert 20 <= len(found) <= 50
    assert len(set(found)) == len(found)
    assert len(found) / 4 < len(chinese) < len(found)


def test_train_and_eval_have_no_text_in_common() -> None:
    def texts(value: object) -> set[str]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return {text for item in value for text in texts(item)}
        return {value} if isinstance(value, str) and len(value) > 16 else set()

    for kind in ("sft", "sft_think", "dpo", "kto", "pt"):
        assert texts(rows(f"{kind}-train.jsonl")) & texts(rows(f"{kind}-eval.jsonl")) == set()


def test_preference_rows() -> None:
    for row in rows("dpo-train.jsonl") + rows("dpo-eval.jsonl"):
        assert len(row["src"]) == len(row["tgt"]) + 1
        assert sorted(row["sort"]) == [0, 1] and len(row["response"]) == 2
        assert all(len(answer) % 2 == 1 for answer in row["response"])


def test_function_call_rows_are_spelled_as_theirs() -> None:
    """Arguments are objects, what a tool says is a list of objects, calls have no ids, a last newline may be absent."""
    for row in rows("function-call-train.jsonl") + rows("function-call-eval.jsonl"):
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                assert set(call) == {"type", "function"}
                assert set(call["function"]["arguments"]) == set(offered[call["function"]["name"]]["required"])
            if message["role"] == "tool":
                assert isinstance(message["content"], list) and isinstance(message["content"][0], dict)
    assert not (DATA / "function-call-eval.jsonl").read_text(encoding="utf-8").endswith("\n")


READ = {
    "sft-train.jsonl": ("SFT", "erniekit"), "sft-eval.jsonl": ("SFT", "erniekit"),
    "function-call-train.jsonl": ("SFT", "chatml"), "function-call-eval.jsonl": ("SFT", "chatml"),
    "sft_think-train.jsonl": ("SFT", "messages"), "sft_think-eval.jsonl": ("SFT", "messages"),
    "pt-train.jsonl": ("PT", "erniekit"), "pt-eval.jsonl": ("PT", "text"),
    "dpo-train.jsonl": ("DPO", "erniekit"), "dpo-eval.jsonl": ("RM", "erniekit"),
    "dpo-alpaca-train.jsonl": ("DPO", "alpaca"), "dpo-messages-train.jsonl": ("DPO", "messages"),
    "kto-train.jsonl": ("KTO", "messages"), "kto-eval.jsonl": ("KTO", "messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_row_is_read(name: str) -> None:
    """As the shipped configs name its format, and as its first row looks."""
    stage, kind = READ[name]
    for kinds in ([load_config({"train_dataset_type": kind}).data.train_dataset_type[0]], None):
        report = RowReport()
        (source,) = list_sources([str(DATA / name)], kinds, None, stage=stage, key="train_dataset")
        samples = list(read_samples(source, report, stage=stage))
        assert report.bad == [] and report.unused_keys == set()
        assert len(samples) == len(rows(name))


def answers_of(name: str) -> list[object]:
    (source,) = list_sources([str(DATA / name)], None, None, stage="DPO", key="train_dataset")
    return [sample.content for sample in read_samples(source, RowReport(), stage="DPO")]


def test_the_three_forms_of_pairs_say_the_same() -> None:
    pairs = answers_of("dpo-train.jsonl")
    assert answers_of("dpo-messages-train.jsonl") == pairs
    alpaca = answers_of("dpo-alpaca-train.jsonl")  # which has no place for an answer of several turns
    assert alpaca == [pair for pair in pairs if pair in alpaca] and len(alpaca) == len(pairs) - 1

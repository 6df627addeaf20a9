"""Prove that no file and no command line makes the program fail: 1,000 fuzzed configs, 1,000 fuzzed data files.

Each case is one call of the command line, in this process: `check`, `show` and `migrate` on a damaged config with odd
words behind it, `preview` on damaged data in every format. Wanted each time: exit code 0 or 2, an `error:` line with
2, no traceback, and no file opened for writing, made, moved or removed outside output_dir, wherever it is on the disk
(Python's audit events see every attempt). The folder for temporary files is empty again after each case.

    python scripts/prove_fuzz.py [--cases 1000] [--seed 1] [--only config:17] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True  # Python's own caches are no part of the proof

from erniekit.checkpoint.create import create  # noqa: E402
from erniekit.cli.main import main as command_line  # noqa: E402
from erniekit.config.run import ALIASES, KEYS  # noqa: E402

ODD = [
    "", "1", "-1", "0", "1e400", "nan", "None", "True", "'", '"', "[", "]", "{", "}", "[[[", "{a: 1}", "[1,[2,{b: c}]]",
    "&a x", "*a", "!!python/object:os.system x", "|", ">", "%", "@", "\t", "\0", "\\", "a: b", ",,", "💥", "\ufeff",
    "9" * 5000, "/", "..", "../../x", "/dev/null", "/proc/self/mem", "~", "$HOME", "sft", "é\u2028", "2001-01-01",
    "0x1f", "1_000", "- x", "? y", "---", "#", "model", "data/sft-train.jsonl", "*.jsonl", "%s%n",
    "<|im_start|>", "\x1b[31m",
]  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


# ---------------------------------------------------------------------- the place, and who watches it
@dataclass
class Watch:
    """Notes every attempt to change the disk outside `allowed` while it is on."""

    allowed: tuple[str, ...]
    is_on: bool = False
    found: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        if not self.is_on:
            return
        if event == "open":
            path, mode, flags = arguments
            writing = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITING)
        else:
            path, writing = arguments[0] if arguments else "", event in CHANGES
        if writing and isinstance(path, (str, bytes)):
            place = os.path.abspath(os.path.join(base_of(event, arguments), os.fsdecode(path)))
            if place != os.devnull and not place.startswith(self.allowed):
                self.found.append(f"{event} {place}")


def base_of(event: str, arguments: tuple[Any, ...]) -> str:
    """The folder that an event's path is relative to: Python removes trees by open folders."""
    position = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}.get(event, 0)
    number = arguments[position] if 0 < position < len(arguments) else -1
    return os.readlink(f"/proc/self/fd/{number}") if isinstance(number, int) and number >= 0 else ""


def prepare(folder: Path) -> None:
    """A micro model, the shipped configs and the example data."""
    shutil.copytree(ROOT / "examples" / "configs", folder / "configs")
    shutil.copytree(ROOT / "examples" / "data", folder / "data")
    (folder / "temporary").mkdir()
    create("micro-moe", folder / "model", tokenizer_texts=[folder / "data" / "sft-train.jsonl"])


@dataclass(frozen=True)
class Case:
    """One call of the command line; `files` are written beforehand."""

    name: str
    words: list[str]
    files: dict[str, bytes]


def faults_of(case: Case, folder: Path, watch: Watch) -> tuple[int | str, list[str]]:
    """Run a case in `folder`; its exit code, and what is wrong about how it ended."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    before = state_of(folder)
    out, err = io.StringIO(), io.StringIO()
    code: int | str = ""
    watch.found.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watch.is_on = True
        try:
            code = command_line(case.words)
        except BaseException as error:  # noqa: BLE001 - whatever comes out is what is looked for
            code = f"{type(error).__name__}: {error}"
        finally:
            watch.is_on = False
    faults = [f"exit code {code}"] if code not in (0, 2) else []
    faults += ["a traceback"] if "Traceback" in out.getvalue() + err.getvalue() else []
    faults += ["no error line"] if code == 2 and "error: " not in err.getvalue() else []
    faults += watch.found
    faults += [f"changed {path}" for path in sorted(before.items() ^ state_of(folder).items())]
    if faults:
        faults.append(err.getvalue()[-2000:])
    return code, faults


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every folder, and every file with size and time, outside output_dir (child processes raise no audit events)."""
    found = {}
    for path in folder.rglob("*"):
        if "output" not in path.relative_to(folder).parts:
            status = path.stat()
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


# ---------------------------------------------------------------------- configs
def config_case(draw: random.Random, number: int) -> Case:
    """A damaged config, a verb, and words behind it."""
    paths = sorted((ROOT / "examples" / "configs").rglob("run_*.yaml"))
    text = draw.choice(paths).read_text(encoding="utf-8")
    for _ in range(draw.randint(0, 3)):
        text = draw.choice((drop_line, double_line, change_value, change_name, add_line, cut, indent))(draw, text)
    content = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        content = damage(draw, content)
    verb = draw.choice(("check", "check", "check", "show", "show", "migrate"))
    words = [verb, "fuzz.yaml"] if draw.random() < 0.97 else [verb, draw.choice(ODD)]
    if verb != "migrate":
        words += [f"{a_name(draw)}={draw.choice(ODD)}" for _ in range(draw.randint(0, 3))]
    words += [draw.choice(ODD)] if draw.random() < 0.05 else []
    words += [draw.choice(("--files", "--changed", "--nonsense", "--from=swift", "--to", "-x"))] * (draw.random() < 0.1)
    return Case(f"config:{number}", words, {"fuzz.yaml": content})


def a_name(draw: random.Random) -> str:
    """A key, an alias, or something near."""
    name = draw.choice([*KEYS, *ALIASES, "extends", "<<", ""])
    return name if draw.random() < 0.8 else name[: len(name) // 2] + draw.choice(ODD[:20])


def drop_line(draw: random.Random, text: str) -> str:
    """Without one line."""
    lines = text.splitlines() or [""]
    lines.pop(draw.randrange(len(lines)))
    return "\n".join(lines)


def double_line(draw: random.Random, text: str) -> str:
    """One line twice."""
    lines = text.splitlines()
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines or [""]))
    return "\n".join(lines)


def change_value(draw: random.Random, text: str) -> str:
    """One key with an odd value."""
    lines = text.splitlines() or [""]
    position = draw.randrange(len(lines))
    lines[position] = f"{lines[position].partition(':')[0]}: {draw.choice(ODD)}"
    return "\n".join(lines)


def change_name(draw: random.Random, text: str) -> str:
    """One value under another key."""
    lines = text.splitlines() or [""]
    position = draw.randrange(len(lines))
    lines[position] = f"{a_name(draw)}:{lines[position].partition(':')[2]}"
    return "\n".join(lines)


def add_line(draw: random.Random, text: str) -> str:
    """A further key."""
    return f"{text}\n{a_name(draw)}: {draw.choice(ODD)}\n"


def cut(draw: random.Random, text: str) -> str:
    """The beginning only."""
    return text[: draw.randrange(len(text) + 1)]


def indent(draw: random.Random, text: str) -> str:
    """One line further in."""
    lines = text.splitlines() or [""]
    position = draw.randrange(len(lines))
    lines[position] = draw.choice((" ", "\t", "- ", "  - ")) + lines[position]
    return "\n".join(lines)


def damage(draw: random.Random, content: bytes) -> bytes:
    """Bytes in the middle replaced, doubled or gone."""
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.randint(0, 40))
    return content[:start] + draw.choice((b"", draw.randbytes(8), content[start:end] * 3)) + content[end:]


# ---------------------------------------------------------------------- data
FORMATS = {
    "sft-train.jsonl": ("SFT", "erniekit"), "sft_think-train.jsonl": ("SFT", "messages"),
    "pt-train.jsonl": ("PT", "text"),
    "function-call-train.jsonl": ("SFT", "chatml"), "dpo-train.jsonl": ("DPO", "erniekit"), "alpaca": ("SFT", "alpaca"),
    "pairs": ("DPO", "alpaca"), "message pairs": ("RM", "chatml"), "judged": ("KTO", "chatml"),
}  # fmt: skip
STRANGE: list[Any] = [
    None, True, 0, -1, 1e308, "", " ", "\0", "\ud800", "<|end_of_sentence|>", "</s>", "x" * 100_000, [], [[]], {},
    {"a": {}}, [None], ["", ""], "user", "tool", "[]", "{", '{"a": 1}', "<think>", "</think>", [{"role": "user"}],
    "🤖" * 50,
]  # fmt: skip
MADE: dict[str, list[Any]] = {
    "alpaca": [
        {"instruction": f"Say {n}", "input": "", "output": f"{n} it is", "history": [["a", "b"]]} for n in range(12)
    ],
    "pairs": [
        {"question": f"Say {n}", "chosen": f"{n} it is", "rejected": "No.", "score_chosen": n, "score_rejected": 0}
        for n in range(12)
    ],
    "message pairs": [
        {"messages": [{"role": "user", "content": f"Say {n}"}], "chosen": [{"role": "assistant", "content": f"{n}"}],
         "rejected": {"from": "gpt", "value": "No."}}
        for n in range(12)
    ],
    "judged": [{"prompt": f"Say {n}", "completion": f"{n} it is", "label": n % 2 == 0} for n in range(12)],
}  # fmt: skip


def data_case(draw: random.Random, number: int) -> Case:
    """A damaged data file, read by `preview`."""
    name = draw.choice(list(FORMATS))
    stage, kind = FORMATS[name]
    rows = copy.deepcopy(MADE.get(name, []))
    if not rows:
        lines = (ROOT / "examples" / "data" / name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in draw.sample(lines, 12)]
    for _ in range(draw.randint(0, 4)):
        change_row(draw, rows)
    suffix, content = as_file(draw, rows)
    if draw.random() < 0.15:
        content = damage(draw, content)
    kind = kind if draw.random() < 0.8 else draw.choice(("erniekit", "alpaca", "chatml", "text", "null"))
    settings = {
        "model_name_or_path": "model", "output_dir": "output", "stage": stage, "train_dataset_type": kind,
        "train_dataset_path": f"fuzz{suffix}", "max_seq_len": draw.choice((2, 64, 512, 512)),
        "data_cache_dir": "output/cache", "packing": draw.choice((True, False)),
        "max_prompt_len": draw.choice((8, 2048, 2048)), "share_prompt": draw.choice((True, False)),
        "max_dropped_fraction": draw.choice((0.01, 0.5, 1, 1)),
        "columns": draw.choice(("null",) * 8 + ("{prompt: question}", "{messages: rows}")),
        "chat_template": "ernie_thinking" if "function" in name and draw.random() < 0.8 else "null",
    }  # fmt: skip
    config = "".join(f"{key}: {value}\n" for key, value in settings.items())
    return Case(f"data:{number}", ["preview", "fuzz.yaml"], {"fuzz.yaml": config.encode(), f"fuzz{suffix}": content})


def change_row(draw: random.Random, rows: list[Any]) -> None:
    """Something strange somewhere in one of the rows."""
    position = draw.randrange(len(rows))
    if draw.random() < 0.1:
        rows[position] = copy.deepcopy(draw.choice(STRANGE))
        return
    value = rows[position]
    while isinstance(value, (dict, list)) and value:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if draw.random() < 0.4 or not isinstance(inner, (dict, list)) or not inner:
            change = draw.random()
            if change < 0.3:
                del value[key]
            elif change < 0.4 and isinstance(value, dict):
                value[draw.choice(("content", "role", "extra", ""))] = copy.deepcopy(draw.choice(STRANGE))
            else:
                value[key] = copy.deepcopy(draw.choice(STRANGE))
            return
        value = inner


def as_file(draw: random.Random, rows: list[Any]) -> tuple[str, bytes]:
    """The rows as a file of some kind, mostly of the kind that its name says."""
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
    kind = draw.choice((".jsonl",) * 5 + (".json", ".csv", ".txt", ".parquet"))
    text = "\n".join(lines) + "\n" * draw.randint(0, 2)
    if kind == ".json" or draw.random() < 0.1:
        text = "[\n" + ",\n".join(lines) + "\n]"
    elif draw.random() < 0.05:
        text = draw.choice(("", "\n\n", "[", "{", "[]", "null", "[" * 100_000))
    if kind == ".parquet" and (table := as_parquet(rows)) is not None:
        return kind, table
    suffix = kind if draw.random() < 0.9 else draw.choice((".jsonl", ".json", ".parquet", ".csv", ".tsv", ".gz", ""))
    content = text.encode("utf-8", "surrogatepass")
    return suffix, (b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")) if draw.random() < 0.1 else content


def as_parquet(rows: list[Any]) -> bytes | None:
    """The rows as parquet, if they have one shape."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = pa.Table.from_pylist(rows)
        sink = io.BytesIO()
        parquet.write_table(table, sink)
    except (pa.ArrowException, AttributeError, TypeError, ValueError):
        return None
    return sink.getvalue()


# ---------------------------------------------------------------------- all together
KINDS: dict[str, Callable[[random.Random, int], Case]] = {"config": config_case, "data": data_case}


def cases(*, count: int, seed: int) -> Iterator[Case]:
    """`count` cases of each kind; every one follows from the seed and its number alone."""
    for kind, make in KINDS.items():
        for number in range(count):
            yield make(random.Random(f"{seed}-{kind}-{number}"), number)


def prove(*, count: int, seed: int, only: str | None = None) -> dict[str, Any]:
    """Run the cases in a folder of their own and count how they end."""
    started = time.monotonic()
    codes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    found: dict[str, list[str]] = {}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        prepare(folder)
        tempfile.tempdir = str(folder / "temporary")  # which must be empty again after each case
        watch = Watch(allowed=(str(folder / "output"), tempfile.tempdir))
        sys.addaudithook(watch)
        os.chdir(folder)
        try:
            for case in cases(count=count, seed=seed):
                if only and case.name != only:
                    continue
                code, faults = faults_of(case, folder, watch)
                codes[case.name.partition(":")[0]][str(code)] += 1
                if faults:
                    found[f"{case.name} {case.words}"] = faults
        finally:
            os.chdir(home)
            tempfile.tempdir = None
    seconds = round(time.monotonic() - started, 1)
    return {"seed": seed, "codes": {kind: dict(codes[kind]) for kind in KINDS}, "faults": found, "seconds": seconds}


def main() -> None:
    """Command line of the proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one case, as a fault names it")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = prove(count=arguments.cases, seed=arguments.seed, only=arguments.only)
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if figures["faults"]:
        raise SystemExit(f"{len(figures['faults'])} cases ended as they should not")


if __name__ == "__main__":
    main()

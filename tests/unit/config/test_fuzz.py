"""Whatever a file or a command line holds, the answer is a config or a ConfigError, never a traceback."""

import random

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config
from erniekit.config.readiness import not_built, not_checked_here
from erniekit.config.run import ALIASES, KEYS

NAMES = [*KEYS, *ALIASES, "extends", "nonsense", "", "<<"]
VALUES = [
    "1", "-1", "0", "1e400", "nan", "None", "True", "'", '"', "[", "]", "{", "}", "[[[", "{a: 1}", "[1, [2, {b: c}]]",
    "&a x", "*a", "!!python/object:os.system x", "|", ">", "%", "@", "\t", "\0", "\\", "a: b", ",,", "💥", '"\\ud800"',
    "9" * 5000, "run.yaml", "/", "..", "sft", "é\u2028", "2001-01-01", "0x10", "1_000", "- x", "? y", "---", "...", "#",
]  # fmt: skip


def judge(source, overrides=()):
    try:
        config = load_config(source, overrides)
    except ConfigError as error:
        "\n".join(error.problems).encode()
        return
    "\n".join([config.text(), *config.notices, *not_built(config), *not_checked_here(config)]).encode()


@pytest.mark.parametrize("seed", range(150))
def test_garbage(seed, tmp_path):
    draw = random.Random(seed)
    lines = [f"{draw.choice(NAMES)}: {draw.choice(VALUES)}" for _ in range(draw.randint(1, 6))]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    judge(path, [f"{draw.choice(NAMES)}={draw.choice(VALUES)}" for _ in range(3)])


@pytest.mark.parametrize("value", [*VALUES, "\ud800", [VALUES, {"a": VALUES}], {}, (), 1.5, True])
def test_every_key_meets_a_strange_value(value):
    judge(dict.fromkeys(NAMES, value))
    for name in random.Random(0).sample(NAMES, 20):
        judge({name: value})


def test_bytes(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "run.yaml"
    for _ in range(100):
        path.write_bytes(b"seed: 1\n" + draw.randbytes(draw.randint(1, 60)))
        judge(path)

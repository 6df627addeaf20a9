"""Words behind a verb are sorted, and every word that does not fit is named."""

import pytest

from erniekit.base.errors import ConfigError
from erniekit.cli.arguments import LAYOUTS, split
from erniekit.cli.verbs import VERBS


def test_places_and_overrides():
    found = split(VERBS["train"], ["run.yaml", "a=1", "path=x=y"])
    assert (found.places, found.overrides) == (["run.yaml"], ["a=1", "path=x=y"])


def test_options():
    words = ["--family", "tiny-moe", "--train-tokenizer", "a.txt", "b.txt", "--out=x", "--seed", "-7"]
    found = split(VERBS["init"], words)
    assert found.text("family") == "tiny-moe"
    assert found.values["train-tokenizer"] == ["a.txt", "b.txt"]
    assert found.text("out") == "x"
    assert found.number("seed") == -7
    assert found.text("tokenizer") is None
    assert found.number("vocab-size") is None
    assert "files" in split(VERBS["check"], ["--files", "run.yaml"]).flags


def test_layouts():
    assert split(VERBS["export"], ["run.yaml"]).one_of("to", LAYOUTS) == "pt"
    assert split(VERBS["export"], ["run.yaml", "--to", "paddle"]).one_of("to", LAYOUTS) == "paddle"
    with pytest.raises(ConfigError, match=r"--to: 'torch' is not known\. Known: pt, paddle"):
        split(VERBS["export"], ["run.yaml", "--to", "torch"]).one_of("to", LAYOUTS)


@pytest.mark.parametrize(
    ("verb", "words", "messages"),
    [
        ("train", [], ["CFG is missing"]),
        ("train", ["a=1"], ["CFG is missing"]),
        ("train", ["a.yaml", "b.yaml"], ["'b.yaml' is one word too many"]),
        ("train", ["a.yaml", "--seed=1"], ["unknown option '--seed'. Settings are written key=value"]),
        ("train", ["a.yaml", "-x"], ["unknown option '-x'."]),
        ("check", ["--fils", "a.yaml"], ["unknown option '--fils'. Did you mean 'files'?"]),
        ("check", ["--files=yes", "a.yaml"], ["--files takes no value"]),
        ("convert", ["a", "--to"], ["--to wants LAYOUT", "OUT is missing", "--to LAYOUT is missing"]),
        ("train", ["a.yaml", "--nproc", "2", "--nproc=3"], ["--nproc is given twice"]),
        ("init", ["--family", "a", "--out", "x", "y"], ["'y' is one word too many"]),
        ("init", ["x", "--family", "--out", "y"], ["--family wants NAME", "--family NAME is missing", "'x' is one"]),
    ],
)
def test_every_wrong_word_is_named(verb, words, messages):
    with pytest.raises(ConfigError) as caught:
        split(VERBS[verb], words)
    problems = caught.value.problems
    assert len(problems) == len(messages)
    assert all(problem.startswith(message) for problem, message in zip(problems, messages, strict=True))
    assert problems[-1].endswith(f"\nusage: erniekit {VERBS[verb].usage}")


def test_a_number_must_be_one():
    found = split(VERBS["init"], ["--family", "x", "--out", "y", "--seed", "one"])
    with pytest.raises(ConfigError, match="--seed: 'one' is not a whole number"):
        found.number("seed")

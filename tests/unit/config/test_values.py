"""One parser of values: texts, Python values and YAML structures become the same typed value."""

import math

import pytest

from erniekit.config.values import Mismatch, parse, raw, text_of, wanted


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e-4", float, 1e-4),
        ("1.0e-05", float, 1e-5),
        ("1", float, 1.0),
        ("5", int, 5),
        ("1e5", int, 100000),
        ("100000.0", int, 100000),
        ("-1", int, -1),
        ("True", bool, True),
        ("true", bool, True),
        ("1", bool, True),
        ("on", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        ("no", bool, False),
        ("1", str, "1"),
        ("layer:A|B", str | list[int], "layer:A|B"),
        ("True", int | bool, True),
        ("8192", bool | int | None, 8192),
        ("1", bool | int | None, True),
        ("a.jsonl,b.jsonl", list[str] | None, ["a.jsonl", "b.jsonl"]),
        ("0.8, 0.2", list[float] | None, [0.8, 0.2]),
        ("1.0", list[float], [1.0]),
        ("[1,1]", list[int] | None, [1, 1]),
        ("[[0, 10], [20, 30]]", list | None, [[0, 10], [20, 30]]),
        ("{'image': 1, 'video': 1}", dict | None, {"image": 1, "video": 1}),
        ('{"image": 9, "video": 0.5, "on": true, "x": null}', dict, {"image": 9, "video": 0.5, "on": True, "x": None}),
    ],
)
def test_text(text, kind, value):
    found = parse(text, kind)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", [None, "", "None", "none", "null", "~", " "])
def test_nothing(word):
    assert parse(word, float | None) is None
    with pytest.raises(Mismatch):
        parse(word, float)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("abc", int),
        ("1.5", int),
        ("1e400", int),
        (str(2**63), int),
        ("9" * 5000, int),
        ("nan", float),
        ("inf", float),
        ("1,5", float),
        ("maybe", bool),
        ("2", bool),
        ("a,b", list[int]),
        (",", list[str]),
        ("[1", list[int]),
        ("5", dict),
        (["1"], int),
        ({"a": "1"}, str),
        ([["1"]], list[str]),
    ],
)
def test_mismatch(text, kind):
    with pytest.raises(Mismatch):
        parse(text, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1e-5, float), (True, bool), (7, int), (None, int | None), ("None of it", str), ("a: b # c", str), ("-", str),
        ("", str | None), ("ü 中", str), ('say "hi"\n', str), (["a b", "c,d"], list[str]), ([0.1, 1e-9], list[float]),
        ({"a b": [1, None, "x"], "c": {"d": False}}, dict), (math.pi, float),
    ],
)  # fmt: skip
def test_written_values_are_read_back(value, kind):
    from erniekit.config.reader import read_text

    expected = None if value == "" else value
    assert parse(raw(value), kind) == expected
    assert parse(read_text(text_of(value), "test"), kind) == expected


def test_what_cannot_be_a_setting():
    with pytest.raises(Mismatch, match="a setting cannot be of type set"):
        raw({"a", "b"})


def test_types_in_words():
    assert wanted(int | None) == "a whole number or null"
    assert wanted(list[float] | None) == "a list of numbers or null"

"""What rows of each format say, and why one cannot be used."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from typing import Any

import pytest

from erniekit.data.chat import Dialogue, encode_samples
from erniekit.data.fields import guess_kind
from erniekit.data.lines import BadRow
from erniekit.data.rendering import named_template
from erniekit.data.rows import FORMATS
from erniekit.data.tokenizer import Tokenizer
from tests.unit.data.talks import talk

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
NORMAL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [NORMAL_CALL]}
RESULT = {"role": "tool", "content": "20"}
NUM_MUTATED = 400


def parse(row: dict[str, Any], kind: str = "chatml") -> Dialogue:
    before = copy.deepcopy(row)
    found = FORMATS[kind].parse(row, set())
    assert row == before
    assert isinstance(found, Dialogue)
    return found


def reason(row: dict[str, Any], kind: str = "chatml") -> str:
    with pytest.raises(BadRow) as error:
        parse(row, kind)
    return str(error.value)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def test_alpaca() -> None:
    row = {"instruction": "add", "output": "3"}
    assert parse(row, "alpaca") == parse({**row, "input": "", "history": None, "system": ""}, "alpaca")
    assert parse(row, "alpaca") == talk(("add", "3"))
    full = {**row, "input": "1 2", "history": [["a", "b"], ["c", "d"]], "system": "s"}
    assert parse(full, "alpaca") == talk(("a", "b"), ("c", "d"), ("add\n1 2", "3"), system="s")
    assert parse({**full, "history": json.dumps(full["history"])}, "alpaca") == parse(full, "alpaca")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": ""}, '"instruction" is empty'),
        ({"output": " "}, '"output" is empty'),
        ({"output": None}, '"output" must be a string, not null'),
        ({"input": 3}, '"input" must be a string, not a number'),
        ({"history": [["a"]]}, '"history"[0] must be [query, answer], not [\'a\']'),
        ({"history": [["a", "b"], ["c", ""]]}, '"history"[1] is empty'),
        ({"history": {"a": "b"}}, '"history" must be a list of [query, answer], not an object'),
        ({"history": "[["}, "not JSON ("),
    ],
)
def test_bad_alpaca(change: dict[str, Any], words: str) -> None:
    assert reason({"instruction": "q", "output": "a", **change}, "alpaca").startswith(words)


def test_messages_with_tools_as_templates_take_them() -> None:
    row = chat({"role": "system", "content": "s"}, USER, CALLS, RESULT, ANSWER, tools=[TOOL])
    normal = ({"role": "system", "content": "s"}, USER, {**CALLS, "content": ""}, RESULT, ANSWER)
    assert parse(row) == Dialogue(normal, (True, True), (TOOL,))
    assert parse(row, "erniekit") == parse(row)  # ERNIEKit's rows of function calls
    text = {**row, "messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"])}
    assert parse(text) == parse(row)


@pytest.mark.parametrize(
    "call",
    [
        {"name": "f", "arguments": {"a": [1, None]}},
        {"id": "1", "function": {"name": "f", "arguments": '{"a": [1, null]}'}},
        {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}, "index": 0},
    ],
)
def test_calls_are_written_in_several_ways(call: dict[str, Any]) -> None:
    for answer in {"tool_calls": [call]}, {"function_call": call}:
        result = {**RESULT, "role": "function"}
        found = parse(chat(USER, {"role": "assistant", "content": "", **answer}, result, ANSWER))
        assert found.messages[1] == {**CALLS, "content": ""}
        assert found.messages[2] == RESULT


def test_contents() -> None:
    pieces = [{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]
    assert parse(chat({"role": "user", "content": pieces}, ANSWER)).messages[0]["content"] == "q2"
    for content, text in [
        (pieces, "q2"),
        ([{"t": 20}, {"t": 21}], '[{"t":20},{"t":21}]'),
        ({"t": "°"}, '{"t":"°"}'),
        (None, ""),
        (20, "20"),
    ]:
        assert parse(chat(USER, CALLS, {"role": "tool", "content": content}, ANSWER)).messages[2]["content"] == text
    no_system = chat({"role": "system", "content": ""}, USER, ANSWER)
    assert parse(no_system) == parse(chat({"role": "developer", "content": None}, USER, ANSWER)) == talk(("q", "a"))
    assert parse(chat(USER, ANSWER, system="s")) == talk(("q", "a"), system="s")
    thinks = parse(chat(USER, {**ANSWER, "reasoning_content": "t"})).messages[1]
    assert thinks == {**ANSWER, "reasoning_content": "t"}
    in_text = {**ANSWER, "content": "<think>t</think>a"}
    assert parse(chat(USER, in_text)).messages[1] == in_text


def test_conversations() -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a")]
    row = {"conversations": [{"from": word, "value": text} for word, text in turns]}
    assert parse(row) == talk(("q", "a"), system="s")
    call = json.dumps(NORMAL_CALL["function"])
    turns = [("human", "q"), ("function_call", call), ("observation", "20"), ("gpt", "a")]
    row = {"conversations": [{"from": word, "value": text} for word, text in turns], "tools": json.dumps([TOOL])}
    assert parse(row) == Dialogue((USER, {**CALLS, "content": ""}, RESULT, ANSWER), (True, True), (TOOL,))


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        (chat(USER, ANSWER, USER, ANSWER), (True, True)),
        (chat(USER, ANSWER, USER, ANSWER, label=0), (False, False)),
        (chat(USER, ANSWER, USER, ANSWER, label=[0, 1]), (False, True)),
        (chat(USER, ANSWER, USER, ANSWER, label=[1, 0, 0, 1]), (False, True)),
        (chat(USER, CALLS, RESULT, ANSWER, USER, ANSWER, label=[0, 1, 1]), (False, True, True)),
        (chat(USER, {**ANSWER, "label": 0}, USER, ANSWER), (False, True)),
        (chat(USER, {**ANSWER, "weight": 0}, {**USER, "label": 1}, {**ANSWER, "weight": 1}), (False, True)),
    ],
)
def test_labels(row: dict[str, Any], trained: tuple[bool, ...]) -> None:
    assert parse(row).trained == trained
    assert parse(row, "erniekit").trained == trained


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (chat(), '"messages" must be a list of messages, not []'),
        ({"messages": "{"}, "not JSON ("),
        ({"text": "a"}, '"messages" (a list of messages) is missing; the row has "text"'),
        (chat(USER, "a"), "message 2: must be an object, not a string"),
        (chat(USER, {**ANSWER, "role": "bot"}), "message 2: unknown role 'bot'; known are system, user, assist"),
        (chat(USER, {"content": "a"}), "message 2: unknown role None"),
        (chat(USER, {**ANSWER, "role": ["user"]}), "message 2: unknown role ['user']"),
        (chat(USER, RESULT, ANSWER), "message 2: a tool result without a call"),
        (chat(USER, CALLS, RESULT, RESULT, ANSWER), "message 4: a tool result without a call"),
        (chat(USER, CALLS, USER, RESULT, ANSWER), "message 4: a tool result without a call"),
        (chat(USER, {**ANSWER, "content": " "}), "message 2: the answer is empty"),
        (chat(USER, {**ANSWER, "content": "<think>t</think>\n"}), "message 2: the answer is empty after its thought"),
        (chat(USER, {"role": "assistant", "tool_calls": []}), "message 2: the answer is empty"),
        (chat({**USER, "content": ""}, ANSWER), "message 1: the content is empty"),
        (chat({**USER, "content": [{"type": "image"}]}, ANSWER), "message 1: the content must be text, not [{"),
        (chat(USER, {"role": "system", "content": "s"}, ANSWER), "message 2: a system message must come first"),
        (chat({"role": "system", "content": "s"}, USER, ANSWER, system="t"), '"system" stands in the row and among'),
        (chat(USER), "a dialogue begins with the user and ends with the assistant, not from user to user"),
        (chat(ANSWER), "a dialogue begins with the user and ends with the assistant, not from assistant to assistant"),
        (chat({"role": "system", "content": "s"}), "a dialogue begins with the user and ends with"),
        (chat(USER, ANSWER, label=[1, 0, 1]), '"label" has 3 values for 1 answers in 2 messages'),
        (chat(USER, ANSWER, label=2), '"label" must be a list of 0 and 1, not [2]'),
        (chat(USER, {**ANSWER, "label": "1"}), '"label" must be a list of 0 and 1, not [\'1\']'),
        (chat(USER, {**ANSWER, "label": 1}, label=[1]), '"label" stands in the row and in its messages'),
        (chat(USER, ANSWER, tools=["f"]), '"tools" must be a list of objects, not [\'f\']'),
        (chat(USER, {**ANSWER, "reasoning_content": 1}), 'message 2: "reasoning_content" must be a string, not a n'),
    ],
)
def test_bad_messages(row: dict[str, Any], words: str) -> None:
    assert reason(row).startswith(words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("f", "not JSON ("),
        (["f"], "a tool call must be an object, not a string"),
        ([{"arguments": {}}], "a tool call has no name: {'arguments': {}}"),
        ([{"function": "f"}], "a tool call has no name"),
        ([{"name": "f", "arguments": "{a: 1}"}], "the arguments of f are not JSON ("),
        ([{"name": "f", "arguments": "[1]"}], "the arguments of f must be a JSON object, not a list"),
        ([{"name": "f", "arguments": 3}], "the arguments of f must be a JSON object, not a number"),
    ],
)
def test_bad_calls(call: Any, words: str) -> None:
    assert reason(chat(USER, {"role": "assistant", "tool_calls": call})).startswith(f"message 2: {words}")


def test_results_are_matched_with_calls_by_id() -> None:
    calls = {**CALLS, "tool_calls": [{**NORMAL_CALL, "id": "1"}, {**NORMAL_CALL, "id": "2"}]}
    two = [{**RESULT, "tool_call_id": "2"}, {**RESULT, "tool_call_id": "1"}]
    assert len(parse(chat(USER, calls, *two, ANSWER)).messages) == 5
    wrong = reason(chat(USER, calls, {**RESULT, "tool_call_id": "3"}, ANSWER))
    assert wrong == "message 3: a tool result for '3', which no call has"
    twice = reason(chat(USER, calls, two[0], two[0], ANSWER))
    assert twice == "message 4: a tool result for '2', which no call has"


def test_what_is_not_used_is_noted() -> None:
    unused: set[str] = set()
    FORMATS["chatml"].parse(chat({**USER, "mood": 1}, ANSWER, id=1), unused)
    FORMATS["alpaca"].parse({"instruction": "a", "output": "b", "url": "c"}, unused)
    assert unused == {"messages.mood", "id", "url"}


def test_a_row_tells_its_format() -> None:
    assert guess_kind(FORMATS, ["src", "tgt"]) == "erniekit"
    assert guess_kind(FORMATS, ["instruction", "output", "text"]) == "alpaca"
    assert guess_kind(FORMATS, ["messages"]) == guess_kind(FORMATS, ["conversations"]) == "chatml"
    assert guess_kind(FORMATS, {"text": ""}) == "text"
    assert guess_kind(FORMATS, ["a"]) is None


_ODD = (
    *(None, True, 0, -1, 2.5, "", " ", "q", "[1]", "{", "</think>", "tool"),
    *([], ["q"], {}, {"name": "f"}, [[]], [{}], [None]),
)
_WHOLE = (
    {"src": ["q", "r"], "tgt": ["a", "b"], "label": [0, 1], "system": "s"},
    {"instruction": "q", "input": "r", "output": "a", "history": [["b", "c"]], "system": "s"},
    chat({"role": "system", "content": "s"}, USER, {**CALLS, "reasoning_content": "t"}, RESULT, ANSWER, tools=[TOOL]),
    chat(USER, {**ANSWER, "weight": 0}, {**USER, "content": [{"type": "text", "text": "q"}]}, ANSWER, label=None),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]", "label": [1]},
)


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with something in it exchanged, taken away or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        return rest if rng.random() < 0.15 else {**rest, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice([[], [mutated(value[at], rng)], [value[at]] * 2]) + value[at + 1 :]
    return copy.deepcopy(rng.choice(_ODD))


@pytest.mark.parametrize("kind", ["erniekit", "alpaca", "chatml"])
def test_any_row_is_a_dialogue_or_a_bad_row(kind: str, bytewise: Tokenizer) -> None:
    rng = random.Random(7)
    counts = Counter()
    for _ in range(NUM_MUTATED):
        row = rng.choice(_WHOLE)
        for _ in range(rng.randint(1, 3)):
            row = mutated(row, rng)
            row = row if isinstance(row, dict) else {"messages": row}
        try:
            found = FORMATS[kind].parse(row, set())
            assert isinstance(found, Dialogue)
            assert len(found.trained) == sum(message["role"] == "assistant" for message in found.messages) > 0
            encode_samples(bytewise, found, template=named_template("ernie_thinking"), max_len=99)
            counts["dialogue"] += 1
        except BadRow:
            counts["bad"] += 1
    assert min(counts["dialogue"], counts["bad"]) > NUM_MUTATED // 50

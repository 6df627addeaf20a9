"""What rows of preferences say in each format, and why one cannot be used."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from erniekit.data.fields import guess_kind
from erniekit.data.lines import BadRow
from erniekit.data.preference_rows import JUDGED_FORMATS, PAIR_FORMATS
from erniekit.data.preferences import Answer, Answers

NUM_MUTATED = 400
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "20"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parse(row: dict[str, Any], kind: str = "chatml", *, judged: bool = False) -> Answers:
    before, formats = copy.deepcopy(row), JUDGED_FORMATS if judged else PAIR_FORMATS
    found = formats[kind].parse(row, set())
    assert row == before
    return found


def reason(row: dict[str, Any], kind: str = "chatml", *, judged: bool = False) -> str:
    with pytest.raises(BadRow) as error:
        parse(row, kind, judged=judged)
    return str(error.value)


def pair(prompt: list[Any], chosen: Any, rejected: Any, scores: tuple[float, float] = (1, 0)) -> Answers:
    """What a row says whose answers are texts, or lists of messages."""
    lists = [[said(answer)] if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    return Answers(
        tuple(prompt), tuple(judged(*messages, score=score) for messages, score in zip(lists, scores, strict=True))
    )


def judged(*messages: Any, score: float) -> Answer:
    return Answer(messages, (True,) * sum(message["role"] == "assistant" for message in messages), score)


PROMPT = [user("q")]
LONG = [{"role": "system", "content": "s"}, user("a"), said("b"), user("q")]
ERNIE = {"src": ["q"], "tgt": [], "response": [["good"], ["bad"]], "sort": [1, 0]}
GOOD, BAD = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("erniekit", ERNIE, pair(PROMPT, "good", "bad")),
        ("erniekit", {**ERNIE, "sort": [0, 3]}, pair(PROMPT, "bad", "good", (3, 0))),
        ("erniekit", {**ERNIE, "response": ["good", "bad"], "score": [2.5, 1]}, pair(PROMPT, "good", "bad", (2.5, 1))),
        ("erniekit", {"src": "q", "response": '[["good"], ["bad"]]', "sort": "[1, 0]"}, pair(PROMPT, "good", "bad")),
        ("erniekit", {**ERNIE, "system": "s", "src": ["a", "q"], "tgt": ["b"]}, pair(LONG, "good", "bad")),
        ("erniekit", {**ERNIE, "response": [["a", "b", "c"], ["bad"]]},
         pair(PROMPT, [said("a"), user("b"), said("c")], "bad")),
        ("alpaca", {"question": "q", "chosen": "good", "rejected": "bad"}, pair(PROMPT, "good", "bad")),
        ("alpaca", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, pair(PROMPT, "good", "bad")),
        ("alpaca", {"instruction": "q", "system": "s", "history": [["a", "b"]], "chosen": "good", "rejected": "bad",
                    "score_chosen": 9, "score_rejected": 4}, pair(LONG, "good", "bad", (9, 4))),
        ("chatml", {"messages": PROMPT, "chosen": "good", "rejected": "bad"}, pair(PROMPT, "good", "bad")),
        ("chatml", {"conversations": [{"from": "human", "value": "q"}], "chosen": GOOD, "rejected": BAD},
         pair(PROMPT, "good", "bad")),
        ("chatml", {"prompt": "q", "chosen": [said("good")], "rejected": "bad"}, pair(PROMPT, "good", "bad")),
        ("chatml", {"prompt": LONG[1:], "system": "s", "chosen": "good", "rejected": "bad"}, pair(LONG, "good", "bad")),
        ("chatml", {"chosen": [*LONG, said("good")], "rejected": [*LONG, said("bad")]}, pair(LONG, "good", "bad")),
        ("chatml", {"chosen": json.dumps([*LONG, said("good")]), "rejected": [*LONG, said("bad")], "prompt": "a"},
         pair(LONG, "good", "bad")),
        ("chatml", {"chosen": [*PROMPT, said("a"), user("b"), said("c")], "rejected": [*PROMPT, said("a"), user("d"),
                    said("e")]}, pair(PROMPT, [said("a"), user("b"), said("c")], [said("a"), user("d"), said("e")])),
        ("chatml", {"chosen": [*PROMPT, said("a"), user("b"), said("c")], "rejected": [*PROMPT, said("a")]},
         pair(PROMPT, [said("a"), user("b"), said("c")], "a")),
        ("chatml", {"prompt": "q", "chosen": "[no JSON", "rejected": '{"a": 1}'}, pair(PROMPT, "[no JSON", '{"a": 1}')),
    ],
)  # fmt: skip
def test_pairs(kind: str, row: dict[str, Any], expected: Answers) -> None:
    assert parse(row, kind) == expected
    assert PAIR_FORMATS[kind].is_met_by(row)
    assert guess_kind(PAIR_FORMATS, row) == kind
    apart = parse(row, kind, judged=True) if kind != "erniekit" else None
    if apart is not None:  # KTO judges both answers of a pair
        assert [answer.messages for answer in apart.answers] == [answer.messages for answer in expected.answers]
        assert [answer.score for answer in apart.answers] == [1, 0]


def test_more_answers_are_put_in_the_order_of_sort() -> None:
    row = {**ERNIE, "response": [["a"], ["b"], ["c"]], "sort": [2, 7, 5]}
    assert [answer.messages[0]["content"] for answer in parse(row, "erniekit").answers] == ["b", "c", "a"]


def test_tools_and_their_results_belong_to_the_prompt_or_to_an_answer() -> None:
    row = {"messages": [*PROMPT, CALLS, RESULT], "chosen": "good", "rejected": "bad", "tools": [TOOL]}
    assert parse(row).prompt == (*PROMPT, CALLS, RESULT)
    row = {"messages": PROMPT, "chosen": [CALLS, RESULT, said("good")], "rejected": "bad", "tools": json.dumps([TOOL])}
    found = parse(row)
    assert found.tools == (TOOL,) and found.answers[0].trained == (True, True)
    assert reason({**row, "chosen": [RESULT, said("good")]}) == '"chosen": message 1: a tool result without a call'


def test_labels_in_an_answer_say_what_is_trained() -> None:
    row = {"prompt": "q", "chosen": [{**said("a"), "label": 0}, user("b"), said("c")], "rejected": "bad"}
    assert parse(row).answers[0].trained == (False, True)
    assert reason({**row, "chosen": [{**said("a"), "label": 0}]}) == "no turn of an answer has label 1"


@pytest.mark.parametrize(
    ("kind", "row", "answers"),
    [
        ("erniekit", {**ERNIE, "response": [["good"]], "sort": [1]}, [("good", 1)]),
        ("erniekit", {**ERNIE, "sort": [0, 0]}, [("good", 0), ("bad", 0)]),
        ("alpaca", {"instruction": "q", "output": "good", "kto_tag": False}, [("good", 0)]),
        ("alpaca", {"question": "q", "completion": "good", "label": "True"}, [("good", 1)]),
        ("chatml", {"messages": [*PROMPT, said("good")], "label": True}, [("good", 1)]),
        ("chatml", {"messages": [*PROMPT, said("good")], "kto_tag": 0}, [("good", 0)]),
        ("chatml", {"prompt": "q", "completion": "good", "label": False}, [("good", 0)]),
        ("chatml", {"prompt": PROMPT, "completion": [said("good")], "label": True}, [("good", 1)]),
        ("chatml", {"completion": [*PROMPT, said("good")], "label": True}, [("good", 1)]),
    ],
)  # fmt: skip
def test_answers_judged_one_by_one(kind: str, row: dict[str, Any], answers: list[tuple[str, int]]) -> None:
    expected = Answers(tuple(PROMPT), tuple(judged(said(text), score=score) for text, score in answers))
    assert parse(row, kind, judged=True) == expected
    assert guess_kind(JUDGED_FORMATS, row) == kind


def test_the_last_answer_is_the_judged_one() -> None:
    found = parse({"messages": [*LONG, said("x"), user("y"), said("good")], "label": True}, judged=True)
    assert found.prompt == (*LONG, said("x"), user("y")) and found.answers == (judged(said("good"), score=1),)


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("erniekit", {**ERNIE, "sort": [1, 1]}, '"sort" [1, 1] does not say which answer is better: some are equal'),
        ("erniekit", {**ERNIE, "sort": [1]}, '"sort" has 1 values for 2 answers'),
        ("erniekit", {**ERNIE, "sort": ["1", 0]}, '"sort" must be a list of numbers, not [\'1\', 0]'),
        ("erniekit", {**ERNIE, "score": [1e308, 0]}, '"score" must be a list of numbers, not [1e+308, 0]'),
        ("erniekit", {**ERNIE, "response": [["good"]], "sort": [1]}, '"response" has only one answer; a comparison'),
        ("erniekit", {**ERNIE, "response": []}, '"response" must be a list of answers, not []'),
        ("erniekit", {**ERNIE, "response": [["good"], []]}, '"response"[1] is empty'),
        ("erniekit", {**ERNIE, "response": [["good"], [" "]]}, '"response"[1][0] is empty'),
        ("erniekit", {**ERNIE, "response": [["good"], ["a", "b"]]}, '"response"[1] has 2 strings; answer, user'),
        ("erniekit", {**ERNIE, "response": [["good"], None]}, '"response"[1] must be a list of strings, not null'),
        ("erniekit", {**ERNIE, "response": [["a"], ["a"]]}, "two of the answers are the same"),
        ("erniekit", {**ERNIE, "tgt": ["a"]}, '"src" has 1 turns and "tgt" has 1; every query but the'),
        ("erniekit", {**ERNIE, "score": [0, 1]}, "the scores [0, 1] contradict the order of the answers"),
        ("erniekit", {"src": ["q"], "tgt": ["a"]}, '"response" (a list of answers) is missing; the row has "src"'),
        ("alpaca", {"question": "q", "chosen": "a"}, '"rejected" (a string) is missing; the row has "question"'),
        ("alpaca", {"question": "q", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ("alpaca", {"question": "q", "chosen": "a", "rejected": "a"}, "two of the answers are the same"),
        ("alpaca", {"question": "q", "chosen": "a", "rejected": "b", "score_chosen": 1}, '"score_rejected" must be a'),
        ("chatml", {"messages": PROMPT, "rejected": "b"}, '"chosen" (an answer) is missing; the row has "messages"'),
        ("chatml", {"messages": PROMPT, "chosen": None, "rejected": "b"}, '"chosen" must be text, a message or a list'),
        ("chatml", {"messages": PROMPT, "chosen": "a", "rejected": ""}, '"rejected": message 1: the answer is empty'),
        ("chatml", {"messages": PROMPT, "chosen": "a", "rejected": "a"}, "two of the answers are the same"),
        ("chatml", {"chosen": "a", "rejected": "b"}, '"messages" (the prompt, a list of messages) is missing; the row'),
        ("chatml", {"messages": [*PROMPT, said("x")], "chosen": "a", "rejected": "b"},
         "a prompt begins with the user and ends with the user or a tool, not from user to assistant"),
        ("chatml", {"messages": PROMPT, "chosen": [said("a"), user("b")], "rejected": "b"},
         "an answer begins and ends with the assistant, not from assistant to user"),
        ("chatml", {"chosen": [*PROMPT, said("a")], "rejected": [user("r"), said("b")]},
         "a prompt begins with the user and ends with the user or a tool, not without a message"),
        ("chatml", {"prompt": "other", "chosen": [*PROMPT, said("a")], "rejected": [*PROMPT, said("b")]},
         '"prompt" is not how chosen and rejected begin'),
        ("chatml", {"prompt": "q", "chosen": [*PROMPT, said("a")], "rejected": "b"},
         "of chosen and rejected one is a whole conversation and the other is an answer alone"),
        ("chatml", {"system": "s", "messages": LONG, "chosen": "a", "rejected": "b"}, '"system" stands in the row and'),
    ],
)  # fmt: skip
def test_reasons(kind: str, row: dict[str, Any], words: str) -> None:
    assert words in reason(row, kind)


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("erniekit", {**ERNIE, "sort": [2, 1]}, '"sort" [2, 1] must hold 1 for desirable and 0 for undesirable'),
        ("alpaca", {"instruction": "q", "output": "a"}, '"label" (true or false) is missing'),
        ("chatml", {"messages": [*PROMPT, said("a")], "label": 2}, '"label" must be true or false, not 2'),
        ("chatml", {"messages": [*PROMPT, said("a")], "kto_tag": None}, '"kto_tag" must be true or false, not None'),
        ("chatml", {"messages": PROMPT, "label": True}, "a prompt begins with the user"),
        ("chatml", {"label": True}, '"messages" (the prompt, a list of messages) is missing; the row has "label"'),
    ],
)  # fmt: skip
def test_reasons_of_judged_rows(kind: str, row: dict[str, Any], words: str) -> None:
    assert words in reason(row, kind, judged=True)


def test_keys_that_are_left_aside_are_noted() -> None:
    unused: set[str] = set()
    PAIR_FORMATS["chatml"].parse(
        {"messages": [{**user("q"), "time": 1}], "chosen": "a", "rejected": "b", "source": "x"}, unused
    )
    assert unused == {"messages.time", "source"}


STRANGE: list[Any] = [
    None,
    True,
    0,
    1e308,
    "",
    " ",
    "x",
    [],
    [[]],
    {},
    [None],
    ["", ""],
    "[]",
    '[{"role": "user"}]',
    [user("a")],
]


def test_damaged_rows_are_bad_rows_and_nothing_worse() -> None:
    rows = [
        ("erniekit", {**ERNIE, "system": "s", "src": ["a", "q"], "tgt": ["b"]}),
        ("alpaca", {"question": "q", "chosen": "good", "rejected": "bad", "history": [["a", "b"]], "score_chosen": 1}),
        ("chatml", {"messages": [*PROMPT, CALLS, RESULT], "chosen": [CALLS, RESULT, said("a")], "rejected": "b"}),
        ("chatml", {"chosen": [*LONG, said("good")], "rejected": [*LONG, said("bad")], "prompt": "a"}),
        ("chatml", {"prompt": PROMPT, "completion": [said("good")], "label": True}),
    ]
    draw, used = random.Random(1), 0
    for number in range(NUM_MUTATED):
        kind, row = copy.deepcopy(draw.choice(rows))
        value: Any = row
        while isinstance(value, dict | list) and value:
            key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
            if draw.random() < 0.5 or not isinstance(value[key], dict | list):
                value[key] = copy.deepcopy(draw.choice(STRANGE))
                break
            value = value[key]
        try:
            found = parse(row, kind, judged=number % 2 == 1)
        except BadRow as error:
            assert str(error)
        else:
            used += 1
            assert found.prompt and found.answers and all(answer.messages for answer in found.answers)
    assert NUM_MUTATED // 20 < used < NUM_MUTATED

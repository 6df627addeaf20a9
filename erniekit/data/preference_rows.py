"""What a row of preferences says: a prompt and answers to it, compared with each other or judged one by one.

PAIR_FORMATS are for DPO and RM, JUDGED_FORMATS for KTO; the formats have the names of those of dialogues:

* `erniekit`: src, tgt, response, sort: the higher `sort`, the better the response
* `alpaca`: question, or instruction with input and history, then chosen and rejected; for KTO output and label
* `chatml`: messages (or conversations, or prompt: messages or text), then chosen and rejected, each a message, messages
  or text; without a prompt, two whole conversations that begin alike. For KTO completion and label; without a
  completion, the last answer of the messages is judged

For KTO a row with chosen and rejected is a desirable and an undesirable answer. Knows no files and no tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from erniekit.data.fields import (
    Format,
    Row,
    excerpt,
    flags,
    json_value,
    note_unused,
    optional,
    required,
    string,
    string_list,
    strings,
)
from erniekit.data.lines import BadRow
from erniekit.data.messages import read_messages, read_tools, speaker
from erniekit.data.preferences import Answer, Answers, shared_length
from erniekit.data.rendering import Message
from erniekit.data.rows import alpaca_history, alpaca_query

_Talk = list[tuple[Message, Any]]  # messages with their labels

_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
_SCORE_COLUMNS = frozenset(name for names in _SCORES for name in names)
_MOST_SCORE = 1e30
_LABELS = ("label", "kto_tag")
_PROMPTS = ("messages", "conversations", "prompt")


def _ranked(row: Row, unused: set[str]) -> Answers:
    """ERNIEKit's row, its responses in the order of `sort`."""
    prompt, responses, ranks = _responses(row)
    if len(responses) < 2:
        raise BadRow('"response" has only one answer; a comparison needs two')
    if len(set(ranks)) < len(ranks):
        raise BadRow(f'"sort" {excerpt(ranks)} does not say which answer is better: some are equal')
    scores = ranks if row.get("score") is None else _numbers(row, "score", len(responses))
    places = sorted(range(len(responses)), key=lambda place: -ranks[place])
    note_unused(row, PAIR_FORMATS["erniekit"].columns, unused)
    return _compared(prompt, [_answer_of(responses[place], scores[place]) for place in places])


def _ranked_one_by_one(row: Row, unused: set[str]) -> Answers:
    """ERNIEKit's row where `sort` says of each response by itself whether it is desirable."""
    prompt, responses, ranks = _responses(row)
    if not set(ranks) <= {0, 1}:
        raise BadRow(f'"sort" {excerpt(ranks)} must hold 1 for desirable and 0 for undesirable answers')
    note_unused(row, JUDGED_FORMATS["erniekit"].columns, unused)
    return Answers(prompt, tuple(_answer_of(texts, rank) for texts, rank in zip(responses, ranks, strict=True)))


def _responses(row: Row) -> tuple[tuple[Message, ...], list[list[str]], list[float]]:
    """The prompt, the responses as turns, and the rank of each."""
    queries, found = strings(row, "src"), _list_of(required(row, "response", "a list of answers"))
    past = _list_of(row.get("tgt"))
    answers = string_list(past, '"tgt"') if past else []
    if len(answers) != len(queries) - 1:
        raise BadRow(
            f'"src" has {len(queries)} turns and "tgt" has {len(answers)}; every query but the last needs its answer'
        )
    if not isinstance(found, list) or not found:
        raise BadRow(f'"response" must be a list of answers, not {excerpt(found)}')
    responses = [string_list(texts, f'"response"[{position}]') for position, texts in enumerate(found)]
    for position, texts in enumerate(responses):
        if len(texts) % 2 == 0:
            raise BadRow(f'"response"[{position}] has {len(texts)} strings; answer, user, answer ... are an odd number')
    prompt = _prompt_of(row, zip(queries, answers, strict=False), queries[-1])
    return prompt, responses, _numbers(row, "sort", len(found))


def _list_of(value: Any) -> Any:
    """A list that a table holds as JSON text; another value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def _numbers(row: Row, key: str, count: int) -> list[float]:
    """A number for each answer."""
    values = json_value(required(row, key, "a number for each answer"))
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise BadRow(f'"{key}" must be a list of numbers, not {excerpt(values)}')
    if len(values) != count:
        raise BadRow(f'"{key}" has {len(values)} values for {count} answers')
    return values


def _is_number(value: Any) -> bool:
    """Whether it is a number whose differences are numbers too."""
    return isinstance(value, int | float) and abs(value) <= _MOST_SCORE


def _answer_of(texts: Sequence[str], score: float) -> Answer:
    """An answer of turns: the assistant's, the user's, the assistant's ..."""
    roles = ("assistant", "user")
    messages = tuple({"role": roles[place % 2], "content": text} for place, text in enumerate(texts))
    return Answer(messages, (True,) * (len(texts) // 2 + 1), score)


def _prompt_of(row: Row, turns: Iterable[tuple[str, str]], query: str) -> tuple[Message, ...]:
    """A prompt of turns of text."""
    system = optional(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return (*messages, {"role": "user", "content": query})


def _compared(prompt: tuple[Message, ...], answers: Sequence[Answer], tools: Any = ()) -> Answers:
    """Answers in their order, the best first."""
    said = [answer.messages for answer in answers]
    if any(one in said[:place] for place, one in enumerate(said)):
        raise BadRow("two of the answers are the same")
    scores = [answer.score for answer in answers]
    if any(worse > better for better, worse in itertools.pairwise(scores)):
        raise BadRow(f"the scores {excerpt(scores)} contradict the order of the answers, the best of which comes first")
    return Answers(prompt, tuple(answers), tools)


def _alpaca_pair(row: Row, unused: set[str]) -> Answers:
    chosen, rejected = (string(row, key) for key in ("chosen", "rejected"))
    scores = _scores(row)
    note_unused(row, PAIR_FORMATS["alpaca"].columns, unused)
    return _compared(_alpaca_prompt(row), [_answer_of([chosen], scores[0]), _answer_of([rejected], scores[1])])


def _alpaca_prompt(row: Row) -> tuple[Message, ...]:
    key = "instruction" if "instruction" in row and "question" not in row else "question"
    return _prompt_of(row, alpaca_history(row), alpaca_query(row, string(row, key)))


def _alpaca_judged(row: Row, unused: set[str]) -> Answers:
    if "chosen" in row:
        return _apart(_alpaca_pair(row, unused))
    key = "completion" if "completion" in row and "output" not in row else "output"
    answer = _answer_of([string(row, key)], _label(row))
    note_unused(row, JUDGED_FORMATS["alpaca"].columns, unused)
    return Answers(_alpaca_prompt(row), (answer,))


def _scores(row: Row) -> tuple[float, float]:
    """The scores of the chosen and the rejected answer; 1 and 0 where the row has none."""
    for names in _SCORES:
        values = [json_value(row.get(name)) for name in names]
        if values != [None, None]:
            for name, value in zip(names, values, strict=True):
                if not _is_number(value):
                    raise BadRow(f'"{name}" must be a number, not {excerpt(value)}')
            return values[0], values[1]
    return 1.0, 0.0


def _label(row: Row) -> float:
    """1 of a desirable answer, 0 of an undesirable one."""
    key = next((name for name in _LABELS if name in row), _LABELS[0])
    value = required(row, key, "true or false")
    known = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}
    word = str(value).strip().lower()
    if not isinstance(value, bool | int | str) or word not in known:
        raise BadRow(f'"{key}" must be true or false, not {excerpt(value)}')
    return known[word]


def _apart(pair: Answers) -> Answers:
    """The answers of a pair, judged one by one."""
    answers = [replace(answer, score=score) for answer, score in zip(pair.answers, (1.0, 0.0), strict=True)]
    return replace(pair, answers=tuple(answers))


def _chatml_pair(row: Row, unused: set[str]) -> Answers:
    found = {name: _as_messages(required(row, name, "an answer"), name) for name in ("chosen", "rejected")}
    are_whole = [speaker(raw[0]) in ("user", "system") for raw in found.values()]
    if any(are_whole) and not all(are_whole):
        raise BadRow("of chosen and rejected one is a whole conversation and the other is an answer alone")
    talks, cut = (_conversations if all(are_whole) else _continuations)(row, found, unused)
    prompt, answers = _split(talks, cut, _scores(row))
    note_unused(row, PAIR_FORMATS["chatml"].columns, unused)
    return _compared(prompt, answers, read_tools(row))


def _chatml_judged(row: Row, unused: set[str]) -> Answers:
    if "chosen" in row:
        return _apart(_chatml_pair(row, unused))
    key = "completion" if row.get("completion") is not None else _prompt_column(row)
    raw = _as_messages(row[key], key)
    if key == "completion" and speaker(raw[0]) not in ("user", "system"):
        talks, cut = _continuations(row, {key: raw}, unused)
    else:
        talks = [_with_system(row, _read(raw, key, unused))]
        cut = len(talks[0]) - 1
    prompt, answers = _split(talks, cut, (_label(row),))
    note_unused(row, JUDGED_FORMATS["chatml"].columns, unused)
    return Answers(prompt, tuple(answers), read_tools(row))


def _prompt_column(row: Row) -> str:
    key = next((name for name in _PROMPTS if row.get(name) is not None), _PROMPTS[0])
    required(row, key, "the prompt, a list of messages")
    return key


def _as_messages(value: Any, key: str) -> list[Any]:
    """Messages, a single one, or text, as a list of messages."""
    value = _list_of(value)
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str):
        return [{"role": "user" if key in _PROMPTS else "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow(f'"{key}" must be text, a message or a list of messages, not {excerpt(value)}')
    return value


def _read(raw: list[Any], key: str, unused: set[str], *, is_start: bool = True) -> _Talk:
    try:
        messages, labels = read_messages(raw, key, unused, is_start=is_start)
    except BadRow as error:
        raise BadRow(f'"{key}": {error}') from error
    return list(zip(messages, labels, strict=True))


def _with_system(row: Row, talk: _Talk) -> _Talk:
    system = optional(row, "system")
    if not system:
        return talk
    if talk and talk[0][0]["role"] == "system":
        raise BadRow('"system" stands in the row and among its messages')
    return [({"role": "system", "content": system}, None), *talk]


def _continuations(row: Row, found: Mapping[str, list[Any]], unused: set[str]) -> tuple[list[_Talk], int]:
    """The prompt with each of the answers, and how long it is."""
    key = _prompt_column(row)
    prompt = _with_system(row, _read(_as_messages(row[key], key), key, unused))
    answers = [_read(raw, name, unused, is_start=False) for name, raw in found.items()]
    return [prompt + answer for answer in answers], len(prompt)


def _conversations(row: Row, found: Mapping[str, list[Any]], unused: set[str]) -> tuple[list[_Talk], int]:
    """Whole conversations, and how far the prompt goes that they share."""
    talks = [_with_system(row, _read(raw, name, unused)) for name, raw in found.items()]
    messages = [[message for message, _ in talk] for talk in talks]
    cut = shared_length(messages)
    while cut and any(cut == len(said) or said[cut]["role"] != "assistant" for said in messages):
        cut -= 1
    if any(row.get(name) is not None for name in _PROMPTS):
        key = _prompt_column(row)
        given = [message for message, _ in _read(_as_messages(row[key], key), key, unused)]
        shared = [message for message in messages[0][:cut] if message["role"] != "system"]
        given = [message for message in given if message["role"] != "system"]
        if given[: len(shared)] != shared[: len(given)]:
            raise BadRow(f'"{key}" is not how {" and ".join(found)} begin')
    return talks, cut


def _split(talks: Sequence[_Talk], cut: int, scores: Sequence[float]) -> tuple[tuple[Message, ...], list[Answer]]:
    """The prompt of conversations, and what comes after it in each."""
    prompt = tuple(message for message, _ in talks[0][:cut])
    roles = [message["role"] for message in prompt if message["role"] != "system"]
    if not roles or roles[0] != "user" or roles[-1] == "assistant":
        found = f"from {roles[0]} to {roles[-1]}" if roles else "without a message"
        raise BadRow(f"a prompt begins with the user and ends with the user or a tool, not {found}")
    answers = []
    for talk, score in zip(talks, scores, strict=True):
        messages = tuple(message for message, _ in talk[cut:])
        roles = [message["role"] for message in messages]
        if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
            found = f"from {roles[0]} to {roles[-1]}" if roles else "without a message"
            raise BadRow(f"an answer begins and ends with the assistant, not {found}")
        labels = [label for message, label in talk[cut:] if message["role"] == "assistant"]
        trained = flags([1 if label is None else label for label in labels], "label")
        if not any(trained):
            raise BadRow("no turn of an answer has label 1")
        answers.append(Answer(messages, tuple(map(bool, trained)), score))
    return prompt, answers


_PAIR = frozenset({"chosen", "rejected", "system"}) | _SCORE_COLUMNS
_ASKED = ("question", "instruction")

PAIR_FORMATS = {  # in the order in which a row is taken for one of them
    "erniekit": Format(
        _ranked,
        frozenset({"system", "src", "tgt", "response", "sort", "score"}),
        (("src", "response", "sort"),),
        {"prompt": "src"},
    ),
    "alpaca": Format(
        _alpaca_pair,
        _PAIR | {"question", "instruction", "input", "history"},
        tuple((asked, "chosen", "rejected") for asked in _ASKED),
        {"prompt": "question", "query": "input"},
    ),
    "chatml": Format(_chatml_pair, _PAIR | {*_PROMPTS, "tools"}, (("chosen", "rejected"),), {}),
}
JUDGED_FORMATS = {
    "erniekit": replace(PAIR_FORMATS["erniekit"], parse=_ranked_one_by_one),
    "alpaca": Format(
        _alpaca_judged,
        PAIR_FORMATS["alpaca"].columns | {"output", "completion", *_LABELS},
        (
            *PAIR_FORMATS["alpaca"].required,
            *itertools.product(_ASKED, ("output", "completion"), _LABELS),
        ),
        {**PAIR_FORMATS["alpaca"].synonyms, "response": "output"},
    ),
    "chatml": Format(
        _chatml_judged,
        PAIR_FORMATS["chatml"].columns | {"completion", *_LABELS},
        (("chosen", "rejected"), *itertools.product((*_PROMPTS, "completion"), _LABELS)),
        {"response": "completion"},
    ),
}

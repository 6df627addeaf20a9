"""What a row of a data file says: a dialogue to learn from, or a document.

One parser for each format: `erniekit`, `alpaca`, `chatml` (OpenAI's messages, and conversations with from/value),
`text`. A row that cannot be used is a BadRow with the reason; what a parser leaves aside is noted in `unused`.
Knows no files and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from erniekit.data.chat import Dialogue, Message
from erniekit.data.fields import (
    Format,
    Row,
    excerpt,
    flags,
    json_value,
    kind_of_value,
    note_unused,
    optional,
    required,
    string,
    strings,
)
from erniekit.data.lines import BadRow
from erniekit.data.messages import read_messages, read_tools


def _parse_text(row: Row, unused: set[str]) -> str:
    text = required(row, "text", "a string")
    if not isinstance(text, str):
        raise BadRow(f'"text" must be a string, not {kind_of_value(text)}')
    if not text.strip():
        raise BadRow('"text" is empty')
    note_unused(row, FORMATS["text"].columns, unused)
    return text


def _parse_erniekit(row: Row, unused: set[str]) -> Dialogue:
    if "messages" in row:  # ERNIEKit's rows of function calls
        return _parse_chatml(row, unused)
    queries, answers = strings(row, "src"), strings(row, "tgt")
    if len(queries) != len(answers):
        raise BadRow(f'"src" has {len(queries)} turns and "tgt" has {len(answers)}; each query needs its answer')
    labels = json_value(row.get("label"))
    labels = [1] * len(answers) if labels is None else flags(labels, "label")
    if len(labels) != len(answers):
        raise BadRow(f'"label" has {len(labels)} values for {len(answers)} turns')
    note_unused(row, FORMATS["erniekit"].columns, unused)
    return _dialogue_of(optional(row, "system"), zip(queries, answers, strict=True), trained=map(bool, labels))


def _parse_alpaca(row: Row, unused: set[str]) -> Dialogue:
    query, answer = (string(row, key) for key in ("instruction", "output"))
    turns = [*alpaca_history(row), (alpaca_query(row, query), answer)]
    note_unused(row, FORMATS["alpaca"].columns, unused)
    return _dialogue_of(optional(row, "system"), turns, trained=[True] * len(turns))


def alpaca_history(row: Row) -> list[tuple[str, str]]:
    """The queries and answers before the last query."""
    history = json_value(row.get("history")) or []
    if not isinstance(history, list):
        raise BadRow(f'"history" must be a list of [query, answer], not {kind_of_value(history)}')
    turns: list[tuple[str, str]] = []
    for position, turn in enumerate(history):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow(f'"history"[{position}] must be [query, answer], not {excerpt(turn)}')
        if not all(text.strip() for text in turn):
            raise BadRow(f'"history"[{position}] is empty')
        turns.append((turn[0], turn[1]))
    return turns


def alpaca_query(row: Row, instruction: str) -> str:
    """The last query: an instruction and perhaps what it is about."""
    extra = optional(row, "input")
    return f"{instruction}\n{extra}" if extra.strip() else instruction


def _parse_chatml(row: Row, unused: set[str]) -> Dialogue:
    key = "conversations" if "messages" not in row and "conversations" in row else "messages"
    found = json_value(required(row, key, "a list of messages"))
    messages, labels = read_messages(found, key, unused)
    system = optional(row, "system")
    if system:
        if messages and messages[0]["role"] == "system":
            raise BadRow('"system" stands in the row and among its messages')
        messages.insert(0, {"role": "system", "content": system})
        labels.insert(0, None)
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles[0] != "user" or roles[-1] != "assistant":
        found = f"from {roles[0]} to {roles[-1]}" if roles else "without a message"
        raise BadRow(f"a dialogue begins with the user and ends with the assistant, not {found}")
    note_unused(row, FORMATS["chatml"].columns, unused)
    return Dialogue(tuple(messages), _trained(row, messages, labels), read_tools(row))


def _trained(row: Row, messages: list[Message], labels: list[Any]) -> tuple[bool, ...]:
    """Which answers count: by a label in each message, or by the row's, for each answer or for each message."""
    answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    of_row = json_value(row.get("label"))
    own = [labels[position] for position in answers]
    if of_row is None:
        return tuple(map(bool, flags([1 if label is None else label for label in own], "label")))
    if any(label is not None for label in own):
        raise BadRow('"label" stands in the row and in its messages')
    if not isinstance(of_row, list):
        return tuple(map(bool, flags([of_row] * len(answers), "label")))
    found = flags(of_row, "label")
    if len(found) == len(messages):
        found = [found[position] for position in answers]
    if len(found) != len(answers):
        raise BadRow(f'"label" has {len(found)} values for {len(answers)} answers in {len(messages)} messages')
    return tuple(map(bool, found))


def _dialogue_of(system: str, turns: Iterable[tuple[str, str]], *, trained: Iterable[bool]) -> Dialogue:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for query, answer in turns:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    return Dialogue(tuple(messages), tuple(trained))


FORMATS = {  # in the order in which a row is taken for one of them
    "chatml": Format(
        _parse_chatml,
        frozenset({"messages", "conversations", "tools", "label", "system"}),
        (("messages",), ("conversations",)),
        {},
    ),
    "erniekit": Format(
        _parse_erniekit,
        frozenset({"system", "src", "tgt", "label", "messages", "tools"}),
        (("src", "tgt"), ("messages",)),
        {"prompt": "src", "response": "tgt"},
    ),
    "alpaca": Format(
        _parse_alpaca,
        frozenset({"instruction", "input", "output", "history", "system"}),
        (("instruction", "output"),),
        {"prompt": "instruction", "query": "input", "response": "output"},
    ),
    "text": Format(_parse_text, frozenset({"text"}), (("text",),), {}),
}

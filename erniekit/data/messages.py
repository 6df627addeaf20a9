"""The messages of a conversation as a row of data holds them: OpenAI's, and conversations with from/value.

`read_messages` checks them one by one and gives them the form that chat templates take. Knows no rows and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from erniekit.data.fields import Row, excerpt, json_value, kind_of_value
from erniekit.data.lines import BadRow
from erniekit.data.rendering import Message

_FROM = {  # the words of conversations with from/value, and newer names of OpenAI's roles
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    *("role", "content", "from", "value", "tool_calls", "function_call", "reasoning_content", "tool_call_id"),
    *("name", "label", "weight"),
}


def read_messages(found: Any, key: str, unused: set[str], *, is_start: bool = True) -> tuple[list[Message], list[Any]]:
    """The messages in the column `key`, and the label of each, None where it has none.

    A system message may only be the first one of the start of a conversation; an empty one is left out.
    """
    if not isinstance(found, list) or not found:
        raise BadRow(f'"{key}" must be a list of messages, not {excerpt(found)}')
    messages: list[Message] = []
    labels: list[Any] = []
    calls: list[str | None] = []  # ids of the calls that wait for a result
    for position, raw in enumerate(found, start=1):
        try:
            message = _message(raw, calls, is_first=is_start and not messages)
        except BadRow as error:
            raise BadRow(f"message {position}: {error}") from error
        if not raw.keys() <= _MESSAGE_KEYS:
            unused.update(f"{key}.{name}" for name in raw.keys() - _MESSAGE_KEYS)
        if message is not None:
            messages.append(message)
            labels.append(raw.get("label", raw.get("weight")))
    return messages, labels


def speaker(raw: Any) -> Any:
    """The role of a message, in our word for it; what it says itself if that is no role."""
    word = raw.get("role", raw.get("from")) if isinstance(raw, dict) else None
    return _FROM.get(word, word) if isinstance(word, str) else word


def _message(raw: Any, calls: list[str | None], *, is_first: bool) -> Message | None:
    """One message as a chat template takes it, None for an empty system prompt; `calls` is kept up to date."""
    if not isinstance(raw, dict):
        raise BadRow(f"must be an object, not {kind_of_value(raw)}")
    word, content = raw.get("role", raw.get("from")), raw.get("content", raw.get("value"))
    role = speaker(raw)
    if not isinstance(word, str) or role not in _ROLES:
        raise BadRow(f"unknown role {excerpt(word)}; known are {', '.join(_ROLES)}")
    if role == "tool":
        _take_result(raw, calls)
        return {"role": "tool", "content": content if isinstance(content, str) else _text_or_json(content)}
    calls.clear()
    if role == "assistant":
        return _answer(raw, word, content, calls)
    text = _text(content)
    if role == "user" and not text.strip():
        raise BadRow("the content is empty")
    if role == "system" and not is_first:
        raise BadRow("a system message must come first")
    return {"role": role, "content": text} if text else None


def _answer(raw: Row, word: str, content: Any, calls: list[str | None]) -> Message:
    """A message of the assistant: what it says, thinks, and calls."""
    found = raw.get("tool_calls") or raw.get("function_call")
    if word == "function_call":
        content, found = "", content
    text, thought = _text(content), raw.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise BadRow(f'"reasoning_content" must be a string, not {kind_of_value(thought)}')
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if found:
        found = json_value(found)
        found = found if isinstance(found, list) else [found]
        message["tool_calls"] = [_call(call) for call in found]
        calls += [call.get("id") for call in found]
    elif not text.strip():
        raise BadRow("the answer is empty")
    elif text.rstrip().endswith("</think>"):
        raise BadRow("the answer is empty after its thought")
    return message


def _call(raw: Any) -> Message:
    """A call as templates take it: {"type": "function", "function": {"name", "arguments": an object}}."""
    if not isinstance(raw, dict):
        raise BadRow(f"a tool call must be an object, not {kind_of_value(raw)}")
    function = raw.get("function", raw)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRow(f"a tool call has no name: {excerpt(raw)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError as error:
            raise BadRow(f"the arguments of {name} are not JSON ({error.msg}): {excerpt(arguments)}") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise BadRow(f"the arguments of {name} must be a JSON object, not {kind_of_value(arguments)}")
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}}


def _take_result(raw: Row, calls: list[str | None]) -> None:
    """Match a tool's result with a call that waits for one."""
    if not calls:
        raise BadRow("a tool result without a call")
    wanted = raw.get("tool_call_id")
    if wanted is None or calls == [None] * len(calls):
        calls.pop(0)
    elif wanted in calls:
        calls.remove(wanted)
    else:
        raise BadRow(f"a tool result for {excerpt(wanted)}, which no call has")


def _text(content: Any) -> str:
    """The text of a message: a string, null, or a list of pieces of text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = _pieces_of_text(content)
    if texts is None:
        raise BadRow(f"the content must be text, not {excerpt(content)}")
    return "".join(texts)


def _text_or_json(content: Any) -> str:
    """The result of a tool: text, or any value as JSON."""
    texts = [] if content is None else _pieces_of_text(content)
    return orjson.dumps(content, default=str).decode() if texts is None else "".join(texts)


def _pieces_of_text(content: Any) -> list[str] | None:
    """The strings of [{"type": "text", "text": ...}, ...]; None if it is anything else."""
    if not isinstance(content, list):
        return None
    found = [piece.get("text") for piece in content if isinstance(piece, dict) and piece.get("type") == "text"]
    texts = [text for text in found if isinstance(text, str)]
    return texts if len(texts) == len(content) else None


def read_tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The functions that may be called, as JSON schemas."""
    tools = json_value(row.get("tools")) or []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f'"tools" must be a list of objects, not {excerpt(tools)}')
    return tuple(tools)

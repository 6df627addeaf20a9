"""From dialogues to what a model is asked and what it is trained on.

`encode_prompt` is a conversation up to where the assistant speaks; `encode_samples` is what a dialogue teaches: the
same tokens, and after them the answer. Knows nothing of files and of packing.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from erniekit.base.errors import DataError
from erniekit.config.data import CHAT_TEMPLATES
from erniekit.data.rendering import Message, choose_template, fitted, is_base, render
from erniekit.data.tokenizer import Tokenizer

__all__ = [
    "UNTRAINED",
    "Dialogue",
    "Encoded",
    "Message",
    "choose_template",
    "encode_dialogue",
    "encode_prompt",
    "encode_samples",
    "render",
]

UNTRAINED = -100
NO_ROOM = "nothing to train is left, with "  # begins the reason why a row that is too long was dropped
TURN_END = "<|im_end|>"  # of the thinking models; the base format ends a turn with the tokenizer's sep_token


@dataclass(frozen=True)
class Dialogue:
    """One conversation to learn from, as a chat template takes it."""

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]  # for each message of the assistant: whether it counts in the loss
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the functions that may be called


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each position the id to predict there (already shifted) or UNTRAINED."""

    input_ids: list[int]
    labels: list[int]
    shortened: str = ""  # what was left out to fit
    closing: int | None = None  # the token behind the last one, which ends the last answer; None if that was cut

    @property
    def num_trained(self) -> int:
        """How many positions count in the loss."""
        return len(self.labels) - self.labels.count(UNTRAINED)


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    allow_special: bool = False,
) -> list[int]:
    """The ids of a conversation up to where the assistant speaks: those of the rendered text, as every server has them.

    (`encode_samples` tokenises answers apart, so the first token of a past answer may differ from training.)
    Names of special tokens inside the messages stay text unless `allow_special`.
    """
    template = choose_template(tokenizer) if template is None else template
    talk = _Talk(tokenizer, messages, template, tools=tools, variables=variables, allow_special=allow_special)
    return talk.ids(talk.prompt(len(messages)))


def encode_dialogue(
    tokenizer: Tokenizer,
    dialogue: Dialogue,
    *,
    template: str | None = None,
    max_len: int | None = None,
    allow_special: bool = False,
) -> Encoded:
    """The sample that a dialogue makes; see `encode_samples`. Raises DataError if it makes several."""
    samples = encode_samples(tokenizer, dialogue, template=template, max_len=max_len, allow_special=allow_special)
    if len(samples) != 1:
        raise DataError(f"in this chat template the dialogue makes {len(samples)} samples, not one")
    return samples[0]


def encode_samples(
    tokenizer: Tokenizer,
    dialogue: Dialogue,
    *,
    template: str | None = None,
    max_len: int | None = None,
    allow_special: bool = False,
) -> list[Encoded]:
    """A dialogue with its targets: what the assistant says where `trained`, and the token that ends its turn.

    The tokens up to an answer are those of `encode_prompt`, the answer is tokenised apart. Where a template shows a
    past answer otherwise than it asks for it (without its thought), the dialogue makes several samples, each of the
    answers that it shows as they are asked for. What follows the last trained answer is left out.

    The end of a turn is <|end_of_sentence|>, for which the target is </s>, the token at which serving stops, or
    <|im_end|>, which is its own target; where a template has neither the target is </s>. The token after it is never
    trained.

    A dialogue longer than `max_len` loses its oldest turns, never the system prompt, and begins with the user; if the
    last turn alone is too long, its end is cut. Ask `num_trained` whether anything to learn is left.
    """
    template = choose_template(tokenizer) if template is None else template
    if (turns := _plain_turns(dialogue)) and is_base(template, tokenizer.role_names):
        return [_encode_base(tokenizer, *turns, trained=dialogue.trained, max_len=max_len, allow_special=allow_special)]
    encode = functools.partial(_encode_views, tokenizer, template=template, allow_special=allow_special)
    return [
        _shortened(whole, view, encode=encode, max_len=max_len) if max_len and len(whole.input_ids) > max_len else whole
        for view, whole in encode(dialogue)
    ]


def _encode_base(
    tokenizer: Tokenizer,
    system: str,
    pairs: Sequence[tuple[str, str]],
    *,
    trained: Sequence[bool],
    max_len: int | None,
    allow_special: bool,
) -> Encoded:
    """Turns of text in the base format, without a template: system prompt, query and answer each tokenised apart.

    The last <|end_of_sentence|> is only a target, so it takes no place.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, allow_special=allow_special)

    head = [tokenizer.cls_id, *(encode(f"{system}\n") if system else [])]
    turns = [
        (encode(f"User: {query}\nAssistant: "), encode(answer), counts)
        for (query, answer), counts in zip(pairs, trained, strict=True)
    ]
    lengths = [len(query) + len(answer) + 1 for query, answer, _ in turns]
    room = sum(lengths) if max_len is None else max_len + 1 - len(head)
    first = 0
    while sum(lengths[first:]) > room and first < len(turns) - 1:
        first += 1
    ids, targets = list(head), [UNTRAINED] * len(head)
    for query, answer, counts in turns[first:]:
        ids += [*query, *answer, tokenizer.sep_id]
        targets += [UNTRAINED] * len(query)
        targets += [*answer, tokenizer.eos_id] if counts else [UNTRAINED] * (len(answer) + 1)
    fitting = len(ids) if max_len is None else max_len + 1
    lost = _lost(first, len(turns), max(len(ids) - fitting, 0), max_len)
    closing = ids[-1] if len(ids) <= fitting else None
    return Encoded(ids[:fitting][:-1], targets[:fitting][1:], lost, closing)


def _plain_turns(dialogue: Dialogue) -> tuple[str, list[tuple[str, str]]] | None:
    """The system prompt (perhaps empty) and queries with their answers, if that is all there is."""
    messages = list(dialogue.messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    roles = [message["role"] for message in messages]
    if dialogue.tools or roles != ["user", "assistant"] * (len(roles) // 2):
        return None
    if any("tool_calls" in message or "reasoning_content" in message for message in messages):
        return None
    texts = [message["content"] for message in messages]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


class _Answer(NamedTuple):
    """A trained answer in the text of its view."""

    position: int  # its message
    start: int
    end: int  # behind the token that ends its turn


class _Talk:
    """A conversation in a template. Names of special tokens inside it are broken by a mark until they are tokens."""

    def __init__(
        self, tokenizer: Tokenizer, messages: Sequence[Message], template: str, *, tools: Sequence[Any] | None,
        variables: Mapping[str, Any] | None = None, allow_special: bool,
    ) -> None:  # fmt: skip
        messages = fitted(messages, tools, template)
        self._tokenizer, self._template, self._mark = tokenizer, template, ""
        if not allow_special and any(map(tokenizer.names_special, _strings([messages, tools, variables]))):
            # The template's own special tokens must act, the user's must not: break the user's with a character that
            # is nowhere in the text, and take it out again when the template's have been found.
            used = set(template).union(*_strings([messages, tools, variables]))
            self._mark = next(char for code in range(0xE000, 0xF900) if (char := chr(code)) not in used)
            messages, tools, variables = (
                _break_special(value, tokenizer, self._mark) for value in (messages, tools, variables)
            )
        self._messages, self._tools = messages, tools or None
        self._variables = {**tokenizer.role_names, **(variables or {})}
        self._ends = (tokenizer.role_names["sep_token"], tokenizer.role_names["eos_token"], TURN_END)

    def prompt(self, count: int) -> str:
        """The text in which the answer after the first `count` messages is asked for."""
        return self._render(count, add_generation_prompt=True)

    def answer(self, position: int) -> tuple[str, _Answer]:
        """The text up to the end of an answer, and where the answer stands in it."""
        prompt = self.prompt(position)
        text = self._render(position + 1, add_generation_prompt=False)
        if not text.startswith(prompt):
            raise DataError(
                "the chat template shows an answer otherwise than it asks for it, so it cannot be trained in; set "
                f"chat_template to one that comes with the program ({', '.join(CHAT_TEMPLATES)}) or to a jinja file"
            )
        ends = [at + len(name) for name in self._ends if (at := text.rfind(name, len(prompt))) >= 0]
        end = max(ends, default=len(prompt) + len(text[len(prompt) :].rstrip()))
        return text[:end], _Answer(position, len(prompt), end)

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered text."""
        ids: list[int] = []
        for position, part in enumerate(self._tokenizer.split_special(text)):
            if position % 2:
                ids.append(self._tokenizer.token_id(part))
            elif part:
                ids += self._tokenizer.encode(part.replace(self._mark, "") if self._mark else part)
        return ids

    def ends_turn(self, index: int) -> bool:
        """Whether a token ends the assistant's turn."""
        return self._tokenizer.piece(index) in self._ends

    def stop_of(self, index: int) -> int:
        """The token at which serving stops where the text has this one."""
        return self._tokenizer.eos_id if index == self._tokenizer.sep_id else index

    def _render(self, count: int, *, add_generation_prompt: bool) -> str:
        return render(
            self._messages[:count], self._template, add_generation_prompt=add_generation_prompt, tools=self._tools,
            variables=self._variables,
        )  # fmt: skip


def _encode_views(
    tokenizer: Tokenizer, dialogue: Dialogue, *, template: str, allow_special: bool
) -> Iterator[tuple[Dialogue, Encoded]]:
    """The samples of a dialogue, each with the dialogue cut down to it: its last message is its last answer."""
    talk = _Talk(tokenizer, dialogue.messages, template, tools=dialogue.tools, allow_special=allow_special)
    positions = [number for number, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    found = [talk.answer(at) for at, counts in zip(positions, dialogue.trained, strict=True) if counts]
    views: list[tuple[str, list[_Answer]]] = []
    for text, answer in reversed(found):
        if views and views[-1][0].startswith(text) and views[-1][1][-1].start >= answer.end:
            views[-1][1].append(answer)
        else:
            views.append((text, [answer]))
    for text, answers in reversed(views):
        last = answers[0].position
        kept = {answer.position for answer in answers}
        trained = tuple(position in kept for position in positions if position <= last)
        view = replace(dialogue, messages=dialogue.messages[: last + 1], trained=trained)
        yield view, _encode_view(talk, text, answers[::-1], eos_id=tokenizer.eos_id)


def _encode_view(talk: _Talk, text: str, answers: Sequence[_Answer], *, eos_id: int) -> Encoded:
    ids: list[int] = []
    targets: list[int] = []
    done, unended = 0, False
    for answer in answers:
        before, said = talk.ids(text[done : answer.start]), talk.ids(text[answer.start : answer.end])
        ids += before
        targets += [UNTRAINED] * len(before)
        if unended and before:
            targets[-len(before)] = eos_id
        ids += said
        done, unended = answer.end, not talk.ends_turn(said[-1])
        targets += said if unended else [*said[:-1], talk.stop_of(said[-1])]
    if unended:
        ids.append(eos_id)
        targets.append(eos_id)
    return Encoded(ids[:-1], targets[1:], closing=ids[-1])


def _shortened(
    whole: Encoded,
    view: Dialogue,
    *,
    encode: Callable[[Dialogue], Iterator[tuple[Dialogue, Encoded]]],
    max_len: int,
) -> Encoded:
    """The sample without its oldest turns: as few as must go."""
    starts = [number for number, message in enumerate(view.messages) if message["role"] == "user"]
    head = view.messages[:1] if view.messages[0]["role"] == "system" else ()

    def without(first: int) -> Encoded:
        gone = sum(message["role"] == "assistant" for message in view.messages[: starts[first]])
        shorter = replace(view, messages=head + view.messages[starts[first] :], trained=view.trained[gone:])
        *_, (_, encoded) = encode(shorter)
        return encoded

    numbers = range(1, len(starts))
    first = bisect.bisect_left(numbers, True, key=lambda number: len(without(number).input_ids) <= max_len) + 1
    first = min(first, len(starts) - 1)
    encoded = without(first) if first else whole
    num_cut = max(len(encoded.input_ids) - max_len, 0)
    lost = _lost(first, len(starts), num_cut, max_len)
    closing = None if num_cut else encoded.closing
    return Encoded(encoded.input_ids[:max_len], encoded.labels[:max_len], lost, closing)


def _lost(first: int, num_turns: int, num_cut: int, max_len: int | None) -> str:
    """What was left out to fit, in words."""
    lost = [f"the oldest {first} of {num_turns} turns left out"] if first else []
    if num_cut:
        lost.append(f"the last {num_cut} tokens cut off")
    return f"{' and '.join(lost)} to fit {max_len} tokens" if lost else ""


def _strings(value: Any) -> Iterator[str]:
    """Every string in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _break_special(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    """The same nested value with `mark` inside every special token's name in its strings."""
    if isinstance(value, str):
        return tokenizer.break_special(value, mark)
    if isinstance(value, Mapping):
        return {key: _break_special(item, tokenizer, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_break_special(item, tokenizer, mark) for item in value]
    return value

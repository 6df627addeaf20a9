"""From answers to a prompt to trees of tokens (data/batch.py): which answers are compared, and what fits.

Knows nothing of files and of packing.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from erniekit.base.errors import DataError
from erniekit.config.align import AlignConfig
from erniekit.data.chat import NO_ROOM, TURN_END, UNTRAINED, Dialogue, encode_samples
from erniekit.data.rendering import Message
from erniekit.data.tokenizer import Tokenizer

LEAST_MISMATCHED = 16  # tokens that stay free for another sample's answer (KTO)


@dataclass(frozen=True)
class Answer:
    """What is said after a prompt: begins and ends with the assistant."""

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]  # for each message of the assistant: whether it counts in the loss
    score: float  # of an answer that is judged by itself: 1 if it is desirable, else 0


@dataclass(frozen=True)
class Answers:
    """A prompt and answers to it: at least two, the best first; or any number that are judged one by one (KTO)."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class TreeRules:
    """What decides the trees of a row, beside its chat template."""

    stage: str
    max_prompt_len: int
    num_comparisons: int
    mask_eos: bool
    share_prompt: bool

    @classmethod
    def of(cls, align: AlignConfig, stage: str) -> TreeRules:
        """As the config says."""
        return cls(stage, align.max_prompt_len, align.num_comparisons, align.mask_out_eos_token, align.share_prompt)


class Tree(NamedTuple):
    """One or two answers to a prompt. `root` tokens are shared, then follow branches of these lengths; `num_first` of
    them are the first answer. The prompt has `prompt_length` tokens."""

    input_ids: list[int]
    labels: list[int]
    branches: tuple[int, ...]
    num_first: int
    root: int
    prompt_length: int
    score_delta: float
    desirable: bool


class _Path(NamedTuple):
    """A prompt with one answer or some turns of it, as tokens and targets; the first target is asked for after
    `prompt_length` tokens."""

    answer: int
    input_ids: list[int]
    labels: list[int]
    prompt_length: int


def encode_trees(
    content: Answers, tokenizer: Tokenizer, rules: TreeRules, *, template: str | None, max_len: int, allow_special: bool
) -> tuple[list[Tree], str, str]:
    """The trees of a row, and what happened to it: an action of the ledger and the reason, or nothing.

    A prompt that is longer than `max_prompt_len`, or too long for its answers, loses its oldest turns, never the system
    prompt. If the answers are still too long, their ends are cut, the longer one's first. A prompt whose last turn
    alone is too long is not used.
    """
    maker = _Trees(content, tokenizer, rules, template=template, max_len=max_len, allow_special=allow_special)
    count = len(content.answers)
    asked = [(place,) for place in range(count)] if rules.stage == "KTO" else comparisons(count, rules.num_comparisons)
    try:
        made = [maker.tree(compared) for compared in asked]
    except DataError as error:
        return [], "dropped", str(error)
    trees = [tree for tree, _ in made if tree is not None]
    reasons = [reason for _, reason in made if reason]
    if not trees:
        return [], "dropped", reasons[0]
    if reasons:
        share = f"{len(reasons)} of {len(made)} samples: " if len(made) > 1 else ""
        return trees, "truncated", f"{share}{reasons[0]}"
    if count > 2 and rules.stage != "KTO":
        return trees, "split", f"{count} answers make {len(trees)} of {count * (count - 1) // 2} comparisons"
    return trees, "", ""


def comparisons(num_answers: int, most: int) -> list[tuple[int, ...]]:
    """Which of the answers, the best first, are compared: those farthest apart first."""
    pairs = sorted(itertools.combinations(range(num_answers), 2), key=lambda pair: pair[0] - pair[1])
    return list(pairs[:most])


class _Trees:
    """Makes the trees of one row, and remembers what was encoded for them."""

    def __init__(
        self, content: Answers, tokenizer: Tokenizer, rules: TreeRules, *, template: str | None, max_len: int,
        allow_special: bool,
    ) -> None:  # fmt: skip
        self._content, self._tokenizer, self._rules = content, tokenizer, rules
        self._template, self._max_len, self._allow_special = template, max_len, allow_special
        self._starts = [place for place, message in enumerate(content.prompt) if message["role"] == "user"]
        self._known: dict[tuple[int, int], list[_Path]] = {}

    def tree(self, compared: Sequence[int]) -> tuple[Tree | None, str]:
        """The tree of these answers, and what was left out to make it fit; None and why, if it doesn't."""
        num_turns = len(self._starts)
        numbers = range(num_turns - 1)
        first = bisect.bisect_left(numbers, True, key=lambda number: self._fits(self._paths(number, compared)))
        paths = self._paths(first, compared)
        if _prompt_length(paths) > self._rules.max_prompt_len:
            which = "the last turn of the prompt alone" if num_turns > 1 else "the prompt"
            return None, f"{which} is longer than max_prompt_len {self._rules.max_prompt_len}"
        shorter = self._cut(paths)
        if not shorter:
            return None, f"{NO_ROOM}a prompt of {_prompt_length(paths)} tokens"
        said = [[path[1:] for path in shorter if path.answer == place] for place in compared]
        if len(said) == 2 and said[0] == said[1]:
            when = "" if shorter == paths else f", cut to fit max_seq_len {self._max_len}"
            return None, f"the chosen and the rejected answer are the same tokens{when}"
        lost = [f"the oldest {first} of {num_turns} turns of the prompt left out"] if first else []
        if num_cut := _num_tokens(paths) - _num_tokens(shorter):
            lost.append(f"the last {num_cut} tokens of the answers cut off")
        limits = [f"max_prompt_len {self._rules.max_prompt_len}"] * (first > 0) + [f"max_seq_len {self._max_len}"]
        reason = f"{' and '.join(lost)} to fit {' and '.join(limits)}" if lost else ""
        return self._joined(shorter, compared), reason

    def _paths(self, first: int, compared: Sequence[int]) -> list[_Path]:
        """The prompt from its turn `first` on, with each of the answers."""
        for place in compared:
            if (first, place) not in self._known:
                self._known[first, place] = list(self._paths_of(first, place))
        return [path for place in compared for path in self._known[first, place]]

    def _paths_of(self, first: int, place: int) -> Iterator[_Path]:
        prompt, answer = self._content.prompt, self._content.answers[place]
        head = prompt[:1] if first and prompt[0]["role"] == "system" else ()
        prompt = (*head, *prompt[self._starts[first] :]) if first else prompt
        past = sum(message["role"] == "assistant" for message in prompt)
        samples = encode_samples(
            self._tokenizer,
            Dialogue((*prompt, *answer.messages), (False,) * past + answer.trained, self._content.tools),
            template=self._template,
            allow_special=self._allow_special,
        )
        for encoded in samples:
            ids, labels = encoded.input_ids, encoded.labels
            if self._rules.mask_eos:
                labels = self._without_ends(labels)
            if set(labels) <= {UNTRAINED}:
                raise DataError("an answer has no token to train")
            if self._rules.stage == "RM" and encoded.closing is not None:  # what is scored has ended
                ids, labels = [*ids, encoded.closing], [*labels, UNTRAINED]
            asked = next(number for number, label in enumerate(labels) if label != UNTRAINED)
            yield _Path(place, ids, labels, asked + 1)

    def _without_ends(self, labels: list[int]) -> list[int]:
        """The targets without those that end a turn."""
        ends = (self._tokenizer.role_names["eos_token"], TURN_END)
        return [
            UNTRAINED if behind == UNTRAINED and label != UNTRAINED and self._tokenizer.piece(label) in ends else label
            for label, behind in zip(labels, [*labels[1:], UNTRAINED], strict=True)
        ]

    def _fits(self, paths: Sequence[_Path]) -> bool:
        is_short = _prompt_length(paths) <= self._rules.max_prompt_len
        return is_short and self._room(paths) >= sum(_answer_lengths(paths))

    def _root(self, paths: Sequence[_Path]) -> int:
        """How many tokens the answers share: all but the last one of the prompt."""
        if not self._rules.share_prompt:
            return 0
        length = _prompt_length(paths) - 1
        starts = [path.input_ids[:length] for path in paths]
        return length if starts.count(starts[0]) == len(starts) else shared_length(starts)

    def _room(self, paths: Sequence[_Path]) -> int:
        """The places that are left for the answers, behind the first token of each."""
        root, is_alone = self._root(paths), self._rules.stage == "KTO"
        taken = root + (len(paths) + is_alone) * (_prompt_length(paths) - root)
        return self._max_len - taken - (LEAST_MISMATCHED - 1) * is_alone

    def _cut(self, paths: list[_Path]) -> list[_Path]:
        """The answers without what doesn't fit; nothing if hardly anything does."""
        lengths, room = _answer_lengths(paths), self._room(paths)
        if room >= sum(lengths):
            return paths
        limits = range(max(lengths))
        limit = bisect.bisect_right(limits, room, key=lambda most: sum(min(length, most) for length in lengths)) - 1
        stop = _prompt_length(paths) + limit
        shorter = [path._replace(input_ids=path.input_ids[:stop], labels=path.labels[:stop]) for path in paths]
        has_all = all(set(path.labels) != {UNTRAINED} for path in shorter)
        return shorter if limit > 0 and has_all else []

    def _joined(self, paths: Sequence[_Path], compared: Sequence[int]) -> Tree:
        root = self._root(paths)
        ids, labels = list(paths[0].input_ids[:root]), [UNTRAINED] * root
        for path in paths:
            ids += path.input_ids[root:]
            labels += path.labels[root:]
        branches = tuple(len(path.input_ids) - root for path in paths)
        num_first = sum(path.answer == compared[0] for path in paths)
        scores = [self._content.answers[place].score for place in compared]
        delta, desirable = (scores[0] - scores[1], True) if len(scores) > 1 else (1.0, scores[0] > 0)
        return Tree(ids, labels, branches, num_first, root, _prompt_length(paths), delta, desirable)


def shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """How many items all sequences begin with."""
    alike = itertools.takewhile(lambda items: items.count(items[0]) == len(items), zip(*sequences, strict=False))
    return sum(1 for _ in alike)


def _prompt_length(paths: Sequence[_Path]) -> int:
    """Tokens up to where the first answer is asked for."""
    return min(path.prompt_length for path in paths)


def _answer_lengths(paths: Sequence[_Path]) -> list[int]:
    length = _prompt_length(paths)
    return [len(path.input_ids) - length for path in paths]


def _num_tokens(paths: Sequence[_Path]) -> int:
    return sum(len(path.input_ids) for path in paths)

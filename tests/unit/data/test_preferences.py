"""Trees of a prompt and its answers: the tokens are those of the whole dialogues, the targets what the assistant says,
and what does not fit is cut and told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erniekit.config.align import AlignConfig
from erniekit.data.chat import UNTRAINED, Dialogue, encode_samples
from erniekit.data.preferences import LEAST_MISMATCHED, Answer, Answers, Tree, TreeRules, comparisons, encode_trees
from erniekit.data.rendering import choose_template, named_template
from erniekit.data.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}{{ 'assistant> ' if add_generation_prompt }}"
TEMPLATES = {"base": None, "thinking": named_template("ernie_thinking"), "plain": PLAIN}
WORD = st.text(st.sampled_from("ab ~c\n你</s>|User:é"), min_size=1, max_size=9).filter(lambda text: text.strip())


def turns(texts: Sequence[str], first: str) -> tuple[dict[str, Any], ...]:
    roles = (first, "assistant" if first == "user" else "user")
    return tuple({"role": roles[place % 2], "content": text} for place, text in enumerate(texts))


def answers(prompt: Sequence[str], *said: Sequence[str], system: str = "", scores: Sequence[float] = ()) -> Answers:
    """A prompt of turns and answers of turns."""
    head = ({"role": "system", "content": system},) if system else ()
    scores = scores or range(len(said), 0, -1)
    made = [
        Answer(turns(texts, "assistant"), (True,) * (len(texts) // 2 + 1), score)
        for texts, score in zip(said, scores, strict=True)
    ]
    return Answers((*head, *turns(prompt, "user")), tuple(made))


def trees_of(
    tokenizer: Tokenizer, content: Answers, *, stage: str = "DPO", template: str | None = None, max_len: int = 10_000,
    allow_special: bool = False, **keys: Any,
) -> tuple[list[Tree], str, str]:  # fmt: skip
    rules = TreeRules.of(AlignConfig(**keys), stage)
    template = choose_template(tokenizer) if template is None else template
    return encode_trees(content, tokenizer, rules, template=template, max_len=max_len, allow_special=allow_special)


def tree_of(tokenizer: Tokenizer, content: Answers, **settings: Any) -> Tree:
    (tree,), action, reason = trees_of(tokenizer, content, **settings)
    assert (action, reason) == ("", "")
    return tree


def paths(tree: Tree) -> list[tuple[list[int], list[int]]]:
    """The prompt with each answer: ids and targets."""
    ends = list(itertools.accumulate(tree.branches, initial=tree.root))
    assert ends[-1] == len(tree.input_ids) == len(tree.labels)
    return [
        (tree.input_ids[: tree.root] + tree.input_ids[start:end], tree.labels[: tree.root] + tree.labels[start:end])
        for start, end in itertools.pairwise(ends)
    ]


def whole(
    tokenizer: Tokenizer, content: Answers, place: int, template: str | None
) -> list[tuple[list[int], list[int]]]:
    """An answer with its prompt, encoded as any dialogue is: perhaps in several samples."""
    past = sum(message["role"] == "assistant" for message in content.prompt)
    answer = content.answers[place]
    dialogue = Dialogue((*content.prompt, *answer.messages), (False,) * past + answer.trained)
    return [(found.input_ids, found.labels) for found in encode_samples(tokenizer, dialogue, template=template)]


def trained_text(tokenizer: Tokenizer, labels: Sequence[int]) -> str:
    return tokenizer.decode([label for label in labels if label != UNTRAINED], skip_special=False).replace("▁", " ")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(list(TEMPLATES)), share=st.booleans(), mask=st.booleans())
def test_a_tree_holds_the_whole_dialogues(
    *, bytewise: Tokenizer, data: st.DataObject, name: str, share: bool, mask: bool
) -> None:
    prompt = data.draw(st.lists(WORD, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1))
    said = st.lists(WORD, min_size=1, max_size=3).filter(lambda texts: len(texts) % 2 == 1)
    chosen, rejected = data.draw(st.lists(said, min_size=2, max_size=2, unique_by=repr))
    content = answers(prompt, chosen, rejected, system=data.draw(st.sampled_from(["", "s~"])))
    template = TEMPLATES[name]
    found, action, reason = trees_of(bytewise, content, template=template, share_prompt=share, mask_out_eos_token=mask)
    expected = [whole(bytewise, content, place, template) for place in (0, 1)]
    if expected[0] == expected[1]:
        assert (found, action) == ([], "dropped") and "same tokens" in reason
        return
    (tree,) = found
    assert tree.num_first == len(expected[0])
    ends, num_ends = [bytewise.eos_id, *([bytewise.token_id("<|im_end|>")] if name == "thinking" else [])], 0
    for (ids, labels), (wanted_ids, wanted) in zip(paths(tree), [*expected[0], *expected[1]], strict=True):
        assert ids == wanted_ids
        at = [place for place, label in enumerate(wanted) if label in ends]
        assert labels == [UNTRAINED if mask and place in at else label for place, label in enumerate(wanted)]
        num_ends += len(at)
    assert num_ends == sum((len(texts) + 1) // 2 for texts in (chosen, rejected))
    assert (tree.root == 0) == (not share)
    if name != "base":
        return
    for (_, labels), texts in zip(paths(tree), (chosen, rejected), strict=True):
        assert trained_text(bytewise, labels) == ("" if mask else "</s>").join([*texts[::2], ""])
    assert not share or tree.root == tree.prompt_length - 1  # every branch begins with the prompt's last token


def test_a_pair_by_hand(bytewise: Tokenizer) -> None:
    tree = tree_of(bytewise, answers(["~"], ["1"], ["2", "3", "4"], scores=(5, 2.5)), mask_out_eos_token=False)
    prompt = [bytewise.cls_id, *bytewise.encode("User: ~\nAssistant: ")]
    one, two, four = (bytewise.encode(text) for text in "124")
    between = [bytewise.sep_id, *bytewise.encode("User: 3\nAssistant: ")]
    assert tree.input_ids == [*prompt[:-1], prompt[-1], *one, prompt[-1], *two, *between, *four]
    untrained = [UNTRAINED] * (len(prompt) - 1)
    eos = bytewise.eos_id
    assert tree.labels == [*untrained, *one, eos, *two, eos, *[UNTRAINED] * (len(between) - 1), *four, eos]
    lengths = (1 + len(one), 1 + len(two) + len(between) + len(four))
    assert tree[2:] == (lengths, 1, len(prompt) - 1, len(prompt), 2.5, True)


def test_only_the_end_of_a_turn_is_left_untrained(bytewise: Tokenizer) -> None:
    tree = tree_of(bytewise, answers(["~"], ["1</s>2"], ["3"]), allow_special=True)
    (ids, labels), _ = paths(tree)
    said = [*bytewise.encode("1"), bytewise.eos_id, *bytewise.encode("2")]
    assert ids[tree.prompt_length :] == said
    assert labels[tree.prompt_length - 1 :] == [*said, UNTRAINED]


def test_an_answer_without_a_token_is_dropped(bytewise: Tokenizer) -> None:
    found = trees_of(bytewise, answers(["~"], ["1"], [""]))
    assert found == ([], "dropped", "an answer has no token to train")


def test_a_reward_model_reads_the_end_of_an_answer(bytewise: Tokenizer) -> None:
    content = answers(["~"], ["1"], ["2"])
    (ids, labels), _ = paths(tree_of(bytewise, content, stage="RM", mask_out_eos_token=False))
    ((wanted, targets),) = whole(bytewise, content, 0, None)
    assert ids == [*wanted, bytewise.sep_id]
    assert labels == [*targets, UNTRAINED]
    (ids, _), _ = paths(tree_of(bytewise, content, stage="RM", template=TEMPLATES["thinking"]))
    assert ids[-1] == bytewise.token_id("<|im_end|>")


def test_answers_that_are_judged_one_by_one_make_trees_of_their_own(bytewise: Tokenizer) -> None:
    content = answers(["~"], ["1"], ["2"], scores=(1, 0))
    trees, action, _ = trees_of(bytewise, content, stage="KTO", mask_out_eos_token=False)
    assert action == "" and [tree.desirable for tree in trees] == [True, False]
    for place, tree in enumerate(trees):
        assert paths(tree) == whole(bytewise, content, place, None)


def test_the_pairs_of_a_ranking() -> None:
    assert comparisons(2, 6) == [(0, 1)]
    assert comparisons(4, 6) == [(0, 3), (0, 2), (1, 3), (0, 1), (1, 2), (2, 3)]
    assert comparisons(4, 2) == [(0, 3), (0, 2)]


def test_a_ranking_makes_pairs_and_says_so(bytewise: Tokenizer) -> None:
    content = answers(["~"], ["1"], ["2"], ["3"], scores=(7, 4, 0))
    trees, *told = trees_of(bytewise, content)
    assert told == ["split", "3 answers make 3 of 3 comparisons"]
    assert [tree.score_delta for tree in trees] == [7, 3, 4]
    trees, *told = trees_of(bytewise, content, num_comparisons=1)
    assert told == ["split", "3 answers make 1 of 3 comparisons"] and len(trees) == 1


def test_a_long_prompt_loses_its_oldest_turns_and_keeps_the_system_prompt(bytewise: Tokenizer) -> None:
    content = answers(["1" * 50, "2", "3" * 20, "4", "5"], ["6"], ["7"], system="s")
    shorter = answers(["3" * 20, "4", "5"], ["6"], ["7"], system="s")
    expected = tree_of(bytewise, shorter)
    limit = expected.prompt_length
    trees, *told = trees_of(bytewise, content, max_prompt_len=limit)
    assert trees == [expected]
    limits = f"max_prompt_len {limit} and max_seq_len 10000"
    assert told == ["truncated", f"the oldest 1 of 3 turns of the prompt left out to fit {limits}"]
    trees, *told = trees_of(bytewise, content, max_prompt_len=limit - 1)
    assert trees == [tree_of(bytewise, answers(["5"], ["6"], ["7"], system="s"))] and "oldest 2 of 3" in told[1]
    limit = trees[0].prompt_length - 1
    reason = f"the last turn of the prompt alone is longer than max_prompt_len {limit}"
    assert trees_of(bytewise, content, max_prompt_len=limit) == ([], "dropped", reason)
    reason = "the prompt is longer than max_prompt_len 5"
    assert trees_of(bytewise, answers(["1"], ["6"], ["7"]), max_prompt_len=5) == ([], "dropped", reason)


def test_a_prompt_gives_way_to_its_answers(bytewise: Tokenizer) -> None:
    content = answers(["1" * 50, "2", "5"], ["6" * 9], ["7"])
    length = len(tree_of(bytewise, content).input_ids)
    trees, *told = trees_of(bytewise, content, max_len=length - 1)
    assert trees == [tree_of(bytewise, answers(["5"], ["6" * 9], ["7"]))]
    assert told[0] == "truncated" and "the oldest 1 of 2 turns of the prompt left out to fit" in told[1]


@pytest.mark.parametrize(("share", "stage"), [(True, "DPO"), (False, "DPO"), (True, "KTO"), (False, "KTO")])
def test_long_answers_are_cut_the_longer_one_first(*, bytewise: Tokenizer, share: bool, stage: str) -> None:
    content = answers(["1"], ["6" * 40], ["7" * 12]) if stage == "DPO" else answers(["1"], ["6" * 40])
    full = tree_of(bytewise, content, share_prompt=share, stage=stage)
    beside = full.prompt_length - full.root + LEAST_MISMATCHED - 1 if stage == "KTO" else 0
    length = len(full.input_ids) + beside
    assert tree_of(bytewise, content, share_prompt=share, stage=stage, max_len=length) == full
    for fewer in (1, 20):
        (tree,), *told = trees_of(bytewise, content, share_prompt=share, stage=stage, max_len=length - fewer)
        assert len(tree.input_ids) + beside == length - fewer
        assert tree.branches[0] == full.branches[0] - fewer and tree.root == full.root
        reason = f"the last {fewer} tokens of the answers cut off to fit max_seq_len {length - fewer}"
        assert told == ["truncated", reason]
        assert paths(tree)[1:] == paths(full)[1:]
        ids, labels = paths(full)[0]
        assert paths(tree)[0] == (ids[:-fewer], labels[:-fewer])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(WORD, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1),
    said=st.lists(WORD, min_size=2, max_size=3, unique=True),
    max_len=st.integers(2, 150),
    keys=st.fixed_dictionaries({"max_prompt_len": st.integers(1, 90), "share_prompt": st.booleans()}),
    stage=st.sampled_from(["DPO", "KTO", "RM"]),
)
def test_whatever_the_limits_what_comes_out_keeps_them(
    *, bytewise: Tokenizer, prompt: list[str], said: list[str], max_len: int, keys: dict[str, Any], stage: str
) -> None:
    content = answers(prompt, *[[text] for text in said])
    trees, action, reason = trees_of(bytewise, content, max_len=max_len, stage=stage, **keys)
    assert action in ("", "dropped", "truncated", "split") and bool(action) == bool(reason)
    assert bool(trees) == (action != "dropped")
    for tree in trees:
        beside = tree.prompt_length - tree.root + LEAST_MISMATCHED - 1 if stage == "KTO" else 0
        assert len(tree.input_ids) + beside <= max_len and tree.prompt_length <= keys["max_prompt_len"]
        for ids, labels in paths(tree):
            assert len(ids) == len(labels) and set(labels) != {UNTRAINED}
            assert ids[0] == bytewise.cls_id and set(labels[: tree.prompt_length - 1]) <= {UNTRAINED}


def test_calls_and_their_results_stand_in_prompts_and_in_answers(bytewise: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
    asked = {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [call]}
    result, said = {"role": "tool", "content": "20"}, {"role": "assistant", "content": "x", "reasoning_content": "u"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    one = Answers(
        ({"role": "user", "content": "q"}, asked, result),
        (Answer((said,), (True,), 1), Answer(({**said, "content": "y"},), (True,), 0)),
        (tool,),
    )
    tree = tree_of(bytewise, one, template=TEMPLATES["thinking"])
    assert [trained_text(bytewise, labels) for _, labels in paths(tree)] == [
        f"u\n</think>\n\n<response>\n{text}\n</response>\n" for text in "xy"
    ]
    two = Answers(one.prompt[:1], (Answer((asked, result, said), (True, True), 1), one.answers[1]), (tool,))
    chosen, rejected = paths(tree_of(bytewise, two, template=TEMPLATES["thinking"]))
    assert "<tool_call>" in trained_text(bytewise, chosen[1]) and "20" not in trained_text(bytewise, chosen[1])
    assert trained_text(bytewise, chosen[1]).endswith("x\n</response>\n")
    assert trained_text(bytewise, rejected[1]) == "u\n</think>\n\n<response>\ny\n</response>\n"


def test_both_answers_are_cut_where_both_are_long(bytewise: Tokenizer) -> None:
    content = answers(["1"], ["6" * 40], ["7" * 30])
    full = tree_of(bytewise, content)
    (tree,), _, reason = trees_of(bytewise, content, max_len=full.root + 2 + 2 * 20)
    assert [len(ids) - tree.prompt_length for ids, _ in paths(tree)] == [20, 20]
    lost = len(full.input_ids) - len(tree.input_ids)
    assert reason.startswith(f"the last {lost} tokens of the answers cut off")


def test_what_leaves_nothing_to_compare_is_dropped(bytewise: Tokenizer) -> None:
    content = answers(["1"], ["~" * 30 + "6"], ["~" * 30 + "7"])
    full = tree_of(bytewise, content)
    found = trees_of(bytewise, content, max_len=full.root + 2 + 2 * 20)
    reason = f"the chosen and the rejected answer are the same tokens, cut to fit max_seq_len {full.root + 42}"
    assert found == ([], "dropped", reason)
    found = trees_of(bytewise, content, max_len=full.root + 3)
    assert found == ([], "dropped", f"nothing to train is left, with a prompt of {full.prompt_length} tokens")


@pytest.mark.parametrize("stage", ["DPO", "RM"])
def test_turns_that_a_template_shows_otherwise_later_have_their_own_branches(bytewise: Tokenizer, stage: str) -> None:
    content, template = answers(["1"], ["2", "3", "4"], ["5"]), TEMPLATES["thinking"]
    tree = tree_of(bytewise, content, template=template, mask_out_eos_token=False, stage=stage)
    end = stage == "RM"
    assert [(ids[: len(ids) - end], labels[: len(ids) - end]) for ids, labels in paths(tree)] == [
        *whole(bytewise, content, 0, template), *whole(bytewise, content, 1, template)
    ]  # fmt: skip
    assert len(tree.branches) == 3 and tree.num_first == 2
    assert 0 < tree.root < tree.prompt_length - 1  # the last view shows the first answer otherwise
    unshared = tree_of(bytewise, content, template=template, mask_out_eos_token=False, stage=stage, share_prompt=False)
    assert paths(unshared) == paths(tree) and unshared.root == 0


def test_what_a_template_cannot_show_is_dropped_with_its_reason(bytewise: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    content = replace(answers(["1"], ["2"], ["5"]), tools=(tool,))
    found, action, reason = trees_of(bytewise, content)
    assert (found, action) == ([], "dropped") and reason.startswith("the chat template has no place for tools")

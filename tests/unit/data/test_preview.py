"""What a preview shows is what is trained: which tokens count, where documents end, and nothing acts in a page or a
terminal that came with the data."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from erniekit.config.data import DataConfig
from erniekit.data.build import TrainData, build_train_data
from erniekit.data.chat import UNTRAINED
from erniekit.data.preview import html_samples, sample_views, text_samples
from erniekit.data.tokenizer import Tokenizer

EVIL = "<script>alert(1)</script>\x1b[31m\n\"'&"


@pytest.fixture
def data(bytewise: Tokenizer, write_jsonl: Callable[..., str]) -> TrainData:
    rows = [
        {"src": ["1~", "3"], "tgt": ["2", "4"], "label": [1, 0]},
        {"src": [EVIL], "tgt": ["~~"]},
        {"src": ["5"], "tgt": ["6"]},
    ]
    config = DataConfig(train_dataset_path=[write_jsonl("a<b>.jsonl", rows)], max_seq_len=128, random_shuffle=False)
    return build_train_data(config, bytewise, stage="SFT", seed=1, rows_per_step=1)


def test_views_show_the_mask(data: TrainData, bytewise: Tokenizer) -> None:
    views = sample_views(data, bytewise, rows=2)
    assert [(view.step, view.number, view.row_length) for view in views] == [(0, 0, 128), (1, 0, 128)]
    for view in views:
        (row,) = data.rows(view.step)
        assert [document.name for document in view.documents] == [document.name for document in row.documents]
        for shown, document in zip(view.documents, row.documents, strict=True):
            inputs = [token for token in shown.tokens if token.is_input]
            assert [token.id for token in inputs] == document.input_ids.tolist()
            asked = [UNTRAINED, *document.labels.tolist()]
            trained = [label != UNTRAINED for label in asked[: len(shown.tokens)]]
            assert [token.trained for token in shown.tokens] == trained
            taught = [token.target[0] if token.target else token.id for token in shown.tokens if token.trained]
            assert taught == [label for label in asked if label != UNTRAINED]
            assert shown.num_trained == len(taught)
        assert view.num_tokens == row.num_tokens


def test_views_go_on_over_steps_and_start_anywhere(data: TrainData, bytewise: Tokenizer) -> None:
    assert [view.step for view in sample_views(data, bytewise, step=5, rows=3)] == [5, 6, 7]


def test_text_without_colour_marks_what_is_trained(data: TrainData, bytewise: Tokenizer) -> None:
    text = text_samples(sample_views(data, bytewise, rows=1), color=False)
    assert "\x1b" not in text
    first = text.partition("a<b>.jsonl:1 ")[2].partition("──\n")[2].partition("\n──")[0]
    assert first == (
        "<|begin_of_sentence|>User:·· 1~↵\nAssistant:·· ⟦2⟧⟪<|end_of_sentence|>→</s>⟫User:·· 3↵\nAssistant:·· 4"
    )
    assert "step 0, row 0: " in text and "of 128 tokens" in text


def test_text_in_colour_holds_only_our_own_escapes(data: TrainData, bytewise: Tokenizer) -> None:
    views = sample_views(data, bytewise, rows=3)
    colored, plain = text_samples(views, color=True), text_samples(views, color=False)
    assert set(re.findall(r"\x1b\[[\d;]*m", colored)) == {"\x1b[0m", "\x1b[2m", "\x1b[1;32m", "\x1b[1;35m"}
    assert "⟨1B⟩[31m" in plain and "⟨1B⟩[31m" in re.sub(r"\x1b\[[\d;]*m", "", colored)


class Reader(HTMLParser):
    """Tags, attributes and text of a page; every tag is closed by its own."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.shown = {"b": "", "i": "", "u": ""}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "section" in self.open and self.open[-1] in self.shown:
            self.shown[self.open[-1]] += data


def test_html_is_whole_escaped_and_needs_nothing_else(data: TrainData, bytewise: Tokenizer) -> None:
    page = html_samples(sample_views(data, bytewise, rows=1))
    reader = Reader(page)
    assert "script" not in reader.tags
    assert reader.attributes == {"class", "data-t", "open", "style"}
    assert reader.shown["b"].startswith("2") and "~~" in reader.shown["b"]
    assert "<script>alert(1)</script>⟨1B⟩[31m↵\n\"'&" in reader.shown["i"]
    assert "→</s>" in reader.shown["u"]
    assert "http" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert "a&lt;b&gt;.jsonl:1" in page


@pytest.fixture
def pairs(bytewise: Tokenizer, write_jsonl: Callable[..., str]) -> TrainData:
    rows = [{"question": "1~", "chosen": "2", "rejected": EVIL, "score_chosen": 5, "score_rejected": 2}] * 2
    config = DataConfig(train_dataset_path=[write_jsonl("pairs.jsonl", rows)], max_seq_len=256)
    return build_train_data(config, bytewise, stage="DPO", seed=1, rows_per_step=1)


def test_the_parts_of_a_tree_are_shown_apart(pairs: TrainData, bytewise: Tokenizer) -> None:
    (row,) = sample_views(pairs, bytewise, rows=1)
    shown = row.documents[0]
    assert [part.title for part in shown.parts] == ["prompt", "chosen, better by 3", "rejected"]
    (document,) = pairs.rows(0)[0].documents[:1]
    assert [sum(token.is_input for token in part.tokens) for part in shown.parts] == list(document.parts)
    text = text_samples([row], color=False)
    prompt, chosen, rejected = text.partition("──\n[")[2].split("\n[")[:3]
    assert prompt == "prompt] <|begin_of_sentence|>User:·· 1~↵\nAssistant:··"
    assert chosen == "chosen, better by 3]  ⟦2⟧" and rejected.startswith("rejected]  ⟦<script>")
    page = html_samples([row])
    reader = Reader(page)
    assert "script" not in reader.tags and page.count('<p class="ek-part">') == 3 * len(row.documents)


def test_judged_answers_are_called_by_their_judgement(bytewise: Tokenizer, write_jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": "1", "completion": text, "label": text == "a"} for text in "ab"]
    config = DataConfig(
        train_dataset_path=[write_jsonl("k.jsonl", rows)], max_seq_len=256, random_shuffle=False, greedy_intokens=False
    )
    data = build_train_data(config, bytewise, stage="KTO", seed=1, rows_per_step=1)
    (row,) = sample_views(data, bytewise, rows=1)
    assert [[part.title for part in document.parts] for document in row.documents] == [
        ["prompt", "desirable", "another sample's answer"], ["prompt", "undesirable", "another sample's answer"]
    ]  # fmt: skip

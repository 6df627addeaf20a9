"""Preferences as the data of a run: packed whole, shuffled, mixed, split, kept and counted like any other."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erniekit.base.errors import DataError
from erniekit.config.align import AlignConfig
from erniekit.config.data import DataConfig
from erniekit.data import cache, tokenising
from erniekit.data.batch import CHOSEN, MISMATCHED, NO_ANSWER, REJECTED, Batch, Document, PreferenceBatch, make_batches
from erniekit.data.build import EvalData, TrainData, build_eval_data, build_train_data, leaks
from erniekit.data.chat import UNTRAINED
from erniekit.data.packing import pack_in_order
from erniekit.data.store import SampleStore
from erniekit.data.tokenizer import Tokenizer

Write = Callable[..., str]
FIELDS = ("input_ids", "labels", "parts", "preference")


def pair(number: int, *, long: int = 1) -> dict[str, Any]:
    """A pair whose text names its number."""
    return {
        "messages": [{"role": "user", "content": f"question {number}?" * long}],
        "chosen": f"good {number}", "rejected": f"a bad answer to {number}" * (1 + number % 3),
    }  # fmt: skip


def judgement(number: int) -> dict[str, Any]:
    """An answer that is good if its number is even."""
    return {
        "prompt": f"question {number}?",
        "completion": f"answer {number} " * (1 + number % 4),
        "label": number % 2 == 0,
    }


def samples_once(data: TrainData, *, batch_size: int) -> Iterator[Batch]:
    """Every sample once, in file order."""
    lengths = data.store.lengths()
    rows = [data.store.row(row) for row in pack_in_order(range(len(lengths)), lengths, row_len=data.row_length)]
    return make_batches(rows, batch_size=batch_size, pad_id=0, max_seq_len=data.row_length)


@pytest.fixture
def files(write_jsonl: Write) -> list[str]:
    """30 and 10 pairs."""
    return [write_jsonl("a.jsonl", [*map(pair, range(30))]), write_jsonl("b.jsonl", [*map(pair, range(30, 40))])]


@pytest.fixture
def config(files: list[str]) -> DataConfig:
    return DataConfig(
        train_dataset_path=files, max_seq_len=400, mix_strategy="concat", buffer_size=10, cache_data=False
    )


def build(config: DataConfig, tokenizer: Tokenizer, *, stage: str = "DPO", seed: int = 3, **keys: Any) -> TrainData:
    return build_train_data(config, tokenizer, stage=stage, seed=seed, rows_per_step=2, align=AlignConfig(**keys))


def held(config: DataConfig, tokenizer: Tokenizer, *, stage: str = "DPO", **keys: Any) -> EvalData:
    return build_eval_data(config, tokenizer, stage=stage, seed=3, align=AlignConfig(**keys))


def documents(store: SampleStore) -> list[Document]:
    return [store.document(sample) for sample in range(store.num_samples)]


def assert_same(one: Document, other: Document) -> None:
    for name in FIELDS:
        np.testing.assert_equal(getattr(one, name), getattr(other, name), err_msg=name)


def answers_of(batch: PreferenceBatch, tokenizer: Tokenizer) -> list[str]:
    """What each answer of a batch is trained on."""
    texts = []
    for number in range(batch.num_answers):
        labels = batch.labels[(batch.answer_ids == number) & (batch.labels != UNTRAINED)]
        texts.append(tokenizer.decode(labels.tolist()).replace("▁", " "))
    return texts


@pytest.mark.parametrize("packing", [{}, {"greedy_intokens": False}, {"packing": False}])
def test_trees_are_packed_whole_and_each_once_an_epoch(
    config: DataConfig, bytewise: Tokenizer, packing: dict[str, bool]
) -> None:
    data = build(replace(config, **packing), bytewise)
    seen: Counter[str] = Counter()
    for step in range(data.steps_per_epoch):
        (batch,) = data.micro_batches(step, batch_size=2)
        assert isinstance(batch, PreferenceBatch) and len(batch.input_ids) == 2 and batch.input_ids.shape[1] <= 400
        assert list(batch.names) == data.sample_names(step)
        texts = answers_of(batch, bytewise)
        for place, name in enumerate(batch.names):
            number = int(name.rpartition(":")[2]) - 1 + 30 * name.partition(":")[0].endswith("b.jsonl")
            assert texts[batch.chosen[place]] == pair(number)["chosen"]
            assert texts[batch.rejected[place]] == pair(number)["rejected"]
            assert batch.samples[place] == number and batch.mismatched[place] == NO_ANSWER
        seen.update(batch.names)
    assert len(seen) == 40 and max(seen.values()) <= 2  # the last step is filled from the next epoch
    assert list(seen.values()).count(2) < 2 * len(batch.names) + 1


def test_samples_and_answers_are_numbered(config: DataConfig, bytewise: Tokenizer) -> None:
    data = build(config, bytewise)
    batches = list(samples_once(data, batch_size=2))
    assert [sample for batch in batches for sample in batch.samples] == list(range(40))
    assert all(len(batch.input_ids) <= 2 for batch in batches)
    for batch in batches[:2]:
        for place, sample in enumerate(batch.samples):
            document = data.store.document(int(sample))
            assert document.name == batch.names[place]
            first = np.flatnonzero(batch.answer_ids == batch.chosen[place])[0]
            assert batch.input_ids.flat[first] == document.input_ids[document.parts[0]]


def test_what_decides_the_rows_is_in_the_fingerprint(config: DataConfig, files: list[str], bytewise: Tokenizer) -> None:
    first = build(config, bytewise).fingerprint
    assert build(config, bytewise).fingerprint == first
    others = [
        build(config, bytewise, seed=4), build(config, bytewise, stage="RM"), build(config, bytewise, stage="KTO"),
        build(config, bytewise, share_prompt=False), build(config, bytewise, mask_out_eos_token=False),
        build(replace(config, train_dataset_path=files[:1]), bytewise),
    ]  # fmt: skip
    assert len({first, *(data.fingerprint for data in others)}) == 7


def test_scores_are_in_the_fingerprint(write_jsonl: Write, bytewise: Tokenizer) -> None:
    found = []
    for name, score in (("a.jsonl", 0), ("b.jsonl", 3)):
        path = write_jsonl(name, [{**pair(1), "score_chosen": score, "score_rejected": -1}])
        data = build(DataConfig(train_dataset_path=[path]), bytewise)
        batch = data.micro_batches(0, batch_size=1)[0]
        assert batch.score_delta.tolist() == [score + 1] and (batch.chosen, batch.rejected) == ([0], [1])
        found.append(data.fingerprint)
    assert found[0] != found[1]


def test_the_store_keeps_trees_and_finds_them_again(
    config: DataConfig, bytewise: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LEAST_BYTES", 1)
    kept = replace(config, cache_data=True, data_cache_dir=str(tmp_path / "kept"))
    fresh, made = build(config, bytewise), build(kept, bytewise)
    folders = {path.name for path in (tmp_path / "kept").iterdir()}
    monkeypatch.setattr(cache, "tokenise", None)  # whoever tokenises again fails
    again = build(kept, bytewise)
    assert len(folders) == 2 and {path.name for path in (tmp_path / "kept").iterdir()} == folders
    for one, two, three in zip(*map(documents, (fresh.store, made.store, again.store)), strict=True):
        assert_same(one, two)
        assert_same(two, three)
    monkeypatch.undo()
    monkeypatch.setattr(cache, "LEAST_BYTES", 1)
    build(kept, bytewise, max_prompt_len=300)
    assert len(list((tmp_path / "kept").iterdir())) == 4  # other rules, other folders


def test_processes_and_chunks_make_no_difference(
    files: list[str], config: DataConfig, bytewise: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = build(config, bytewise)
    monkeypatch.setattr(tokenising, "_CHUNK_TOKENS", 100)
    monkeypatch.setattr(cache, "_POOL_BYTES", 1)
    monkeypatch.setattr(cache, "_PART_BYTES", 500)
    shared = build(replace(config, dataloader_num_workers=2), bytewise)
    for one, other in zip(documents(alone.store), documents(shared.store), strict=True):
        assert_same(one, other)
    assert alone.fingerprint == shared.fingerprint


@pytest.mark.parametrize("mix", ["random", "interleave_over"])
def test_trees_of_several_files_are_mixed(config: DataConfig, bytewise: Tokenizer, mix: str) -> None:
    data = build(
        replace(config, mix_strategy=mix, train_dataset_prob=[0.2, 0.8], num_samples_each_epoch=200, packing=False),
        bytewise,
    )
    names = [name for step in range(100) for name in data.sample_names(step)]
    assert 0.7 < sum("b.jsonl" in name for name in names) / len(names) < 0.9


def test_answers_to_a_prompt_lie_on_one_side_of_the_split(write_jsonl: Write, bytewise: Tokenizer) -> None:
    rows = [{**pair(number // 3), "chosen": f"good {number}"} for number in range(60)]
    config = DataConfig(train_dataset_path=[write_jsonl("a.jsonl", rows)], validation_split=0.25, max_seq_len=400)
    train, evaluation = build(config, bytewise), held(config, bytewise)
    sides = [
        {(int(document.name.rpartition(":")[2]) - 1) // 3 for document in documents(data.store)}
        for data in (train, evaluation)
    ]
    assert not sides[0] & sides[1] and len(sides[1]) == 5
    assert evaluation.store.num_samples == 15
    assert [batch.samples.tolist() for batch in evaluation.batches(50)] == [list(range(15))]


def test_leaks_look_at_prompts_and_chosen_answers(write_jsonl: Write, bytewise: Tokenizer) -> None:
    def find(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> list[str]:
        config = DataConfig(
            train_dataset_path=[write_jsonl("t.jsonl", train)], eval_dataset_path=[write_jsonl("e.jsonl", evaluation)]
        )
        return leaks(build(config, bytewise), held(config, bytewise))

    rows = [pair(1000 + number, long=5) for number in range(6)]
    assert find(rows, [pair(7777, long=5)]) == []
    (found,) = find(rows, [{**rows[2], "rejected": "something else altogether"}])
    assert "all 1 evaluation samples" in found and "t.jsonl:3" in found
    (found,) = find(
        [{**rows[0], "rejected": "z" * 300}], [{**pair(5), "rejected": "z" * 300}, rows[0] | {"chosen": "!"}]
    )
    assert "share more than half" in found and "e.jsonl:2 ~" in found and "e.jsonl:1" not in found


def test_prompts_ask_for_the_chosen_answer(
    config: DataConfig, files: list[str], bytewise: Tokenizer, write_jsonl: Write
) -> None:
    config = replace(config, eval_dataset_path=files[1:])
    found = held(config, bytewise).prompts(2)
    assert [(prompt.messages, prompt.reference["content"]) for prompt in found] == [
        (pair(number)["messages"], f"good {number}") for number in (30, 31)
    ]
    assert found[0].name.endswith("b.jsonl:1")
    config = replace(config, eval_dataset_path=[write_jsonl("k.jsonl", [*map(judgement, range(6))])])
    found = held(config, bytewise, stage="KTO").prompts(-1)
    assert [prompt.messages[0]["content"] for prompt in found] == [f"question {number}?" for number in (0, 2, 4)]


def test_rows_that_cannot_be_compared_are_told_and_counted(write_jsonl: Write, bytewise: Tokenizer) -> None:
    rows = [pair(0), {**pair(1), "rejected": "good 1"}, pair(2, long=50), {"messages": [], "rejected": "x"}, pair(4)]
    path = write_jsonl("a.jsonl", rows)
    config = DataConfig(train_dataset_path=[path], max_seq_len=400, max_dropped_fraction=0.6)
    data = build(config, bytewise, max_prompt_len=200)
    assert [(entry.name, entry.action, entry.reason) for entry in data.ledger] == [
        (f"{path}:2", "dropped", "two of the answers are the same"),
        (f"{path}:3", "dropped", "the prompt is longer than max_prompt_len 200"),
        (f"{path}:4", "dropped", '"chosen" (an answer) is missing; the row has "messages", "rejected"'),
    ]
    assert [document.name for document in documents(data.store)] == [f"{path}:1", f"{path}:5"]
    with pytest.raises(DataError, match=r"3 of 5 rows \(60.00%\) cannot be used"):
        build(replace(config, max_dropped_fraction=0.5), bytewise, max_prompt_len=200)


def test_columns_and_tables(tmp_path: Path, bytewise: Tokenizer) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"ask": "q", "win": f"good {number}", "lose": "bad", "id": number} for number in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("ask,win,lose\n" + "".join(f"q,good {n},bad\n" for n in range(3)), encoding="utf-8")
    made = [
        build(
            DataConfig(
                train_dataset_path=[str(tmp_path / name)],
                columns={"prompt": "ask", "chosen": "win", "rejected": "lose"},
            ),
            bytewise,
        )
        for name in ("a.parquet", "b.csv")
    ]
    for one, other in zip(*(documents(data.store) for data in made), strict=True):
        assert_same(one, other)
    assert "keys of rows that are not used: id" in made[0].summary


class TestMismatched:
    """The answer of another sample after each prompt."""

    @pytest.fixture
    def config(self, write_jsonl: Write) -> DataConfig:
        path = write_jsonl("k.jsonl", [*map(judgement, range(12))])
        return DataConfig(train_dataset_path=[path], max_seq_len=200, cache_data=False)

    @pytest.mark.parametrize("share", [True, False])
    def test_every_sample_has_one(self, *, config: DataConfig, bytewise: Tokenizer, share: bool) -> None:
        data = build(config, bytewise, stage="KTO", share_prompt=share)
        (batch,) = samples_once(data, batch_size=100)
        texts = [text.strip() for text in answers_of(batch, bytewise)]
        own = [texts[number] for number in batch.judged]
        assert own == [judgement(number)["completion"].strip() for number in range(12)]
        other = [texts[number] for number in batch.mismatched]
        assert sorted(own) == sorted(other) and all(map(str.__ne__, own, other))
        assert batch.desirable.tolist() == [True, False] * 6
        assert ((batch.chosen >= 0) != (batch.rejected >= 0)).all()
        lengths = data.store.lengths()
        for sample, document in enumerate(documents(data.store)):
            assert lengths[sample] == len(document.input_ids) == sum(document.parts) == len(document.labels)
            kind = CHOSEN if sample % 2 == 0 else REJECTED
            assert document.preference.branches == (kind, MISMATCHED)
            (_, root), (start, end), (other_start, _) = document.spans()
            size = next(place for place in range(start, end) if document.labels[place] != UNTRAINED) - start + 1
            ids, labels = document.input_ids, document.labels
            assert ids[other_start : other_start + size].tolist() == ids[start : start + size].tolist()
            assert (labels[other_start : other_start + size - 1] == UNTRAINED).all()
            assert root == (0 if not share else root) and (size == 1) == share

    def test_turns_with_branches_of_their_own(self, write_jsonl: Write, bytewise: Tokenizer) -> None:
        texts = [["2", "3", "4"], ["5"], ["6", "7", "8"]]
        rows = [{"src": ["1"], "response": [said], "sort": [1]} for said in texts]
        config = DataConfig(
            train_dataset_path=[write_jsonl("k.jsonl", rows)], max_seq_len=900, chat_template="ernie_thinking"
        )
        data = build(config, bytewise, stage="KTO")
        found = documents(data.store)
        assert [document.preference.branches for document in found] == [
            (CHOSEN,) * count + (MISMATCHED,) for count in (2, 1, 2)
        ]
        assert list(data.store.lengths()) == [sum(document.parts) for document in found]
        (batch,) = samples_once(data, batch_size=9)
        said = answers_of(batch, bytewise)
        assert batch.num_answers == 6
        assert [[text in said[number] for text in "245678"] for number in batch.judged] == [
            [True, True, False, False, False, False], [False, False, True, False, False, False],
            [False, False, False, True, False, True],
        ]  # fmt: skip
        assert sorted(text for number in batch.mismatched for text in "25678" if text in said[number]) == [
            "2",
            "5",
            "6",
        ]

    def test_the_ring_hangs_on_the_seed_alone(self, config: DataConfig, bytewise: Tokenizer) -> None:
        kto = functools.partial(build, config, bytewise, stage="KTO")
        one, same, other = (documents(kto(seed=seed).store) for seed in (3, 3, 4))
        for left, right in zip(one, same, strict=True):
            assert_same(left, right)
        assert any(len(left.input_ids) != len(right.input_ids) for left, right in zip(one, other, strict=True))

    def test_it_is_cut_where_it_does_not_fit_and_that_is_told(self, config: DataConfig, bytewise: Tokenizer) -> None:
        data = build(replace(config, max_seq_len=110), bytewise, stage="KTO")
        lengths = data.store.lengths()
        assert max(lengths) == 110
        assert f"{list(lengths).count(110)} of them cut to fit 110 tokens" in data.summary
        assert all(len(batch.input_ids[0]) <= 110 for batch in samples_once(data, batch_size=3))

    def test_one_sample_alone_is_refused(self, write_jsonl: Write, bytewise: Tokenizer) -> None:
        config = DataConfig(train_dataset_path=[write_jsonl("k.jsonl", [judgement(0)])])
        with pytest.raises(DataError, match=r"k\.jsonl:1: is the only sample; stage KTO needs at least two"):
            build(config, bytewise, stage="KTO")

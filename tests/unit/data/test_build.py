"""The data of a run: what a step holds depends on seed, step and rows per step only, and nothing is lost."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erniekit.base.errors import ConfigError, DataError
from erniekit.config.data import DataConfig
from erniekit.data.batch import count_trained
from erniekit.data.build import EvalData, TrainData, build_eval_data, build_train_data
from erniekit.data.tokenizer import Tokenizer

Write = Callable[..., str]


@pytest.fixture
def files(write_jsonl: Write, corpus: list[str]) -> list[str]:
    """Two sources of dialogues, 60 and 20 rows."""

    def row(number: int) -> dict[str, object]:
        turns = corpus[number * 4 : number * 4 + 2 * (1 + number % 2)]
        return {"src": turns[::2], "tgt": turns[1::2]}

    return [
        write_jsonl("a.jsonl", [row(number) for number in range(60)]),
        write_jsonl("b.jsonl", [row(number) for number in range(60, 80)]),
    ]


@pytest.fixture
def config(files: list[str]) -> DataConfig:
    return DataConfig(
        train_dataset_path=files, eval_dataset_path=files[1:], max_seq_len=256, mix_strategy="concat", buffer_size=20
    )


def build(config: DataConfig, tokenizer: Tokenizer, *, seed: int = 3, rows_per_step: int = 4) -> TrainData:
    return build_train_data(config, tokenizer, stage="SFT", seed=seed, rows_per_step=rows_per_step)


def step_hash(data: TrainData, step: int) -> str:
    """A hash over what a step trains on, whatever the micro-batches."""
    content = hashlib.sha256()
    for row in data.rows(step):
        for document in row.documents:
            content.update(document.name.encode() + document.input_ids.tobytes() + document.labels.tobytes())
    return content.hexdigest()


@pytest.mark.parametrize(
    "changes",
    [{}, {"greedy_intokens": False}, {"packing": False}, {"packing": False, "random_shuffle": False}],
    ids=["best fit", "in order", "one per row", "unshuffled"],
)
def test_every_sample_once_an_epoch_and_no_token_lost(
    config: DataConfig, tokenizer: Tokenizer, files: list[str], changes: dict[str, object]
) -> None:
    data = build(replace(config, **changes), tokenizer, rows_per_step=1)
    names = sorted([f"{files[0]}:{line + 1}" for line in range(60)] + [f"{files[1]}:{line + 1}" for line in range(20)])
    at = 0
    orders = []
    for epoch in (1, 2, 3):
        steps = range(at, data.total_steps(epoch))
        orders.append([name for step in steps for name in data.sample_names(step)])
        assert sorted(orders[-1]) == names
        batches = [batch for step in steps for batch in data.micro_batches(step, batch_size=1)]
        assert f"{sum(batch.num_tokens for batch in batches):,} tokens" in data.summary
        assert f"{count_trained(batches):,} of them trained" in data.summary
        assert max(batch.input_ids.shape[1] for batch in batches) <= 256
        at = data.total_steps(epoch)
    assert data.steps_per_epoch == data.total_steps(1)
    if changes.get("random_shuffle", True):
        assert orders[0] != orders[1] != orders[2]
    else:
        assert orders[0] == orders[1]
        assert [int(name.rpartition(":")[2]) for name in orders[0]] == [*range(1, 61), *range(1, 21)]


def test_a_step_may_go_on_in_the_next_epoch(config: DataConfig, tokenizer: Tokenizer) -> None:
    data = build(replace(config, packing=False), tokenizer, rows_per_step=30)
    assert (data.total_steps(1), data.total_steps(2), data.total_steps(3)) == (3, 6, 8)
    assert data.total_steps(0.3) == 1
    names = Counter(name for step in range(8) for name in data.sample_names(step))
    assert sorted(set(names.values())) == [3]  # 240 rows are 3 epochs exactly
    many = build(replace(config, packing=False), tokenizer, rows_per_step=200)
    assert sorted(Counter(many.sample_names(0)).values()) == [2] * 40 + [3] * 40


def test_data_ranks_together_see_the_rows_of_one_process_with_the_whole_batch(
    config: DataConfig, tokenizer: Tokenizer
) -> None:
    one = build(config, tokenizer, rows_per_step=12)
    ranks = [build(config, tokenizer, rows_per_step=12) for _ in range(3)]
    for step in (0, 3):
        whole = one.micro_batches(step, batch_size=6)  # 2 rows for each of 3 ranks, twice
        parts = [data.micro_batches(step, batch_size=2, index=i, parts=3) for i, data in enumerate(ranks)]
        for number, batch in enumerate(whole):
            rows = [row for own in parts for row in own[number].input_ids]
            assert [len(own) for own in parts] == [2, 2, 2]
            for row, expected in zip(rows, batch.input_ids, strict=True):
                np.testing.assert_array_equal(row, expected[: len(row)])
                assert not expected[len(row) :].any()


@pytest.mark.parametrize("mix_strategy", ["concat", "random"])
def test_micro_batches_do_not_change_a_step(config: DataConfig, tokenizer: Tokenizer, mix_strategy: str) -> None:
    config = replace(config, mix_strategy=mix_strategy, num_samples_each_epoch=50)
    data = build(config, tokenizer)
    for step in (0, 5, 21):
        whole = data.micro_batches(step, batch_size=4)
        assert len(whole) == 1
        for batch_size in (1, 2, 3):
            parts = data.micro_batches(step, batch_size=batch_size)
            assert [len(part.input_ids) for part in parts] == {1: [1] * 4, 2: [2, 2], 3: [3, 1]}[batch_size]
            for name, padding in (("input_ids", 0), ("labels", -100), ("position_ids", 0), ("segment_ids", 0)):
                width = whole[0].input_ids.shape[1]
                rows = [
                    np.pad(row, (0, width - len(row)), constant_values=padding)
                    for part in parts
                    for row in getattr(part, name)
                ]
                assert np.array_equal(np.stack(rows), getattr(whole[0], name))
            assert count_trained(parts) == count_trained(whole)


def test_a_step_is_the_same_in_whatever_order_steps_are_asked_for(config: DataConfig, tokenizer: Tokenizer) -> None:
    forward = build(config, tokenizer)
    hashes = [step_hash(forward, step) for step in range(12)]
    for step in (11, 0, 7, 3):
        assert step_hash(build(config, tokenizer), step) == hashes[step]
    assert [step_hash(forward, step) for step in range(12)] == hashes
    assert len(set(hashes)) == 12


def test_the_seed_changes_the_order_only(config: DataConfig, tokenizer: Tokenizer) -> None:
    one, two = (build(replace(config, packing=False), tokenizer, seed=seed, rows_per_step=80) for seed in (1, 2))
    assert one.sample_names(0) != two.sample_names(0)
    assert sorted(one.sample_names(0)) == sorted(two.sample_names(0))


def test_a_step_is_the_same_in_another_process(
    config: DataConfig, tokenizer: Tokenizer, files: list[str], root: Path, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "t")
    program = (
        "import hashlib\n"
        "from erniekit.config.data import DataConfig\nfrom erniekit.data.build import build_train_data\n"
        "from erniekit.data.tokenizer import Tokenizer\n"
        f"config = DataConfig(train_dataset_path={files!r}, max_seq_len=256, mix_strategy='concat', buffer_size=20)\n"
        f"tokenizer = Tokenizer.from_folder({str(tmp_path / 't')!r})\n"
        "data = build_train_data(config, tokenizer, stage='SFT', seed=3, rows_per_step=4)\n"
        "(batch,) = data.micro_batches(9, batch_size=4)\n"
        "print(data.fingerprint, hashlib.sha256(batch.input_ids.tobytes() + batch.labels.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    data = build(config, tokenizer)
    (batch,) = data.micro_batches(9, batch_size=4)
    digest = hashlib.sha256(batch.input_ids.tobytes() + batch.labels.tobytes()).hexdigest()
    assert done.stdout.split() == [data.fingerprint, digest]


def test_documents_of_a_row_have_their_own_positions_and_segments(config: DataConfig, tokenizer: Tokenizer) -> None:
    data = build(config, tokenizer, rows_per_step=1)
    (row,) = data.rows(0)
    (batch,) = data.micro_batches(0, batch_size=1)
    assert len(row.documents) > 2
    for segment, document in enumerate(row.documents, start=1):
        here = batch.segment_ids[0] == segment
        assert batch.input_ids[0][here].tolist() == document.input_ids.tolist()
        assert batch.labels[0][here].tolist() == document.labels.tolist()
        assert batch.position_ids[0][here].tolist() == list(range(len(document.input_ids)))
        assert document.input_ids[0] == tokenizer.cls_id


def test_random_mixing_draws_by_probability(config: DataConfig, tokenizer: Tokenizer, files: list[str]) -> None:
    config = replace(config, mix_strategy="random", train_dataset_prob=[0.2, 0.8], packing=False)
    data = build(replace(config, num_samples_each_epoch=1000), tokenizer, rows_per_step=1000)
    drawn = Counter(name.rpartition(":")[0] for name in data.sample_names(0))
    assert 160 < drawn[files[0]] < 240
    per_row = Counter(data.sample_names(0))
    of_b = [count for name, count in per_row.items() if name.startswith(files[1])]
    assert len(of_b) == 20
    assert max(of_b) - min(of_b) <= 1  # without replacement


def test_interleaving_files(config: DataConfig, tokenizer: Tokenizer, files: list[str]) -> None:
    config = replace(config, train_dataset_prob=[0.5, 0.5], packing=False)
    configs = [replace(config, mix_strategy=f"interleave_{end}") for end in ("under", "over")]
    under, over = (build(one, tokenizer, rows_per_step=1) for one in configs)
    seen = []
    for data in (under, over):
        names = {name for step in range(data.total_steps(1)) for name in data.sample_names(step)}
        seen.append(Counter(name.rpartition(":")[0] for name in names))
    assert seen[0][files[1]] == 20 and seen[0][files[0]] < 60
    assert seen[1] == {files[0]: 60, files[1]: 20}
    assert under.fingerprint != over.fingerprint


def test_how_sources_are_mixed_if_nothing_is_said(config: DataConfig, tokenizer: Tokenizer, files: list[str]) -> None:
    unsaid = replace(config, mix_strategy=None, num_samples_each_epoch=70, packing=False)
    assert build(unsaid, tokenizer, rows_per_step=1).total_steps(1) == 70  # several sources: random
    one = replace(unsaid, train_dataset_path=files[:1])
    assert build(one, tokenizer, rows_per_step=1).total_steps(1) == 60  # one source: all of it


def test_the_fingerprint_sees_all_that_decides_the_order(
    config: DataConfig, tokenizer: Tokenizer, files: list[str], tmp_path: Path
) -> None:
    def fingerprint(seed: int = 3, rows_per_step: int = 4, **changes: object) -> str:
        return build(replace(config, **changes), tokenizer, seed=seed, rows_per_step=rows_per_step).fingerprint

    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(files[0]).read_bytes())
    assert fingerprint() == fingerprint(train_dataset_path=[str(moved), files[1]])  # the content counts, not the name
    assert fingerprint() == fingerprint(num_samples_each_epoch=5, eval_dataset_path=None)  # no effect here
    random = {"mix_strategy": "random", "num_samples_each_epoch": 40}
    others = [
        fingerprint(seed=4),
        fingerprint(rows_per_step=8),
        fingerprint(train_dataset_path=files[::-1]),
        fingerprint(max_seq_len=200),
        fingerprint(packing=False),
        fingerprint(greedy_intokens=False),
        fingerprint(buffer_size=30),
        fingerprint(random_shuffle=False),
        fingerprint(**random),
        fingerprint(**random, train_dataset_prob=[1.0, 2.0]),
        fingerprint(**{**random, "num_samples_each_epoch": 41}),
    ]
    assert len({fingerprint(), *others}) == 12
    Path(files[0]).write_text(Path(files[0]).read_text(encoding="utf-8").replace("a", "e", 1), encoding="utf-8")
    assert fingerprint() != build(replace(config, train_dataset_path=[str(moved), files[1]]), tokenizer).fingerprint


def test_the_summary_names_what_did_not_get_in_whole(
    config: DataConfig, tokenizer: Tokenizer, write_jsonl: Write
) -> None:
    good = {"src": ["a"], "tgt": ["b"]}
    untrained = {**good, "label": [0], "id": 7}
    path = write_jsonl("c.jsonl", [good] * 3 + [untrained] * 8 + [{"src": ["a"] * 99, "tgt": ["b"] * 99}])
    data = build(replace(config, train_dataset_path=[path], max_seq_len=64, max_dropped_fraction=1.0), tokenizer)
    first, *lost, keys = data.summary.splitlines()
    assert first.startswith("training data: 4 samples from 1 file, ")
    assert lost[0] == "1 truncated:" and lost[1].startswith(f"  {path}:12: the oldest 9")
    assert lost[2:] == [
        "8 dropped:",
        f"  {path}:4: no turn has label 1 (also {path}:5, {path}:6, {path}:7, ... and 4 more)",
    ]
    assert keys == "keys of rows that are not used: id"
    assert len(data.ledger) == 9


def test_pretraining_text(config: DataConfig, tokenizer: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("\n".join(corpus[:300]), encoding="utf-8")
    config = replace(config, train_dataset_path=[str(story)], max_seq_len=128)
    data = build_train_data(config, tokenizer, stage="PT", seed=1, rows_per_step=2)
    documents = [doc for step in range(data.steps_per_epoch) for row in data.rows(step) for doc in row.documents]
    assert "1 split" in data.summary
    pieces = {doc.input_ids.tobytes(): doc for doc in documents}
    total = sum(len(doc.labels) for doc in pieces.values())
    assert total == len(tokenizer.encode(story.read_text(encoding="utf-8")))
    assert sum(doc.labels[-1] == tokenizer.eos_id for doc in pieces.values()) == 1


def test_special_names_in_text_act_only_if_allowed(
    config: DataConfig, tokenizer: Tokenizer, write_jsonl: Write
) -> None:
    config = replace(config, train_dataset_path=[write_jsonl("s.jsonl", [{"src": ["a<|im_end|>b"], "tgt": ["c"]}])])
    im_end = tokenizer.token_id("<|im_end|>")
    for allowed in (False, True):
        data = build(replace(config, allow_special_tokens_in_text=allowed), tokenizer, rows_per_step=1)
        assert (im_end in data.rows(0)[0].documents[0].input_ids) == allowed


def eval_data(config: DataConfig, tokenizer: Tokenizer) -> EvalData:
    return build_eval_data(config, tokenizer, stage="SFT")


@pytest.mark.parametrize("changes", [{}, {"packing": False}], ids=["packed", "one per row"])
def test_evaluation_goes_through_the_files_in_order_once(
    config: DataConfig, tokenizer: Tokenizer, files: list[str], changes: dict[str, object]
) -> None:
    config = replace(config, eval_dataset_path=files, **changes)
    data = eval_data(config, tokenizer)
    batches = list(data.batches(7))
    assert sum(len(batch.input_ids) for batch in batches) == data.num_rows
    assert {len(batch.input_ids) for batch in batches[:-1]} == {7}
    assert len(batches[-1].input_ids) == data.num_rows % 7 != 0
    ids = np.concatenate(
        [
            row[row_segments > 0]
            for batch in batches
            for row, row_segments in zip(batch.input_ids, batch.segment_ids, strict=True)
        ]
    )
    train = build(replace(config, packing=False, random_shuffle=False), tokenizer, rows_per_step=80)
    expected = [document.input_ids for row in train.rows(0) for document in row.documents]
    assert ids.tolist() == np.concatenate(expected).tolist()
    again = [batch.input_ids.tolist() for batch in data.batches(7)]
    assert again == [batch.input_ids.tolist() for batch in batches]
    assert data.summary.startswith("evaluation data: 80 samples from 2 files")


def test_calls_of_functions_are_asked_for(config: DataConfig, tokenizer: Tokenizer, write_jsonl: Write) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    said = {"role": "assistant", "content": "said"}
    messages = [{"role": "user", "content": "q"}, said, {"role": "user", "content": "q"}]
    row = {"messages": [*messages, call, {"role": "tool", "content": "1"}, said], "tools": [{"name": "f"}]}
    config = replace(
        config, eval_dataset_path=[write_jsonl("c.jsonl", [row])], eval_dataset_type=["chatml"],
        chat_template="ernie_thinking", max_seq_len=512,
    )  # fmt: skip
    prompts = eval_data(config, tokenizer).prompts(-1)
    assert [len(prompt.messages) for prompt in prompts] == [3, 5]
    assert [bool(prompt.reference.get("tool_calls")) for prompt in prompts] == [True, False]


def test_prompts_for_generation(config: DataConfig, tokenizer: Tokenizer, write_jsonl: Write) -> None:
    rows = [{"system": "s", "src": ["a", "b"], "tgt": ["c", "d"]}, {"src": ["e"], "tgt": ["f"]}]
    config = replace(config, eval_dataset_path=[write_jsonl("e.jsonl", rows), write_jsonl("f.jsonl", rows[1:])])
    prompts = eval_data(config, tokenizer).prompts(10)
    assert [prompt.reference["content"] for prompt in prompts] == ["d", "f", "f"]
    assert [prompt.name.rpartition("/")[2] for prompt in prompts] == ["e.jsonl:1", "e.jsonl:2", "f.jsonl:1"]
    assert [(message["role"], message["content"]) for message in prompts[0].messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "c"),
        ("user", "b"),
    ]
    assert len(eval_data(config, tokenizer).prompts(2)) == 2
    assert len(eval_data(config, tokenizer).prompts(-1)) == 3
    assert eval_data(config, tokenizer).prompts(0) == []
    text = replace(config, eval_dataset_path=[write_jsonl("t.jsonl", [{"text": "a"}])])
    assert build_eval_data(text, tokenizer, stage="PT").prompts(3) == []


def test_what_is_refused(config: DataConfig, tokenizer: Tokenizer, write_jsonl: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_dataset_path is not set"):
        build(replace(config, train_dataset_path=None), tokenizer)
    with pytest.raises(ConfigError, match="eval_dataset_path is not set"):
        eval_data(replace(config, eval_dataset_path=None), tokenizer)
    with pytest.raises(DataError, match=r"b\.jsonl: there is no such file"):
        build(replace(config, train_dataset_path=["b.jsonl"]), tokenizer)
    with pytest.raises(DataError, match="nothing to train on: its only row was dropped"):
        build(replace(config, train_dataset_path=[write_jsonl("x.jsonl", ["{"])]), tokenizer)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match="shows an answer otherwise than it asks for it"):
        build(replace(config, chat_template=str(tmp_path / "own.jinja")), tokenizer)
    build(replace(config, chat_template="base"), tokenizer)

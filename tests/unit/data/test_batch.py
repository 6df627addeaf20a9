"""The arrays of a micro-batch."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.data.batch import CHOSEN, REJECTED, Batch, Document, Row, count_trained, make_batch, make_batches
from erniekit.ops.attention import end_rows_from_segments
from tests.unit.data.trees import batch_of, judged, tree


def document(*ids: int) -> Document:
    """A document whose last position alone is trained."""
    labels = [-100] * (len(ids) - 1) + [9]
    return Document("file:1", np.array(ids, np.int32), np.array(labels, np.int32))


ROWS = [Row((document(5, 6, 7), document(8, 9))), Row((document(4),))]


def test_a_batch_by_hand() -> None:
    batch = make_batch(ROWS, pad_id=0, max_seq_len=64)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]]
    u = -100
    assert batch.labels.tolist() == [[u, u, 9, u, 9, u, u, u], [9, u, u, u, u, u, u, u]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    arrays = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
    assert all(array.dtype == np.int64 for array in arrays)
    assert (batch.num_trained, batch.num_tokens) == (3, 6)


@pytest.mark.parametrize(("length", "max_seq_len", "width"), [(8, 64, 8), (9, 64, 16), (9, 12, 12), (12, 12, 12)])
def test_width(length: int, max_seq_len: int, width: int) -> None:
    batch = make_batch([Row((document(*range(length)),))], pad_id=3, max_seq_len=max_seq_len)
    assert batch.input_ids.shape == (1, width)
    assert batch.input_ids[0, length:].tolist() == [3] * (width - length)


def test_a_row_that_is_too_long_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="5 tokens does not fit max_seq_len 4"):
        make_batch(ROWS, pad_id=0, max_seq_len=4)


def test_batches_in_order_and_the_last_one_short() -> None:
    rows = [Row((document(number),)) for number in range(5)]
    batches = list(make_batches(rows, batch_size=2, pad_id=0, max_seq_len=8))
    assert [batch.input_ids[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert count_trained(batches) == 5


def test_a_tree_by_hand() -> None:
    first = tree([5, 6, 7], [[8, 9], [8, 10, 11]], sample=4, score_delta=0.5)
    second = judged([5, 6], [7], [8, 9], desirable=False, sample=2)
    batch = batch_of([first, second])
    u, n = -100, -1
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 7, 8, 10, 5, 6, 6, 8, *[0] * 5]]
    assert batch.labels.tolist() == [[u, u, 8, 9, 8, 10, 11, u, 7, 8, 9, *[u] * 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 2, *[0] * 5]]
    assert batch.segment_ids.tolist() == [[*[1] * 7, *[2] * 4, *[0] * 5]]
    assert batch.end_rows.tolist() == [[7, 7, 4, 4, 7, 7, 7, 11, 9, 11, 11, 12, 13, 14, 15, 16]]
    assert batch.answer_ids.tolist() == [[n, n, 0, 0, 1, 1, 1, n, 2, 3, 3, *[n] * 5]]
    assert (batch.end_rows.dtype, batch.answer_ids.dtype) == (np.int32, np.int32)
    assert batch.chosen.tolist() == [0, n] and batch.rejected.tolist() == [1, 2] and batch.mismatched.tolist() == [n, 3]
    assert batch.desirable.tolist() == [True, False] and batch.judged.tolist() == [1, 2]
    assert batch.score_delta.tolist() == [0.5, 1.0] and batch.samples.tolist() == [4, 2]
    assert batch.names == ("pairs.jsonl:5", "pairs.jsonl:3") and batch.num_answers == 4


def test_answers_that_do_not_share_their_prompt() -> None:
    batch = batch_of([tree([5, 6, 7], [[8, 9], [10]], share=False)], [tree([5, 6], [[7], [8]])])
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 5, 6, 7, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.end_rows[0].tolist() == [4, 4, 4, 4, 7, 7, 7, 8]
    assert batch.answer_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1, -1]
    assert batch.answer_ids[1].tolist() == [-1, 2, 3, -1, -1, -1, -1, -1]


def test_bounds_of_ordinary_rows_are_those_of_the_attention() -> None:
    rng = np.random.default_rng(0)
    rows = [Row(tuple(document(*range(length)) for length in rng.integers(1, 9, 6))) for _ in range(5)]
    batch = make_batch(rows, pad_id=0, max_seq_len=64)
    expected = end_rows_from_segments(paddle.to_tensor(batch.segment_ids)).numpy()
    assert batch.end_rows.dtype == expected.dtype
    np.testing.assert_array_equal(batch.end_rows, expected)
    without = Batch(batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
    np.testing.assert_array_equal(without.end_rows, expected)
    assert (batch.answer_ids == -1).all() and (without.answer_ids == -1).all()


def test_branches_of_one_kind_are_one_answer() -> None:
    kinds = (CHOSEN, CHOSEN, REJECTED)
    batch = batch_of([tree([5, 6], [[7, 8], [9], [10]], kinds=kinds), tree([5, 6], [[7], [8]], sample=1)])
    assert batch.answer_ids.tolist() == [[-1, 0, 0, 0, 1, -1, 2, 3]]
    assert batch.end_rows.tolist() == [[5, 3, 3, 4, 5, 8, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 1, 1, 0, 1, 1]]
    assert (batch.chosen.tolist(), batch.rejected.tolist(), batch.num_answers) == ([0, 2], [1, 3], 4)

"""The arrays of a micro-batch."""

from __future__ import annotations

import numpy as np
import pytest

from erniekit.data.batch import Document, Row, count_trained, make_batch, make_batches


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

"""Dropout by streams: apart from each other, in step with the global generator."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from erniekit.ops.dropout import dropout


def dropped(stream: int) -> tuple[np.ndarray, np.ndarray]:
    """A tensor of ones after dropout, and what the global generator draws next."""
    paddle.seed(3)
    return dropout(paddle.ones([100, 50]), 0.25, stream=stream).numpy(), paddle.rand([3]).numpy()


def test_streams_drop_other_numbers_and_leave_the_generator_alike():
    (one, after_one), (two, after_two) = dropped(1), dropped(2)
    np.testing.assert_array_equal(after_one, after_two)
    assert 0.5 < (one == two).mean() < 0.75  # independent: 0.25 ** 2 + 0.75 ** 2
    np.testing.assert_array_equal(one, dropped(1)[0])
    for made in (one, two):
        assert set(np.unique(made)) == {np.float32(0), np.float32(1 / 0.75)}
        assert abs((made == 0).mean() - 0.25) < 0.03


def test_the_stream_0_is_the_generator_itself():
    found, _ = dropped(0)
    paddle.seed(3)
    np.testing.assert_array_equal(found, F.dropout(paddle.ones([100, 50]), 0.25).numpy())


def test_nothing_stays_nothing():
    assert dropout(paddle.zeros([0, 4]), 0.5, stream=2).shape == [0, 4]

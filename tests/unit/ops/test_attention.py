"""Tiled attention beside its plain twin: masks, head counts, odd sizes, and memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle
import pytest

from erniekit.ops.attention import attention, attention_plain, end_rows_from_segments
from erniekit.ops.rope import rope_tables
from tests.unit.ops.twins import assert_twins, drawn


def causal(b, s):
    return np.full((b, s), s, "int32")


def packed(b, s):
    """Documents of uneven lengths, another cut in every row, and padding at the end."""
    segments = np.zeros((b, s), "int64")
    for row in range(b):
        start, number = 0, 0
        while start < s - s // 8:
            number += 1
            length = 1 + (5 * number * number + 3 * row) % 60
            segments[row, start : start + length] = number
            start += length
        segments[row, s - s // 8 :] = 0
    return end_rows_from_segments(paddle.to_tensor(segments)).numpy()


def two_answers(b, s):
    """A prompt that everybody sees, an answer, and a second answer that must not see the first."""
    ends = np.full((b, s), s, "int32")
    ends[:, s // 3 : 2 * s // 3] = np.maximum(2 * s // 3, np.arange(s // 3, 2 * s // 3) + 1)
    return ends


MASKS = {"causal": causal, "packed": packed, "two_answers": two_answers}
SIZES = [  # batch, rows, query heads, key heads, head_dim
    (1, 1, 1, 1, 2),  # one token
    (2, 37, 4, 2, 16),
    (1, 129, 3, 3, 24),  # one past a tile, no sharing
    (2, 200, 6, 2, 10),  # a head_dim that no vector divides
    (1, 256, 4, 1, 64),  # whole tiles, one key head for all
    (1, 385, 2, 2, 80),
]


def tables(b, s, d):
    positions = paddle.to_tensor(np.arange(s)[None].repeat(b, 0) + 3 * np.arange(b)[:, None])
    cos, sin = rope_tables(positions, head_dim=d, theta=10000.0)
    return {"cos_BSJ": cos, "sin_BSJ": sin, "head_dim": d}


def projections(b, s, n, k, d):
    return {"q_BSX": drawn(b, s, n * d), "k_BSY": drawn(b, s, k * d, seed=1), "v_BSY": drawn(b, s, k * d, seed=2)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_attention(sizes, mask):
    b, s, _, _, d = sizes
    settings = tables(b, s, d) | {"end_rows_BS": paddle.to_tensor(MASKS[mask](b, s))}
    assert_twins(partial(attention, **settings), partial(attention_plain, **settings), projections(*sizes))


@pytest.mark.parametrize("frozen", [("q_BSX",), ("k_BSY",), ("v_BSY",), ("q_BSX", "k_BSY")])
def test_frozen_inputs_get_no_gradient(frozen):
    settings = tables(1, 20, 8) | {"end_rows_BS": paddle.to_tensor(causal(1, 20))}
    arrays = projections(1, 20, 4, 2, 8)
    assert_twins(partial(attention, **settings), partial(attention_plain, **settings), arrays, frozen=frozen)


def test_large_scores_stay_finite():
    inputs = {name: paddle.to_tensor(30.0 * a) for name, a in projections(1, 140, 2, 2, 16).items()}
    settings = tables(1, 140, 16) | {"end_rows_BS": paddle.to_tensor(causal(1, 140))}
    found, want = attention(**inputs, **settings).numpy(), attention_plain(**inputs, **settings).numpy()
    # Scores are in the thousands, where fp32 steps by 1e-4: a weight may be off by as much.
    np.testing.assert_allclose(found, want, atol=1e-3 * np.abs(want).max())


def test_a_row_that_sees_nothing_gives_zero():
    ends = causal(1, 9)
    ends[:, :] = 0
    found = attention(
        **{name: paddle.to_tensor(a) for name, a in projections(1, 9, 1, 1, 4).items()},
        **tables(1, 9, 4), end_rows_BS=paddle.to_tensor(ends),
    )  # fmt: skip
    assert not found.numpy().any()


def test_documents_do_not_leak():
    arrays, ends = projections(1, 150, 2, 1, 16), packed(1, 150)
    settings = tables(1, 150, 16) | {"end_rows_BS": paddle.to_tensor(ends)}
    first = int(ends[0, 0])  # the first document's end
    before = attention(**{name: paddle.to_tensor(a) for name, a in arrays.items()}, **settings).numpy()
    changed = {name: a.copy() for name, a in arrays.items()}
    for a in changed.values():
        a[:, :first] = 100.0
    after = attention(**{name: paddle.to_tensor(a) for name, a in changed.items()}, **settings).numpy()
    assert before[:, first:].tobytes() == after[:, first:].tobytes()
    assert not np.array_equal(before[:, :first], after[:, :first])


def peak_memory() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def test_memory_grows_with_the_row_not_its_square():
    rows = 6144  # the square would be 151 MB of scores
    inputs = {name: paddle.to_tensor(a) for name, a in projections(1, rows, 1, 1, 8).items()}
    settings = tables(1, rows, 8) | {"end_rows_BS": paddle.to_tensor(packed(1, rows))}
    inputs["q_BSX"].stop_gradient = False
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts again from here
    before = peak_memory()
    attention(**inputs, **settings).sum().backward()
    assert peak_memory() - before < 40 << 20

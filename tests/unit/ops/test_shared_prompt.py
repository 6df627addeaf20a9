"""Answers that share their prompt in one row, by column bounds that do not rise, beside the same answers run apart:
outputs and gradients, of the attention in every tier and of a whole model."""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from erniekit.data.batch import CHOSEN, REJECTED, PreferenceBatch
from erniekit.ops import attention as module
from erniekit.ops.attention import attention, attention_plain
from erniekit.ops.attention_dropout import attention_with_dropout
from erniekit.ops.rope import rope_tables
from tests.unit.data.trees import batch_of, judged, paths, tree
from tests.unit.ops.twins import assert_close, drawn
from tests.unit.training.micro import make_model

HEADS, GROUPS, DIM = 4, 2, 8


def trees() -> PreferenceBatch:
    """Rows with one tree and with several, longer than a tile and than a block, with padding; one is not shared."""
    rng = np.random.default_rng(3)

    def some(count: int) -> list[int]:
        return rng.integers(3, 64, count).tolist()

    return batch_of(
        [tree(some(150), [some(90), some(70)])],
        [
            tree(some(40), [some(3), some(65)]), tree(some(1), [some(1), some(2)]),
            tree(some(12), [some(7), some(9), some(4)], kinds=(CHOSEN, CHOSEN, REJECTED)),
            judged(some(70), some(33), some(20), desirable=True), tree(some(9), [some(5), some(30)], share=False),
        ],
    )  # fmt: skip


def dense_flashmask(query, key, value, startend_row_indices=None, *, causal=False):
    """What Paddle documents of flashmask_attention with one bound: row i >= the bound of column j doesn't see it."""
    b, s, n, d = query.shape
    groups = key.shape[2]
    assert causal and startend_row_indices.shape == [b, 1, s, 1] and startend_row_indices.dtype == paddle.int32
    key, value = (x.repeat_interleave(n // groups, axis=2) for x in (key, value))
    scores = paddle.einsum("bind,bjnd->bnij", query, key) * d**-0.5
    count = paddle.arange(s, dtype="int32")
    rows, columns = count.unsqueeze(1), count.unsqueeze(0)
    hidden = (rows < columns) | (rows >= startend_row_indices.reshape([b, 1, 1, s]))
    weights = F.softmax(paddle.where(hidden, paddle.full([1], -1e30), scores), axis=-1)
    return paddle.einsum("bnij,bjnd->bind", weights, value)


def on_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(F, "flashmask_attention", dense_flashmask)
    return module._attention_gpu


TIERS = {
    "chosen for this place": lambda _: attention,
    "plain": lambda _: attention_plain,
    "flashmask": on_gpu,
    "with dropout": lambda _: partial(attention_with_dropout, dropout=0.0),
}


def attend(op, arrays, positions, end_rows, grad):
    """Output and gradients of one call."""
    cos, sin = rope_tables(paddle.to_tensor(positions), head_dim=DIM, theta=10000.0)
    inputs = {name: paddle.to_tensor(a, stop_gradient=False) for name, a in arrays.items()}
    ends = paddle.to_tensor(end_rows.astype("int32"))
    out = op(**inputs, cos_BSJ=cos, sin_BSJ=sin, end_rows_BS=ends, head_dim=DIM)
    (out * paddle.to_tensor(grad)).sum().backward()
    return {"out": out.numpy()} | {name: tensor.grad.numpy() for name, tensor in inputs.items()}


@pytest.mark.parametrize("chosen", TIERS)
def test_attention_of_a_tree_is_that_of_its_answers_apart(chosen, monkeypatch) -> None:
    batch, op = trees(), TIERS[chosen](monkeypatch)
    b, s = batch.input_ids.shape
    sizes = {"q_BSX": HEADS * DIM, "k_BSY": GROUPS * DIM, "v_BSY": GROUPS * DIM}
    arrays = {name: drawn(b, s, size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    grad = drawn(b, s, HEADS * DIM, seed=7)
    found = attend(op, arrays, batch.position_ids, batch.end_rows, grad)

    expected = {name: np.zeros_like(a) for name, a in found.items()}
    told = np.zeros((b, s), bool)  # the prompt's own outputs count once, though several answers come after it
    for line, columns in paths(batch):
        own = {name: a[line : line + 1, columns] for name, a in arrays.items()}
        length = len(columns)
        fresh = grad[line : line + 1, columns] * ~told[line, columns][None, :, None]
        told[line, columns] = True
        apart = attend(attention_plain, own, np.arange(length)[None], np.full((1, length), length), fresh)
        expected["out"][line, columns] = apart["out"][0]
        for name in arrays:
            expected[name][line, columns] += apart[name][0]
    lone = batch.segment_ids == 0  # padding sees itself: its output is its value
    values = np.repeat(arrays["v_BSY"].reshape(b, s, GROUPS, DIM), HEADS // GROUPS, axis=2).reshape(b, s, -1)
    expected["out"][lone] = values[lone]
    expected["v_BSY"][lone] = grad.reshape(b, s, GROUPS, HEADS // GROUPS, DIM).sum(3).reshape(b, s, -1)[lone]
    assert_close(found, expected)


def test_a_model_computes_a_tree_as_its_answers_apart() -> None:
    batch, model = trees(), make_model()
    weight = paddle.to_tensor(drawn(*batch.input_ids.shape, 16, seed=5) * (batch.labels != -100)[..., None])

    def hidden(ids, positions, end_rows):
        return model.trunk(*map(paddle.to_tensor, (ids, positions, end_rows.astype("int32")))).hidden_BSD

    def gradients():
        grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
        model.clear_gradients()
        return grads

    out = hidden(batch.input_ids, batch.position_ids, batch.end_rows)
    (out * weight).sum().backward()
    found = gradients() | {"out": (out * weight.astype("bool").astype("float32")).numpy()}

    apart = np.zeros(out.shape, "float32")
    for line, columns in paths(batch):
        length = len(columns)
        own = hidden(batch.input_ids[line : line + 1, columns], np.arange(length)[None], np.full((1, length), length))
        (own * weight[int(line), paddle.to_tensor(columns)]).sum().backward()
        apart[line, columns] = own.numpy()[0]
    assert_close(found, gradients() | {"out": apart * (weight.numpy() != 0)})

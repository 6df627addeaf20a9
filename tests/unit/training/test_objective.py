"""Labels of multi-token prediction, and how a step's loss is put together."""

import numpy as np
import paddle
import pytest

from erniekit.config.architecture import ErnieConfig
from erniekit.data.batch import Batch
from erniekit.losses.router import orthogonal_gradient
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.training.objective import LanguageModelObjective, LossWeights, labels_ahead
from erniekit.training.step import Totals

N = -100


def make_batch(seed=0, rows=2, length=16):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 64, (rows, length))
    labels = np.where(rng.random((rows, length)) < 0.6, rng.integers(3, 64, (rows, length)), N)
    segments = np.ones((rows, length), int)
    segments[:, -2:] = 0
    labels[segments == 0] = N
    return Batch(ids, labels, np.broadcast_to(np.arange(length), ids.shape).copy(), segments)


@pytest.fixture
def model():
    cfg = ErnieConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2,
        moe_intermediate_size=8, moe_layer_start_index=1, moe_layer_end_index=1,
    )  # fmt: skip
    made = ErnieForCausalLM(cfg)
    paddle.seed(0)
    for name, p in made.named_parameters():
        p.set_value(paddle.ones(p.shape) if "norm" in name else paddle.randn(p.shape) * 0.2)
    return made


def run(model, batches, weights=None, totals=None):
    model.clear_gradients()
    totals = totals or Totals.of(batches, row_length=16)
    made = [LanguageModelObjective(weights or LossWeights())(model, batch, totals) for batch in batches]
    for losses in made:
        losses.total.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return sum(float(losses.total) for losses in made), gradients


def halves(batch):
    return [
        Batch(*(getattr(batch, f)[i : i + 1] for f in ("input_ids", "labels", "position_ids", "segment_ids")))
        for i in (0, 1)
    ]


def largest_ratio(found, expected):
    return max(np.abs(found[n] - expected[n]).max() / np.abs(expected[n]).max() for n in expected)


def test_labels_ahead_stay_in_the_document_and_where_both_positions_are_trained():
    labels = np.array([[N, 5, 6, 2, 9, 2, N, N]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    batch = Batch(labels, labels, labels, segments)
    assert labels_ahead(batch, depth=1).tolist() == [[N, 6, 2, N, 2, N, N, N]]
    assert labels_ahead(batch, depth=2).tolist() == [[N, 2, N, N, N, N, N, N]]


def test_totals_count_the_whole_batch():
    batch = make_batch()
    totals = Totals.of(halves(batch), row_length=20)
    assert totals == Totals(
        trained=int((batch.labels != N).sum()), positions=40, micro_batches=2, tokens=int((batch.segment_ids > 0).sum())
    )


@pytest.mark.parametrize("token_balance", [False, True])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(model, token_balance):
    batch, weights = make_batch(), LossWeights(token_balance=token_balance)
    whole, expected = run(model, [batch], weights)
    cut, found = run(model, halves(batch), weights)
    assert cut == pytest.approx(whole, rel=1e-6)
    assert largest_ratio(found, expected) < 1e-5


def test_token_balance_scales_the_gradient_by_trained_over_positions(model):
    batch = make_batch()
    totals = Totals.of([batch], row_length=16)
    plain, expected = run(model, [batch])
    balanced, found = run(model, [batch], LossWeights(token_balance=True))
    assert balanced == pytest.approx(plain, rel=1e-6)
    share = totals.trained / totals.positions
    assert largest_ratio({n: g / share for n, g in found.items()}, expected) < 1e-5


def test_router_terms_are_averaged_over_micro_batches_and_not_reported(model):
    """The orthogonal term does not depend on the tokens: averaged, it pulls as hard as in one micro-batch."""
    name, batch = "model.layers.1.mlp.gate.weight", make_batch()
    plain, before = run(model, halves(batch))
    reported, after = run(model, halves(batch), LossWeights(orthogonal=50.0))
    assert reported == pytest.approx(plain, rel=1e-7)
    pull = 50.0 * orthogonal_gradient(dict(model.named_parameters())[name]).numpy()
    assert np.abs(after[name] - before[name] - pull).max() < 1e-5 * np.abs(pull).max()


def test_balance_term_of_equal_micro_batches_is_that_of_one(model):
    name, batch = "model.layers.1.mlp.gate.weight", make_batch(rows=1)
    terms = LossWeights(balance=5.0, z=2.0)
    once, twice = (
        run(model, [batch] * count, terms)[1][name] - run(model, [batch] * count)[1][name] for count in (1, 2)
    )
    assert np.abs(once - twice).max() < 1e-5 * np.abs(once).max()

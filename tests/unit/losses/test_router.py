"""Router losses against hand-computed values and autograd (techniques.md sections 1 and 2)."""

import math

import numpy as np
import paddle
import pytest

from erniekit.losses.router import balance_loss, bias_step, orthogonal_gradient, orthogonal_loss, z_loss


def everyone(logits):
    return paddle.ones([logits.shape[0]], "int64")


@pytest.mark.parametrize("k", [1, 2, 6])
def test_balance_loss_is_k_when_experts_share_the_tokens_evenly(k):
    experts = 12
    logits = paddle.to_tensor(
        np.stack([np.roll(np.arange(experts)[::-1], i) for i in range(experts)]).astype("float32")
    )
    assert float(balance_loss(logits, everyone(logits), experts_per_token=k)) == pytest.approx(k, rel=1e-6)


def test_balance_loss_is_the_number_of_experts_when_all_tokens_pick_one():
    logits = paddle.zeros([32, 8])
    logits[:, 3] = 60.0
    assert float(balance_loss(logits, everyone(logits), experts_per_token=1)) == pytest.approx(8.0, rel=1e-6)


def test_balance_loss_against_the_formula_and_padding_left_out():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 8)).astype("float32")
    mask = (rng.random(40) < 0.7).astype("int64")
    probs = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    chosen = np.zeros_like(probs)
    np.put_along_axis(chosen, np.argsort(-probs, 1)[:, :3], 1, 1)
    kept = mask.astype(bool)
    expected = 8 * (probs[kept].mean(0) * chosen[kept].mean(0)).sum()
    found = balance_loss(paddle.to_tensor(z), paddle.to_tensor(mask), experts_per_token=3)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_balance_loss_gradient_flows_through_the_probabilities_only():
    logits = paddle.to_tensor(np.random.default_rng(1).normal(size=(16, 4)).astype("float32"), stop_gradient=False)
    balance_loss(logits, everyone(logits), experts_per_token=2).backward()
    step, found = 1e-2, logits.grad.numpy()
    for row, column in ((0, 0), (5, 3)):
        delta = np.zeros((16, 4), "float32")
        delta[row, column] = step
        up, down = (
            float(balance_loss(paddle.to_tensor(logits.numpy() + s * delta), everyone(logits), experts_per_token=2))
            for s in (1, -1)
        )
        assert found[row, column] == pytest.approx((up - down) / (2 * step), abs=2e-4)


def test_a_split_over_ranks_with_reduction_gives_the_whole():
    rng = np.random.default_rng(2)
    z = paddle.to_tensor(rng.normal(size=(30, 8)).astype("float32"))
    mask = paddle.to_tensor((rng.random(30) < 0.8).astype("int64"))
    pieces = [(z[:11], mask[:11]), (z[11:], mask[11:])]
    sums: dict[int, list] = {}
    for part, part_mask in pieces:  # first pass: what every rank contributes, in call order
        calls = []

        def collect(x, calls=calls):
            calls.append(x)
            return x

        balance_loss(part, part_mask, experts_per_token=2, reduce=collect)
        for i, x in enumerate(calls):
            sums.setdefault(i, []).append(x)
    totals = iter([a + b for a, b in sums.values()])
    whole = balance_loss(z, mask, experts_per_token=2)
    part = balance_loss(z[:11], mask[:11], experts_per_token=2, reduce=lambda _: next(totals))
    assert float(part) == pytest.approx(float(whole), rel=1e-6)


def test_z_loss_of_zero_logits_and_of_padding():
    logits = paddle.zeros([10, 64])
    assert float(z_loss(logits, everyone(logits))) == pytest.approx(math.log(64) ** 2, rel=1e-6)
    logits[3:] = 50.0
    mask = paddle.to_tensor([1, 1, 1] + [0] * 7)
    assert float(z_loss(logits, mask)) == pytest.approx(math.log(64) ** 2, rel=1e-6)


def test_orthogonal_loss_at_its_limits():
    orthonormal = paddle.eye(64)[:, :16]
    assert float(orthogonal_loss(orthonormal)) == pytest.approx(0.0, abs=1e-9)
    same = paddle.ones([128, 64])
    assert float(orthogonal_loss(same)) == pytest.approx(1 - 1 / 64, rel=1e-5)
    paddle.seed(0)
    gaussian = paddle.randn([2560, 64])
    assert float(orthogonal_loss(gaussian)) == pytest.approx((1 - 1 / 64) / 2560, rel=0.1)


def test_orthogonal_gradient_is_the_gradient_and_keeps_norms():
    paddle.seed(3)
    weight = paddle.randn([48, 8])
    weight.stop_gradient = False
    orthogonal_loss(weight).backward()
    found = orthogonal_gradient(weight)
    assert float((found - weight.grad).abs().max()) < 1e-6
    assert float((found * weight).sum(0).abs().max()) < 1e-7
    assert float(found.abs().max()) > 1e-4


def test_bias_controller_balances_a_skewed_router():
    rng = np.random.default_rng(0)
    experts, k, skew = 16, 2, np.linspace(1.2, -1.2, 16)
    bias = paddle.zeros([1, experts])
    loads = []
    for _ in range(200):
        z = rng.normal(size=(512, experts)) + skew
        probs = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        chosen = np.argsort(-(probs + bias.numpy()), 1)[:, :k]
        usage = np.bincount(chosen.ravel(), minlength=experts).astype("float32")
        loads.append(usage.max() / usage.mean())
        bias = bias_step(bias, paddle.to_tensor(usage), coefficient=1e-3)
    assert np.mean(loads[:5]) > 2.0
    assert np.mean(loads[-20:]) < 1.45


def test_bias_step_is_the_sign_rule():
    moved = bias_step(paddle.zeros([1, 3]), paddle.to_tensor([9.0, 3.0, 0.0]), coefficient=0.5)
    assert moved.numpy().tolist() == [[-0.5, 0.5, 0.5]]

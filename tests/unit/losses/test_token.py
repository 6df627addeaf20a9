"""Normalisation of token losses (techniques.md section 3)."""

import paddle
import pytest

from erniekit.losses.token import balanced_loss, gradient_only, mean_loss


def gradient(fn, losses):
    x = paddle.to_tensor(losses, stop_gradient=False)
    value = fn(x.sum())
    value.backward()
    return float(value), x.grad.numpy().tolist()


def test_mean_divides_by_the_global_count():
    value, grad = gradient(lambda s: mean_loss(s, trained=8), [1.0, 2.0, 3.0, 4.0])
    assert value == pytest.approx(10 / 8)
    assert grad == pytest.approx([1 / 8] * 4)


def test_balanced_keeps_the_value_and_scales_the_gradient_by_trained_over_positions():
    value, grad = gradient(lambda s: balanced_loss(s, trained=4, positions=16), [1.0, 2.0, 3.0, 4.0])
    assert value == pytest.approx(10 / 4)
    assert grad == pytest.approx([1 / 16] * 4)


def test_balanced_equals_mean_when_every_position_is_trained():
    losses = [0.5, 1.5]
    assert gradient(lambda s: balanced_loss(s, trained=2, positions=2), losses) == gradient(
        lambda s: mean_loss(s, trained=2), losses
    )


def test_balanced_gradient_does_not_depend_on_how_tokens_are_cut_into_micro_batches():
    _, whole = gradient(lambda s: balanced_loss(s, trained=4, positions=32), [1.0, 2.0, 3.0, 4.0])
    _, left = gradient(lambda s: balanced_loss(s, trained=4, positions=32), [1.0])
    _, right = gradient(lambda s: balanced_loss(s, trained=4, positions=32), [2.0, 3.0, 4.0])
    assert left + right == pytest.approx(whole)


def test_nothing_trained_is_zero_and_not_nan():
    assert float(mean_loss(paddle.zeros([]), trained=0)) == 0.0
    assert float(balanced_loss(paddle.zeros([]), trained=0, positions=0)) == 0.0


def test_gradient_only_adds_no_value():
    value, grad = gradient(lambda s: gradient_only(3 * s), [2.0])
    assert (value, grad) == (0.0, [3.0])

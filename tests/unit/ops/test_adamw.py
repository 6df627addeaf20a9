"""The AdamW kernel beside Paddle's."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.ops.adamw import Update, adamw, adamw_plain
from tests.unit.ops.twins import drawn


def after_steps(op, shape, *, weight_decay, gradient_scale):
    p, first, second = paddle.to_tensor(drawn(*shape)), paddle.zeros(shape), paddle.zeros(shape)
    for step in range(1, 5):
        update = Update(0.01, 0.9, 0.95, 1e-6, step, gradient_scale)
        gradient = paddle.to_tensor(drawn(*shape, seed=step) * 10.0 ** (step - 3))
        op(p, gradient, first=first, second=second, master=None, update=update, weight_decay=weight_decay)
    return [x.numpy() for x in (p, first, second)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("gradient_scale", [1.0, 0.07])
@pytest.mark.parametrize("shape", [[1], [7], [5, 33], [3, 40, 64]])
def test_four_steps(shape, gradient_scale, weight_decay):
    settings = {"weight_decay": weight_decay, "gradient_scale": gradient_scale}
    found = after_steps(adamw, shape, **settings)
    for got, want in zip(found, after_steps(adamw_plain, shape, **settings), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert [x.tobytes() for x in found] == [x.tobytes() for x in after_steps(adamw, shape, **settings)]


def test_a_strided_gradient():
    p, first, second = paddle.zeros([4, 6]), paddle.zeros([4, 6]), paddle.zeros([4, 6])
    gradient = paddle.to_tensor(drawn(6, 4)).t()
    adamw(p, gradient, first=first, second=second, master=None, update=Update(0.1, 0.0, 0.0, 0.0, 1), weight_decay=0.0)
    np.testing.assert_allclose(p.numpy(), -0.1 * np.sign(gradient.numpy()), rtol=1e-6)

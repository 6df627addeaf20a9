"""The moving average of the weights."""

import numpy as np
import paddle
import pytest

from erniekit.parallel.mesh import Mesh
from erniekit.parallel.zero import GradientSync
from erniekit.training.averages import Averages
from erniekit.training.optimizer import AdamWSettings, Optimizer
from tests.unit.training.micro import make_model, one_step, weights_of


def parameter(value):
    p = paddle.create_parameter([3], "float32")
    p.set_value(np.full(3, value, "float32"))
    return p


def alone(p):
    return GradientSync({"w": p}, Mesh.single())


def test_constant_weights_stay_their_own_average():
    p = parameter(0.3)
    averages = Averages(alone(p), decay=0.999)
    for step in range(1, 200):
        averages.update({}, num_steps=step)
    assert averages.tensors["w"].numpy().tolist() == p.numpy().tolist()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_of_a_ramp_lags_by_c_over_1_minus_c(decay):
    p = parameter(0.0)
    averages = Averages(alone(p), decay=decay)
    for step in range(1, 301):
        p.set_value(np.full(3, step, "float32"))
        averages.update({}, num_steps=step)
    assert 300 - float(averages.tensors["w"][0]) == pytest.approx(decay / (1 - decay), abs=1e-3)


def test_it_starts_at_the_weights_and_keeps_to_its_interval():
    p = parameter(1.0)
    averages = Averages(alone(p), decay=0.75, interval=3)
    p.set_value(np.full(3, 5.0, "float32"))
    found = []
    for step in range(1, 7):
        averages.update({}, num_steps=step)
        found.append(float(averages.tensors["w"][0]))
    assert found == [1.0, 1.0, 2.0, 2.0, 2.0, 2.75]


def test_it_follows_the_master_of_a_rounded_weight():
    p = parameter(1.0)
    averages = Averages(alone(p), decay=0.0)
    averages.update({"w": paddle.full([3], 1.001)}, num_steps=1)
    assert float(averages.tensors["w"][0]) == np.float32(1.001)


def make_optimizer(model):
    return Optimizer(model.named_parameters(), AdamWSettings(), ema_decay=0.8)


def test_the_model_holds_them_within_and_its_own_weights_afterwards():
    model = make_model()
    optimizer = make_optimizer(model)
    start = weights_of(model)
    one_step(model, optimizer, rate=1e-2)
    own = weights_of(model)
    with pytest.raises(RuntimeError), optimizer.averaged():
        for name, p in model.named_parameters():
            expected = start[name] + 0.2 * (own[name].astype("float64") - start[name])
            assert np.abs(p.numpy() - expected).max() < 1e-6, name
        raise RuntimeError
    for name, p in model.named_parameters():
        assert np.array_equal(p.numpy(), own[name]), name


def test_they_are_part_of_the_state():
    model = make_model()
    optimizer = make_optimizer(model)
    for _ in range(3):
        one_step(model, optimizer, rate=1e-2)
    state = {name: tensor.numpy() for name, tensor in optimizer.state().items()}
    assert "lm_head.weight.ema" in state
    again = make_optimizer(model)
    again.load_state(state, num_steps=3, source="test")
    for name, average in again.averages().items():
        assert np.array_equal(average.numpy(), state[f"{name}.ema"])
    assert Optimizer(model.named_parameters(), AdamWSettings()).averages() is None

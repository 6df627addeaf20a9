"""Optimizer states in host memory: the numbers of resident ones, and one parameter's at a time on the device.

There is no second memory here: a stand-in for it keeps copies, so that what is not brought back is lost.
"""

import numpy as np
import paddle
import pytest

from erniekit.training import optimizer as module
from erniekit.training.offload import to_device, to_host
from erniekit.training.optimizer import AdamWSettings, Optimizer

SHAPES = {"model.layers.0.mlp.up_proj.weight": [6, 4], "model.norm.weight": [4], "model.embed.weight": [9, 4]}
MASTERS = {  # Paddle's AdamW has them on a GPU only
    "dtype": "bfloat16", "matrices": dict.fromkeys(("model.layers.0.mlp.up_proj.weight", "model.embed.weight"), 1),
}  # fmt: skip
ZERO = paddle.nn.initializer.Constant(0.0)
SETTINGS = AdamWSettings(weight_decay=0.1)


class Device:
    """Counts the numbers of states that are on the device."""

    def __init__(self):
        self.there, self.most = 0, 0

    def bring(self, tensor, beside):
        assert beside.name in {p.name for p in self.parameters}
        self.there += tensor.size
        self.most = max(self.most, self.there)
        return tensor.clone()

    def take(self, tensor):
        self.there = max(self.there - tensor.size, 0)
        return tensor.clone()


def parameters(dtype):
    rng = np.random.default_rng(0)
    made = {
        name: paddle.create_parameter(shape, dtype if len(shape) > 1 else "float32", default_initializer=ZERO)
        for name, shape in SHAPES.items()
    }
    for p in made.values():
        p.set_value(paddle.to_tensor(rng.normal(size=p.shape).astype("float32")).astype(p.dtype))
    return made


def trained(dtype="float32", *, cut=None, **keys):
    """Weights and states after six steps; at `cut`, states are saved and loaded."""
    params, rng = parameters(dtype), np.random.default_rng(1)
    optimizer = Optimizer(params.items(), SETTINGS, **keys)
    for number in range(6):
        if number == cut:
            state = {name: value.numpy() for name, value in optimizer.state().items()}
            old, optimizer = optimizer, Optimizer(params.items(), SETTINGS, **keys)
            optimizer.load_state(state, num_steps=old.num_steps, source="here")
        for p in params.values():
            drawn = paddle.to_tensor(rng.normal(size=p.shape).astype("float32"))
            (p.astype("float32") * drawn).sum().backward()
        optimizer.step(0.01, gradient_norm=optimizer.gradient_norm())
    return {name: p.astype("float32").numpy() for name, p in params.items()} | {
        name: tensor.astype("float32").numpy() for name, tensor in optimizer.state().items()
    }


@pytest.fixture
def device(monkeypatch):
    made = Device()
    made.parameters = []
    monkeypatch.setattr(module, "to_device", made.bring)
    monkeypatch.setattr(module, "to_host", made.take)
    real = module.Optimizer.__init__

    def remember(self, named, *args, **keys):
        named = list(named)
        made.parameters += [p for _, p in named]
        real(self, named, *args, **keys)

    monkeypatch.setattr(module.Optimizer, "__init__", remember)
    return made


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"moments": "bfloat16"}, {"ema_decay": 0.9}, {"cut": 3}, MASTERS, {**MASTERS, "cut": 3},
        {**MASTERS, "ema_decay": 0.9},
    ],
    ids=["moments", "in bf16", "averages", "cut", "masters", "masters, cut", "masters, averages"],
)  # fmt: skip
def test_offloaded_states_give_the_same_bits(device, keys):
    expected = trained(**keys)
    assert device.most == 0
    found = trained(**keys, offload=True)
    assert sorted(found) == sorted(expected)
    for name, numbers in expected.items():
        assert np.array_equal(found[name], numbers), name
    assert device.most == 2 * 36 and device.there == 0  # two moments of the largest, or momentum and master


def test_a_cpu_copies_nothing():
    tensor = paddle.ones([3])
    assert to_host(tensor) is tensor and to_device(tensor, paddle.ones([1])) is tensor

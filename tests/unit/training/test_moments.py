"""Muon and bf16 moments in the optimizer: which parameters, how close, how large, how they are saved."""

import itertools

import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.model_io import model_writer
from erniekit.config.load import load_config
from erniekit.ops.adamw import Update, adamw, adamw_plain
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import assemble_optimizer
from erniekit.training.optimizer import matrices_inside
from erniekit.training.state import Checkpoints, load_optimizer
from tests.unit.training.micro import make_model, one_step, weights_of


def train(steps, model=None, optimizer=None, **keys):
    model = model or make_model()
    optimizer = optimizer or assemble_optimizer(model, load_config({"adam_beta2": 0.95, **keys}))
    return model, optimizer, [one_step(model, optimizer, rate=3e-3) for _ in range(steps)]


def test_muon_takes_the_matrices_inside_the_layers():
    names = matrices_inside(make_model())
    assert names["model.layers.1.mlp.experts.gate_up_proj"] == 2
    assert names["model.layers.1.mlp.experts.down_proj"] == names["model.layers.0.mlp.gate_proj.weight"] == 1
    assert not [name for name in names if "embed" in name or "lm_head" in name or "norm" in name or "mlp.gate." in name]
    assert len(names) == 4 + 3 + 4 + 2


def test_muon_lowers_the_loss_at_the_rate_of_adamw():
    _, optimizer, losses = train(40, optim="muon", weight_decay=0.1)
    assert losses[-1] < 0.5 * losses[0]
    state = optimizer.state()
    assert "model.layers.1.mlp.experts.down_proj.momentum" in state
    assert "model.layers.1.mlp.experts.down_proj.moment1" not in state
    assert "model.layers.1.mlp.gate.weight.moment2" in state


def test_bf16_moments_stay_close_to_fp32_moments_in_half_the_memory():
    _, whole, expected = train(50)
    _, small, found = train(50, optim="adamw_16bit_moment")
    assert expected[-1] < 0.3 * expected[0]
    assert np.abs(np.subtract(found, expected)).max() < 0.01 * expected[0]

    def num_bytes(optimizer):
        return sum(tensor.size * tensor.element_size() for tensor in optimizer.state().values())

    assert num_bytes(small) * 2 == num_bytes(whole)


@pytest.mark.parametrize(
    "keys",
    [{"optim": "muon"}, {"use_lowprecision_moment": True}, {"optim": "muon", "use_lowprecision_moment": True},
     {"ema_decay": 0.9}],
)  # fmt: skip
def test_a_saved_state_continues_bit_equal(keys, tmp_path):
    def writer(model, *, ranges, copied):
        assert not copied
        return model_writer(model, "pt", ranges=ranges)

    whole, _, _ = train(6, **keys)
    half, optimizer, _ = train(3, **keys)
    checkpoints = Checkpoints(tmp_path, writer=writer, describe={})
    saved = checkpoints.save(half, optimizer, step=3, progress={})
    again = assemble_optimizer(half, load_config({"adam_beta2": 0.95, **keys}))
    load_optimizer(saved, again, half, Mesh.single())
    assert {n: t.dtype for n, t in again.state().items()} == {n: t.dtype for n, t in optimizer.state().items()}
    train(3, half, again)
    expected, found = weights_of(whole), weights_of(half)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_state_of_another_optimizer_is_refused():
    model, optimizer, _ = train(1)
    state = {name: tensor.numpy() for name, tensor in optimizer.state().items()}
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj.weight' has no momentum"):
        assemble_optimizer(model, load_config({"optim": "muon"})).load_state(state, num_steps=1, source="test")


@pytest.mark.parametrize("move", [adamw, adamw_plain])
def test_ranges_of_a_parameter_are_rounded_as_the_whole(move):
    rng = np.random.default_rng(0)
    weight, gradient = (rng.normal(size=1000).astype("float32") for _ in range(2))

    def moved(cuts):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            p, grad = paddle.to_tensor(weight[start:stop]), paddle.to_tensor(gradient[start:stop])
            moments = [paddle.zeros([stop - start], "bfloat16") for _ in range(2)]
            for step in (1, 2, 3):
                update = Update(0.01, 0.9, 0.999, 1e-8, step)
                move(p, grad.clone(), first=moments[0], second=moments[1], master=None, update=update,
                     weight_decay=0.1, start=start)  # fmt: skip
            parts.append([x.astype("float32").numpy() for x in (p, *moments)])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    for whole, joined in zip(moved([0, 1000]), moved([0, 137, 138, 1000]), strict=True):
        assert np.array_equal(whole, joined)

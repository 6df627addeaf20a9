"""FP8 quantisation-aware training against its definition in numpy, and what its scales do over steps."""

from __future__ import annotations

import dataclasses
import types

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddle import nn

from erniekit.config.fp8 import Fp8, Qat
from erniekit.models.layers import MLP, Linear
from erniekit.models.moe import Experts
from erniekit.ops.arrays.float8 import ADDED
from erniekit.ops.hadamard import SIZE, sylvester
from erniekit.precision.qat import QatTraining, Ranks, use_qat

QAT = Qat(True, False, False, "e5m2", online_steps=200, moving_rate=0.01, forget=False)
E4M3 = ml_dtypes.float8_e4m3fn


def turned(x: np.ndarray) -> np.ndarray:
    """x H in fp64."""
    h = sylvester().astype(np.float64)
    return (x.reshape(-1, SIZE) @ h).reshape(x.shape)


def rounded(x: np.ndarray, scale: float, dtype: type = E4M3, largest: float = 448.0) -> np.ndarray:
    return np.clip(np.float32(x) / np.float32(scale), -largest, largest).astype(dtype).astype(np.float64)


def scale_of(x: np.ndarray, largest: float = 448.0) -> float:
    return np.abs(x).max() / largest + ADDED


class Two(nn.Layer):
    """A linear layer under a name that the settings cover."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.o_proj = Linear(num_in, num_out, bias=False, dtype="float32")


class Block(nn.Layer):
    """What a decoder layer looks like to the settings."""

    def __init__(self, inner: nn.Layer, name: str = "self_attn") -> None:
        super().__init__()
        setattr(self, name, inner)


def linear(x: np.ndarray, w: np.ndarray, qat: Qat = QAT) -> tuple[Linear, QatTraining]:
    model = nn.LayerList([Block(Two(*w.shape))])
    layer = model[0].self_attn.o_proj
    layer.weight.set_value(w)
    return layer, use_qat(model, Fp8("qat", ("attention",), emulate=True, qat=qat))


@pytest.fixture
def xw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(24, 64)).astype(np.float32), rng.normal(size=(64, 48)).astype(np.float32) / 8


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def expected(x: np.ndarray, w: np.ndarray, s_x: float | None = None) -> np.ndarray:
    x, w = turned(x), turned(w.T).T
    s_x, s_w = s_x or scale_of(x), scale_of(w)
    return rounded(x, s_x) @ rounded(w, s_w) * s_x * s_w / SIZE


def test_without_rounding_it_is_the_plain_product(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = (a.astype(np.float64) for a in xw)
    assert np.abs(turned(x) @ turned(w.T).T / SIZE - x @ w).max() < 1e-13


def test_an_outlier_is_spread(rng: np.random.Generator) -> None:
    """One number 200 times the others: the largest beside the root of the mean square."""
    x = rng.normal(size=640)
    x[17] = 200
    crest = [np.abs(one).max() / np.sqrt((one**2).mean()) for one in (x, turned(x))]
    assert crest[0] == pytest.approx(25.1, abs=0.1) and crest[1] == pytest.approx(4.5, abs=0.25)


def test_the_forward_pass_is_the_definition(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    layer, _ = linear(x, w)
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), expected(x, w), rtol=0, atol=2e-6)
    off = np.abs(layer(paddle.to_tensor(x)).numpy() - x @ w).max()
    assert 1e-3 < off < 0.5, "it rounds, and not too much"


def test_without_hadamard(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    layer, _ = linear(x, w, dataclasses.replace(QAT, rotate=False))
    made = rounded(x, scale_of(x)) @ rounded(w, scale_of(w)) * scale_of(x) * scale_of(w)
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), made, rtol=0, atol=2e-6)


def test_gradients_go_straight_through(xw: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> None:
    """dx = g deq(Q_w)^T, dw = x^T g: the dense gradients, but for the rounded weight."""
    x, w = xw
    g = rng.normal(size=(24, 48)).astype(np.float32)
    layer, _ = linear(x, w)
    given = paddle.to_tensor(x, stop_gradient=False)
    layer(given).backward(paddle.to_tensor(g))
    rotated = turned(w.T).T
    held = turned((rounded(rotated, scale_of(rotated)) * scale_of(rotated) / SIZE).T).T
    np.testing.assert_allclose(given.grad.numpy(), g @ held.T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.weight.grad.numpy(), x.T @ g, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
def test_rounded_gradients(xw: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, gradients: str) -> None:
    x, w = xw
    g = rng.normal(size=(24, 48)).astype(np.float32)
    qat = dataclasses.replace(QAT, quant_input_grad=True, quant_weight_grad=True, gradients=gradients)
    layer, _ = linear(x, w, qat)
    given = paddle.to_tensor(x, stop_gradient=False)
    layer(given).backward(paddle.to_tensor(g))
    dtype, largest = (ml_dtypes.float8_e5m2, 57344.0) if gradients == "e5m2" else (E4M3, 448.0)
    s_g = scale_of(g, largest)
    q_g = rounded(g, s_g, dtype, largest) * s_g
    w_turned, x_turned = turned(w.T).T, turned(x)
    q_w = rounded(w_turned, scale_of(w_turned)) * scale_of(w_turned) / SIZE
    q_x = rounded(x_turned, scale_of(x_turned)) * scale_of(x_turned)
    np.testing.assert_allclose(given.grad.numpy(), turned(q_g @ q_w.T), rtol=0, atol=2e-5)
    np.testing.assert_allclose(layer.weight.grad.numpy(), turned((q_x.T @ q_g).T).T / SIZE, rtol=0, atol=2e-5)


def test_scales_over_steps(xw: tuple[np.ndarray, np.ndarray]) -> None:
    """Current while a running mean is kept, then a moving average that rounds; evaluation takes what is kept."""
    x, w = xw
    layer, training = linear(x, w, dataclasses.replace(QAT, online_steps=3))
    base, kept = scale_of(turned(x)), 0.0
    for step, factor in enumerate((1.0, 3.0, 2.0, 8.0, 0.5)):
        found = base * factor
        kept = (step * kept + found) / (step + 1) if step < 3 else 0.99 * kept + 0.01 * found
        used = found if step < 3 else kept
        y = layer(paddle.to_tensor(x * np.float32(factor))).numpy()
        np.testing.assert_allclose(y, expected(x * np.float32(factor), w, used), rtol=1e-3, atol=2e-3)
        training.after_update()
        np.testing.assert_allclose(training.state()["activation_scale/0.self_attn.o_proj"].numpy(), [kept], rtol=1e-5)
    layer.eval()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), expected(x, w, kept), rtol=1e-3, atol=2e-3)


def test_training_and_evaluation_agree_once_the_scale_stands(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    layer, training = linear(x, w, dataclasses.replace(QAT, online_steps=1))
    layer(paddle.to_tensor(x))
    training.after_update()
    trained = layer(paddle.to_tensor(x)).numpy()  # 0.99 a + 0.01 a
    layer.eval()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), trained, rtol=0, atol=1e-6)


def test_a_slow_average_moves(xw: tuple[np.ndarray, np.ndarray]) -> None:
    """In bf16 it would stand still: 1 % of a fifth is less than its spacing."""
    x, w = xw
    layer, training = linear(x, w, dataclasses.replace(QAT, online_steps=1))
    layer(paddle.to_tensor(x))
    training.after_update()
    before = training.state()["activation_scale/0.self_attn.o_proj"].item()
    for _ in range(300):
        layer(paddle.to_tensor(x * np.float32(1.2)))
        training.after_update()
    after = training.state()["activation_scale/0.self_attn.o_proj"].item()
    assert after / before == pytest.approx(1.2 - 0.2 * 0.99**300, rel=1e-4)


def test_a_step_counts_once(xw: tuple[np.ndarray, np.ndarray]) -> None:
    """Micro-batches and layers computed again: the largest scale of the step, once."""
    x, w = xw
    layer, training = linear(x, w)
    for factor in (1.0, 2.0, 2.0, 0.5):
        layer(paddle.to_tensor(x * np.float32(factor)))
    training.after_update()
    state = training.state()
    assert state["activation_steps/0.self_attn.o_proj"].tolist() == [1]
    assert state["activation_scale/0.self_attn.o_proj"].item() == pytest.approx(2 * scale_of(turned(x)), rel=1e-5)


def test_evaluation_counts_nothing(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    layer, training = linear(x, w)
    layer.eval()
    y = layer(paddle.to_tensor(x)).numpy()  # no scale is kept yet: its own
    np.testing.assert_allclose(y, expected(x, w), rtol=0, atol=2e-6)
    training.after_update()
    assert training.state()["activation_steps/0.self_attn.o_proj"].tolist() == [0]


def test_codes_follow_the_weight(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    layer, training = linear(x, w)
    layer(paddle.to_tensor(x))
    layer.weight.set_value(2 * w)
    training.after_update()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), expected(x, 2 * w), rtol=0, atol=4e-6)


def test_gate_and_up_share_a_scale(rng: np.random.Generator) -> None:
    model = nn.LayerList([Block(MLP(64, 32, bias=False, dtype="float32"), "mlp")])
    mlp, x = model[0].mlp, rng.normal(size=(5, 64)).astype(np.float32)
    for layer, factor in ((mlp.gate_proj, 1.0), (mlp.up_proj, 10.0), (mlp.down_proj, 1.0)):
        layer.weight.set_value(rng.normal(size=layer.weight.shape).astype(np.float32) * np.float32(factor))
    training = use_qat(model, Fp8("qat", ("mlp",), emulate=True, qat=QAT))
    assert sorted(training.groups) == ["0.mlp.down_proj", "0.mlp.up_gate_proj"]
    mlp(paddle.to_tensor(x))
    group = training.groups["0.mlp.up_gate_proj"]
    assert group.weight(0).scales.item() == group.weight(1).scales.item()
    largest = np.abs(turned(mlp.up_proj.weight.numpy().T)).max()
    assert group.weight(0).scales.item() == pytest.approx(largest / 448 / SIZE, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["input", "weight", "gradient of the output"])
def test_what_is_not_finite_is_told_once_and_becomes_nan(
    xw: tuple[np.ndarray, np.ndarray], where: str, bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    x, w = xw
    if where in ("input", "weight"):
        (x if where == "input" else w)[3, 5] = bad
    layer, training = linear(x, w, dataclasses.replace(QAT, quant_input_grad=True, online_steps=0))
    given = paddle.to_tensor(x, stop_gradient=False)
    for _ in range(2):
        y = layer(given)
        assert np.isnan(y.numpy()).all() == (where != "gradient of the output")
        (y.sum() * bad).backward()
        assert np.isnan(given.grad.numpy()).all()
    assert f"the {where} of 0.self_attn.o_proj holds NaN or infinity" in training.watch.astray
    assert capsys.readouterr().err.count("NaN or infinity") == 1
    training.watch.begin(looking=False, comparing=False)
    assert training.watch.astray == ""


def test_numbers_of_another_rank_that_are_not_finite_count_here(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    model = nn.LayerList([Block(Two(*w.shape))])
    there = Ranks(everywhere=lambda found: paddle.full_like(found, float("inf")))
    use_qat(model, Fp8("qat", ("attention",), emulate=True, qat=QAT), ranks=there)
    assert np.isnan(model[0].self_attn.o_proj(paddle.to_tensor(x)).numpy()).all()


def test_the_state_comes_back(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    layer, training = linear(x, w)
    layer(paddle.to_tensor(x))
    training.after_update()
    _, other = linear(x, w)
    other.load_state({name: tensor.numpy() for name, tensor in training.state().items()})
    for name, tensor in training.state().items():
        assert np.array_equal(other.state()[name].numpy(), tensor.numpy()), name


@pytest.mark.parametrize("rounds", [False, True])
def test_every_expert_has_its_own_scales(rng: np.random.Generator, *, rounds: bool) -> None:
    """As a linear layer each, but for the scale of rounded gradients, which is one; an expert without rows sleeps."""
    cfg = types.SimpleNamespace(moe_num_experts=3, hidden_size=64, moe_intermediate_size=32)
    model, counts = nn.LayerList([Block(Block(Experts(cfg, dtype="float32"), "experts"), "mlp")]), [4, 0, 7]
    experts = model[0].mlp.experts
    weights = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in experts.named_parameters()}
    for name, p in experts.named_parameters():
        p.set_value(weights[name])
    qat = dataclasses.replace(QAT, quant_input_grad=rounds, quant_weight_grad=rounds)
    training = use_qat(model, Fp8("qat", ("experts",), emulate=True, qat=qat))
    x = rng.normal(size=(11, 64)).astype(np.float32) * np.repeat([1.0, 5.0], [4, 7])[:, None].astype(np.float32)
    g = rng.normal(size=(11, 64)).astype(np.float32)
    given = paddle.to_tensor(x, stop_gradient=False)
    experts.gate_up_product(given, experts.gate_up_proj, counts).backward(paddle.to_tensor(g))
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 11))):
        single, _ = linear(x[rows], weights["gate_up_proj"][expert], qat)
        own = paddle.to_tensor(x[rows], stop_gradient=False)
        y = single(own)
        y.backward(paddle.to_tensor(g[rows]))
        made = experts.gate_up_product(given, experts.gate_up_proj, counts)
        np.testing.assert_allclose(made.numpy()[rows], y.numpy(), rtol=0, atol=1e-4)
        if not rounds:
            np.testing.assert_allclose(given.grad.numpy()[rows], own.grad.numpy(), rtol=0, atol=1e-4)
            grad = experts.gate_up_proj.grad.numpy()[expert]
            np.testing.assert_allclose(grad, single.weight.grad.numpy(), rtol=0, atol=1e-4)
    assert not experts.gate_up_proj.grad.numpy()[1].any()
    training.after_update()
    assert training.state()["activation_steps/0.mlp.experts.gate_up_proj"].tolist() == [1, 0, 1]

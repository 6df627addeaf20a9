"""Routed experts on Triton's kernels beside their plain twins, through the same functions, in Triton's interpreter; and
how Paddle stands behind Triton's driver (extra `parity`)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import paddle
import pytest

from erniekit.ops import dispatch, grouped
from tests.unit.ops.twins import assert_close, assert_twins, drawn, outputs_and_gradients

experts = pytest.importorskip("erniekit.ops.gpu.experts", reason="needs triton (extra parity)")
driver = pytest.importorskip("erniekit.ops.gpu.driver", reason="needs triton (extra parity)")
pytestmark = pytest.mark.parity
TOKENS, CHOICES, EXPERTS, SIZE, WIDTH = 10, 2, 3, 24, 20
ROWS = TOKENS * CHOICES
OPERANDS = {
    "permute": {"x_MD": drawn(TOKENS, SIZE)},
    "add_up": {"y_TD": drawn(ROWS, SIZE)},
    "combine": {"y_TD": drawn(ROWS, SIZE), "weights_MC": drawn(TOKENS, CHOICES)},
    "grouped_linear": {"x_TD": drawn(ROWS, SIZE), "weight_EDF": drawn(EXPERTS, SIZE, WIDTH)},
}
Op = Callable[..., paddle.Tensor]


@pytest.fixture
def order() -> grouped.Order:
    chosen = np.random.default_rng(0).integers(0, EXPERTS - 1, [TOKENS, CHOICES])  # the last has none
    return grouped.sort_by_expert(paddle.to_tensor(chosen), num_experts=EXPERTS)


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule says on a Hopper GPU."""
    monkeypatch.setattr(grouped, "expert_backend", lambda *_: "triton")


def twins(name: str, order: grouped.Order) -> tuple[Op, Op]:
    """The kernel and its plain twin, which take the operands alone."""
    routed = {"counts": order.counts} if name == "grouped_linear" else {"order": order}
    return tuple(functools.partial(getattr(grouped, n), **routed) for n in (name, f"{name}_plain"))


@pytest.mark.parametrize("name", OPERANDS)
def test_twins(order, name):
    assert_twins(*twins(name, order), OPERANDS[name])


@pytest.mark.parametrize(
    ("name", "frozen"), [("combine", "weights_MC"), ("grouped_linear", "x_TD"), ("grouped_linear", "weight_EDF")]
)
def test_what_is_frozen_gets_no_gradient(order, name, frozen):
    found, expected = (outputs_and_gradients(op, OPERANDS[name], frozen=(frozen,)) for op in twins(name, order))
    assert_close(found, expected)


@pytest.mark.parametrize("name", OPERANDS)
def test_rows_may_lie_turned(order, name):
    """Neighbours of a row far from each other in memory."""
    rows = next(iter(OPERANDS[name]))
    given = OPERANDS[name] | {rows: OPERANDS[name][rows].T}
    found, expected = (
        outputs_and_gradients(lambda op=op, **t: op(**t | {rows: t[rows].T}), given) for op in twins(name, order)
    )
    assert_close(found, expected)


def test_grouped_mlp(order):
    arrays = {
        "x_TD": drawn(ROWS, SIZE), "gate_up_ED2I": drawn(EXPERTS, SIZE, 2 * WIDTH),
        "down_EID": drawn(EXPERTS, WIDTH, SIZE),
    }  # fmt: skip
    found, expected = (
        outputs_and_gradients(functools.partial(mlp, counts=order.counts), arrays)
        for mlp in (grouped.grouped_mlp, grouped.grouped_mlp_plain)
    )
    for name, want in expected.items():
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("name", OPERANDS)
def test_what_training_holds_in_bf16(order, name):
    """bf16 in, bf16 out and bf16 gradients, each rounded once."""
    kernel, plain = twins(name, order)
    narrow = {key: paddle.to_tensor(array).astype("bfloat16") for key, array in OPERANDS[name].items()}
    wide = {key: tensor.astype("float32") for key, tensor in narrow.items()}
    for tensor in (*narrow.values(), *wide.values()):
        tensor.stop_gradient = False
    y, expected = kernel(**narrow), plain(**wide)
    grad = paddle.to_tensor(drawn(*y.shape)).astype("bfloat16")
    paddle.autograd.backward([y, expected], [grad, grad.astype("float32")])
    pairs = [(y, expected), *((narrow[key].grad, wide[key].grad) for key in narrow)]
    for found, want in pairs:
        assert found.dtype == paddle.bfloat16
        np.testing.assert_allclose(found.astype("float32").numpy(), want.numpy(), rtol=2**-8, atol=1e-5)


def test_no_rows(order):
    x, w = paddle.zeros([0, SIZE]), paddle.to_tensor(drawn(EXPERTS, SIZE, WIDTH))
    x.stop_gradient = w.stop_gradient = False
    grouped.grouped_linear(x, w, counts=[0] * EXPERTS).sum().backward()
    assert x.grad.shape == [0, SIZE]
    assert not w.grad.any()


@pytest.mark.parametrize(
    ("asked", "dtype", "capability", "chosen"),
    [
        (True, "bfloat16", (9, 0), "triton"), (False, "bfloat16", (9, 0), "plain"), (True, "float32", (9, 0), "plain"),
        (True, "bfloat16", (8, 0), "plain"),
    ],
)  # fmt: skip
def test_the_rule(monkeypatch, asked, dtype, capability, chosen):
    monkeypatch.setenv("ERNIEKIT_TRITON", "1" if asked else "")
    monkeypatch.setattr(dispatch, "backend", lambda *_: "gpu")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    x = paddle.zeros([2, 2]).astype(dtype)
    assert dispatch.expert_backend(x, paddle.zeros([1], "int64")) == chosen


def test_paddle_says_where_to_launch(monkeypatch):
    """Nothing of torch is asked: device, stream and chip are Paddle's, and what was active before is so again."""
    stream = type("Stream", (), {"stream_base": type("Base", (), {"cuda_stream": 77})})
    monkeypatch.setattr(driver, "CudaUtils", lambda: "utils")
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:3")
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:3")
    monkeypatch.setattr(paddle.device, "current_stream", lambda place: stream if place == "gpu:3" else None)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda index: (9, 0) if index == 3 else None)
    driver._driver.cache_clear()
    before = driver.driver._active
    with driver.launching():
        active = driver.driver.active
        assert isinstance(active, driver.PaddleDriver)
        assert active.get_current_stream(active.get_current_device()) == 77
        assert (active.get_current_target().backend, active.get_current_target().arch) == ("cuda", 90)
    assert driver.driver._active is before
    driver._driver.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "uint8", "int32", "int64"])
def test_triton_takes_paddles_tensors(dtype):
    """What Triton's launcher reads of an argument: its type as a pointer."""
    from triton.runtime.jit import mangle_type

    names = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv", "uint8": "u8", "int32": "i32"}
    tensor = paddle.zeros([16]).astype(dtype)
    assert mangle_type(tensor) == "*" + names.get(dtype, "i64")
    assert isinstance(tensor.data_ptr(), int)

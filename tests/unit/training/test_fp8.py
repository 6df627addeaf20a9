"""FP8 in the loop: when the guards look, what they report and warn of, and when copies are forgotten."""

import paddle
import pytest

from erniekit.config.fp8 import Fp8
from erniekit.ops.float8 import E4M3, Tensor, quantise
from erniekit.precision.watch import Watch
from erniekit.training.fp8 import Fp8Training, Together


class Held:
    """What a recipe keeps; notes what it is told."""

    def __init__(self):
        self.calls = []

    def after_update(self):
        self.calls.append("update")

    def forget_weights(self):
        self.calls.append("forget")


class Kept:
    """A memory of one tensor."""

    def __init__(self, name):
        self.name, self.loaded = name, None

    def state(self):
        return {self.name: paddle.ones([1])}

    def load_state(self, state):
        self.loaded = state[self.name]


@pytest.fixture
def made():
    def make(**keys):
        held, watch = Held(), Watch(["a", "b"])
        return Fp8Training(Fp8("blockwise", ("mlp",), emulate=True, **keys), held, watch), held, watch

    return make


def test_figures_are_there_when_a_step_is_logged(made):
    fp8, _, watch = made()
    fp8.begin(0, logged=False)
    assert (watch.looking, watch.comparing) == (False, False) and fp8.report(1) == ({}, {})
    fp8.begin(1, logged=True)
    x = paddle.full([1, 4], 7.0)
    watch.saw("b", "x", given=x, cast=quantise(x, Tensor(), kind=E4M3))
    row, modules = fp8.report(2)
    assert row == {"fp8_amax": 7.0, "fp8_underflow": 0.0, "fp8_overflow": 0.0}
    assert modules["b"] == {"amax": 7.0, "underflow": 0.0, "overflow": 0.0} and modules["a"]["amax"] == 0.0


def test_details_go_to_the_log_if_asked_for(made):
    fp8, _, _ = made(details=True)
    fp8.begin(0, logged=True)
    row, modules = fp8.report(1)
    assert row["fp8"] is modules and "underflow_g" in modules["a"]


def test_comparisons_come_every_so_many_steps(made, capsys):
    fp8, _, watch = made(check_every=3)
    for step in range(6):
        fp8.begin(step, logged=False)
        assert watch.comparing == (step in (2, 5))
    watch.compared("a", paddle.full([2], 1.5), exact=paddle.ones([2]))
    row, modules = fp8.report(6)
    assert row == {"fp8_off": 0.5} and modules == {"a": {"off": 0.5}, "b": {"off": 0.0}}
    assert "a by 50%" in capsys.readouterr().err


def test_clamped_numbers_are_told_once(made, capsys):
    fp8, _, watch = made()
    x = paddle.full([1, 4], 7.0)
    for step, scale in enumerate((1.0, 0.01, 0.01, 1.0, 0.01)):
        fp8.begin(step, logged=True)
        watch.saw("a", "x", given=x, cast=quantise(x, Tensor(), kind=E4M3, scale=paddle.to_tensor(scale)))
        fp8.report(step + 1)
        text = capsys.readouterr().err
        assert ("step" in text) == (step in (1, 4)), text
    assert "a: 100.00% of the numbers" in text and "actscale_moving_rate" in text


def test_weights_that_come_and_go_are_forgotten_twice(made):
    fp8, held, _ = made()
    fp8.after_update()
    with pytest.raises(KeyError), fp8.other_weights():
        raise KeyError
    assert held.calls == ["update", "forget", "forget"]


def test_memories_together():
    one, other = Kept("one"), Kept("other")
    assert Together.of(None, None) is None and Together.of(None, one) is one
    both = Together.of(one, other)
    assert set(both.state()) == {"one", "other"}
    both.load_state({"one": 1, "other": 2})
    assert (one.loaded, other.loaded) == (1, 2)

"""How a fast kernel is compared with its plain twin: outputs and all gradients, from the same numbers.

Every comparison draws a random incoming gradient. `strided` feeds views with gaps between their rows, and an incoming
gradient that is a transposed view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import paddle

TOLERANCE = 1e-5  # largest difference / largest value, per tensor
FLOOR = 0.1  # inputs are of size 1: a gradient that cancels to zero may show their rounding

Op = Callable[..., paddle.Tensor]
Numbers = dict[str, np.ndarray | None]


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal fp32 numbers, another array for every shape and seed."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


def outputs_and_gradients(
    op: Op, arrays: Mapping[str, np.ndarray], *, frozen: tuple[str, ...] = (), strided: bool = False
) -> Numbers:
    """Run `op(**tensors)` and backward; returns the output and `grad.<name>` of every array (None if frozen)."""
    gap = [(1, 2)] if strided else [(0, 0)]
    leaves = {name: paddle.to_tensor(np.pad(a, [(0, 0)] * (a.ndim - 1) + gap)) for name, a in arrays.items()}
    for name, leaf in leaves.items():
        leaf.stop_gradient = name in frozen
    inputs = {name: leaf[..., 1:-2] if strided else leaf for name, leaf in leaves.items()}
    assert all(x.is_contiguous() != strided for x in inputs.values() if x.ndim > 1 and x.shape[0] > 1)
    out = op(**inputs)
    seen = out.transpose(list(range(out.ndim))[::-1]) if strided and out.ndim > 1 else out
    if len(frozen) < len(arrays):
        (seen * paddle.to_tensor(3.0 * drawn(*seen.shape, seed=9))).sum().backward()
    grads = {f"grad.{name}": None if leaf.grad is None else leaf.grad.numpy() for name, leaf in leaves.items()}
    return {"out": out.numpy()} | grads


def assert_close(found: Numbers, expected: Numbers) -> None:
    """Every tensor within TOLERANCE, and None exactly where None is expected."""
    for name, want in expected.items():
        got = found[name]
        assert (got is None) == (want is None), f"{name}: one has it, the other not"
        if want is not None:
            assert got.shape == want.shape, name
            difference = np.abs(got - want).max(initial=0.0)
            assert difference <= TOLERANCE * max(np.abs(want).max(initial=0.0), FLOOR), f"{name}: {difference}"


def assert_same_bits(found: Numbers, expected: Numbers) -> None:
    """Every tensor bit for bit."""
    for name, want in expected.items():
        got = found[name]
        assert (got is None and want is None) or got.tobytes() == want.tobytes(), name


def assert_twins(fast: Op, plain: Op, arrays: Mapping[str, np.ndarray], *, frozen: tuple[str, ...] = ()) -> None:
    """A fast operator equals its plain twin, contiguous and strided, and two runs of it are equal bit for bit."""
    for strided in (False, True):
        found = outputs_and_gradients(fast, arrays, frozen=frozen, strided=strided)
        assert_close(found, outputs_and_gradients(plain, arrays, frozen=frozen, strided=strided))
        assert_same_bits(outputs_and_gradients(fast, arrays, frozen=frozen, strided=strided), found)

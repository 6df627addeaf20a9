"""How a fast kernel is compared with its plain twin: outputs and all gradients, from the same numbers.

Every comparison draws a random incoming gradient. `strided` feeds views with gaps between their rows, and an incoming
gradient that is a transposed view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import paddle
import pytest

from erniekit.ops.cpu.library import library

TOLERANCE = 1e-5  # largest difference / largest value, per tensor
FLOOR = 0.1  # inputs are of size 1: a gradient that cancels to zero may show their rounding

Op = Callable[..., paddle.Tensor]
Numbers = dict[str, np.ndarray | None]


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


def with_gap(array: np.ndarray) -> np.ndarray:
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(1, 2)])


def outputs_and_gradients(
    op: Op, arrays: Mapping[str, np.ndarray], *, frozen: tuple[str, ...] = (), strided: bool = False
) -> Numbers:  # fmt: skip
    """Run `op(**tensors)` and backward; returns the output and `grad.<name>` of every array (None if frozen)."""
    leaves = {name: paddle.to_tensor(with_gap(a) if strided else a) for name, a in arrays.items()}
    for name, leaf in leaves.items():
        leaf.stop_gradient = name in frozen
    inputs = {name: leaf[..., 1:-2] if strided else leaf for name, leaf in leaves.items()}
    assert all(x.is_contiguous() != strided for x in inputs.values() if x.ndim > 1 and x.shape[0] > 1)
    out = op(**inputs)
    seen = out.transpose(list(range(out.ndim))[::-1]) if strided and out.ndim > 1 else out
    if len(frozen) < len(arrays):
        (seen * paddle.to_tensor(3.0 * drawn(*seen.shape, seed=9))).sum().backward()
    found: Numbers = {"out": out.numpy()}
    return found | {f"grad.{name}": None if leaf.grad is None else leaf.grad.numpy() for name, leaf in leaves.items()}


def assert_close(found: Numbers, expected: Numbers) -> None:
    for name, want in expected.items():
        got = found[name]
        assert (got is None) == (want is None), f"{name}: one has it, the other not"
        if want is not None:
            assert got.shape == want.shape
            difference = np.abs(got - want).max(initial=0.0)
            assert difference <= TOLERANCE * max(np.abs(want).max(initial=0.0), FLOOR), f"{name}: {difference}"


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if library() is None:
        pytest.skip("the CPU kernels need g++")


@pytest.fixture
def twins() -> Callable[..., None]:
    """Compare a fast operator with its plain twin, contiguous and strided; and two runs of it bit for bit."""

    def compare(fast: Op, plain: Op, arrays: Mapping[str, np.ndarray], *, frozen: tuple[str, ...] = ()) -> None:
        for strided in (False, True):
            found = outputs_and_gradients(fast, arrays, frozen=frozen, strided=strided)
            assert_close(found, outputs_and_gradients(plain, arrays, frozen=frozen, strided=strided))
            again = outputs_and_gradients(fast, arrays, frozen=frozen, strided=strided)
            for name, want in found.items():
                assert (want is None and again[name] is None) or want.tobytes() == again[name].tobytes(), name

    return compare

"""Training with one exchange between ranks left out: what `tests/parallel` must notice.

A *site* is a place in the program where numbers go over ranks, told by the functions that lead there; the layers of a
model are one place, and so is what is computed again. Left out, a sum over ranks is what the rank itself had; of what
is gathered, or comes from other ranks, only the rank's own part is there, and zeros.

Integers are let through: they are counts of what travels, or of what a loss is divided by, without which ranks would
wait for each other; tests of their own count them (test_expert.py, test_step.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import paddle
from paddle.autograd import PyLayer

import erniekit
from erniekit.config.layout import Layout
from erniekit.parallel import passing
from erniekit.parallel.collectives import Axis, Channel, Handle
from erniekit.parallel.mesh import Mesh
from tests.parallel.equal import Case, Outcome, distances, together, train
from tests.parallel.ranks import run_ranks

_SECONDS = 300  # some twenty trainings, on a busy machine
_PACKAGE = Path(erniekit.__file__).parent
_ENDS = ("models/decoder.py", "training/step.py")  # what leads there does not tell one exchange from another
_AGAIN = "fleet/recompute/"  # nor does what leads to a second computation


def unnoticed(case: Case, layout: Layout) -> tuple[list[str], list[str]]:
    """All sites of the case's training on `layout`, and those without which everything comes out as in one process."""
    found = run_ranks(_train_without, layout, case, seconds=_SECONDS)
    sites = list(found[0])
    return sites, [site for site in sites if _is_right(case, layout, [part[site] for part in found])]


def _is_right(case: Case, layout: Layout, parts: Sequence[Outcome]) -> bool:
    try:
        far = distances(together(case, layout, parts), case.alone)
    except AssertionError:
        return False
    return all(times <= 1 for times in far.values())


def _train_without(mesh: Mesh, case: Case) -> dict[str, Outcome]:
    """What training gives on this rank without each of the sites in turn."""
    seen: dict[str, None] = {}
    with _exchanges(seen):
        train(mesh, case)
    found = {}
    for site in dict.fromkeys(site for sites in mesh.words.collect("sites", list(seen)) for site in sites):
        with _exchanges({}, without=site):
            found[site] = train(mesh, case)
    return found


@contextmanager
def _exchanges(seen: dict[str, None], *, without: str = "") -> Iterator[None]:
    """Within, every site that is come to is put down, and at one of them nothing is sent."""
    started = Axis._started

    def _started(axis: Axis, kind: str, tensor: paddle.Tensor, call: Callable[[Channel], Handle]) -> Handle:
        if axis.size == 1 or not tensor.is_floating_point():
            return started(axis, kind, tensor, call)
        what = f"rows of {tensor.shape[-1]}" if tensor.ndim > 1 else "numbers"
        site = f"{what} over {axis.name}: {_site(sys._getframe(1))}"
        seen[site] = None
        return call(_Alone(axis)) if site == without else started(axis, kind, tensor, call)

    with mock.patch.object(Axis, "_started", _started), _origins():
        yield


@contextmanager
def _origins() -> Iterator[None]:
    """Within, what is sent in a backward pass is told by what led to the forward of the same pair."""
    with ExitStack() as stack:
        for pair in [value for value in vars(passing).values() if isinstance(value, type) and value is not PyLayer]:
            if issubclass(pair, PyLayer):
                stack.enter_context(mock.patch.object(pair, "forward", staticmethod(_remembered(pair.forward))))
                stack.enter_context(mock.patch.object(pair, "backward", staticmethod(_reminded(pair.backward))))
        yield


def _remembered(forward: Callable[..., Any]) -> Callable[..., Any]:
    def remembered(ctx: Any, *given: Any) -> Any:
        ctx.origin = _site(sys._getframe(1))
        return forward(ctx, *given)

    return remembered


def _reminded(backward: Callable[..., Any]) -> Callable[..., Any]:
    def reminded(ctx: Any, *given: Any) -> Any:
        origin = ctx.origin  # noqa: F841 - read by _site
        return backward(ctx, *given)

    return reminded


class _Alone:
    """A channel on which nobody else is heard."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def all_reduce(self, tensor: paddle.Tensor, _op: str) -> Handle:
        return Handle(tensor)

    def all_gather(self, tensor: paddle.Tensor) -> Handle:
        found = paddle.zeros([self._axis.size, *tensor.shape], tensor.dtype)
        found[self._axis.index] = tensor
        return Handle(found.reshape([-1, *tensor.shape[1:]]))

    def reduce_scatter(self, tensor: paddle.Tensor) -> Handle:
        each = tensor.shape[0] // self._axis.size
        return Handle(tensor[self._axis.index * each : (self._axis.index + 1) * each].clone())

    def all_to_all(self, tensor: paddle.Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        found, own = paddle.zeros([sum(receive), *tensor.shape[1:]], tensor.dtype), self._axis.index
        there, here = sum(receive[:own]), sum(send[:own])
        if send[own]:
            found[there : there + send[own]] = tensor[here : here + send[own]]
        return Handle(found)


def _site(frame: FrameType | None) -> str:
    """The functions of the package that lead to an exchange, the innermost first."""
    chain = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _AGAIN in path.as_posix():
            break
        if frame.f_code.co_name == "reminded":
            return " < ".join([*chain, "forward: " + frame.f_locals["origin"]])
        if path.is_relative_to(_PACKAGE) and path.name != "collectives.py":
            name = path.relative_to(_PACKAGE).as_posix()
            if name in _ENDS and chain:
                break
            chain.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(chain)

"""Training with one reduction left out: what `tests/parallel` must notice.

A *site* is a place in the program that adds up over ranks, told by the functions that lead there; the layers of a model
are one place. Left out, a sum over ranks is what the rank itself had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from unittest import mock

import paddle

import erniekit
from erniekit.config.layout import Layout
from erniekit.parallel.collectives import Axis, Handle
from erniekit.parallel.mesh import Mesh
from tests.parallel.equal import Case, Outcome, distances, together, train
from tests.parallel.ranks import run_ranks

_PACKAGE = Path(erniekit.__file__).parent
_ENDS = ("models/decoder.py", "training/step.py")  # what leads there does not tell one reduction from another


def unnoticed(case: Case, layout: Layout) -> tuple[list[str], list[str]]:
    """All sites of the case's training on `layout`, and those without which everything comes out as in one process."""
    found = run_ranks(_train_without, layout, case)
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
    with _reductions(seen):
        train(mesh, case)
    found = {}
    for site in dict.fromkeys(site for sites in mesh.words.collect("sites", list(seen)) for site in sites):
        with _reductions({}, without=site):
            found[site] = train(mesh, case)
    return found


@contextmanager
def _reductions(seen: dict[str, None], *, without: str = "") -> Iterator[None]:
    """Within, every site that is come to is put down, and one of them does nothing."""
    all_reduce, reduce_scatter = Axis.start_all_reduce, Axis.start_reduce_scatter

    def left_out(axis: Axis) -> bool:
        site = _site(sys._getframe(2)) if axis.size > 1 else ""
        if site:
            seen[site] = None
        return bool(site) and site == without

    def start_all_reduce(axis: Axis, tensor: paddle.Tensor, *, op: str = "sum") -> Handle:
        return Handle(tensor) if left_out(axis) else all_reduce(axis, tensor, op=op)

    def start_reduce_scatter(axis: Axis, tensor: paddle.Tensor) -> Handle:
        if not left_out(axis):
            return reduce_scatter(axis, tensor)
        each = tensor.shape[0] // axis.size
        return Handle(tensor[axis.index * each : (axis.index + 1) * each].clone())

    with (
        mock.patch.object(Axis, "start_all_reduce", start_all_reduce),
        mock.patch.object(Axis, "start_reduce_scatter", start_reduce_scatter),
    ):
        yield


def _site(frame: FrameType | None) -> str:
    """The functions of the package that lead to a reduction, the innermost first."""
    chain = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.name != "collectives.py":
            name = path.relative_to(_PACKAGE).as_posix()
            if name in _ENDS and chain:
                break
            chain.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(chain)

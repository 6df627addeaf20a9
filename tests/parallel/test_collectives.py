"""Every collective on 2 and 4 ranks against numpy, for every dtype that is sent, with uneven and empty parts; the bytes
that are counted against hand-computed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from erniekit.config.layout import AXES, Layout
from erniekit.parallel.collectives import Handle
from erniekit.parallel.mesh import Mesh
from tests.parallel.ranks import run_ranks

DTYPES = ("float32", "bfloat16", "int64")
WIDTH = 3


def numbers(rank: int, *shape: int) -> np.ndarray:
    """Small integers, which every dtype holds exactly and whose sums it holds, too."""
    return np.random.default_rng(rank).integers(-9, 9, size=shape)


def send_counts(rank: int, size: int) -> list[int]:
    """Rows to every rank: uneven, none to some, and rank 1 gets none from anybody."""
    return [0 if other == 1 else (rank + 2 * other) % 3 for other in range(size)]


def tell(tensor: paddle.Tensor) -> tuple[str, list]:
    return str(tensor.dtype).removeprefix("paddle."), tensor.astype("float32").numpy().tolist()


def every_kind(mesh: Mesh, dtype: str, rows: int) -> dict[str, Any]:
    axis, found = mesh.axis("world"), {}
    size, rank = axis.size, axis.index

    def mine(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(numbers(rank, *shape)).astype(dtype)

    tensor = mine(rows, WIDTH)
    kept = tensor.clone()
    assert axis.all_reduce(tensor) is tensor  # in place
    found["sum"], found["max"] = tell(tensor), tell(axis.all_reduce(kept, op="max"))
    found["all_gather"] = tell(axis.all_gather(mine(rows, WIDTH)))
    uneven = [rows + r for r in range(size)]
    found["gather_uneven"] = tell(axis.gather_uneven(mine(uneven[rank], WIDTH), uneven))
    found["gather one"] = tell(axis.gather_uneven(mine(rows if rank == 1 else 0, WIDTH), [0, rows, 0, 0][:size]))
    found["reduce_scatter"] = tell(axis.reduce_scatter(mine(size * rows, WIDTH)))
    send = send_counts(rank, size)
    receive = [send_counts(other, size)[rank] for other in range(size)]
    found["all_to_all"] = tell(axis.all_to_all(mine(sum(send), WIDTH), send, receive))
    nothing = [0] * size
    found["all_to_all of nothing"] = tell(axis.all_to_all(mine(0, WIDTH), nothing, nothing))
    found["broadcast"] = tell(axis.broadcast(mine(rows, WIDTH), source=1))
    handles = [axis.start_all_reduce(mine(rows, WIDTH)), axis.start_all_gather(mine(rows, WIDTH))]
    found["started"] = [tell(handle.wait()) for handle in handles]
    return found


def all_cases(mesh: Mesh) -> dict[tuple[str, int], dict[str, Any]]:
    return {(dtype, rows): every_kind(mesh, dtype, rows) for dtype in DTYPES for rows in (0, 4)}


def wanted(rank: int, size: int, rows: int) -> dict[str, np.ndarray]:
    same = [numbers(r, rows, WIDTH) for r in range(size)]
    blocks = sum(numbers(r, size * rows, WIDTH) for r in range(size))
    arrived = []
    for other in range(size):
        send = send_counts(other, size)
        start = sum(send[:rank])
        arrived.append(numbers(other, sum(send), WIDTH)[start : start + send[rank]])
    return {
        "sum": sum(same), "max": np.max(same, axis=0), "all_gather": np.concatenate(same),
        "gather_uneven": np.concatenate([numbers(r, rows + r, WIDTH) for r in range(size)]), "gather one": same[1],
        "reduce_scatter": blocks[rank * rows : (rank + 1) * rows], "all_to_all": np.concatenate(arrived),
        "all_to_all of nothing": np.zeros((0, WIDTH)), "broadcast": same[1],
    }  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_every_collective(size: int) -> None:
    for rank, cases in enumerate(run_ranks(all_cases, Layout(size))):
        for (dtype, rows), found in cases.items():
            right = wanted(rank, size, rows)
            started = found.pop("started")
            assert started == [found["sum"], found["all_gather"]]
            assert found.keys() == right.keys()
            for name, (got_dtype, values) in found.items():
                assert got_dtype == dtype, name
                assert values == right[name].tolist(), f"{name} of {dtype}, {rows} rows, on rank {rank}"


# ---------------------------------------------------------------------- axes
def sums_along_axes(mesh: Mesh) -> dict[str, float]:
    return {name: mesh.axis(name).all_reduce(paddle.to_tensor([2.0**mesh.rank])).item() for name in AXES}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, tensor=2, expert=2, sharding=2, stage=1),
        Layout(4, tensor=2, expert=2, experts_over="tensor"),
        Layout(4, expert=2, sharding=2, stage=1),
    ],
    ids=["TP2 x EP2 x sharding2", "experts over TP2", "EP2 and sharding2 over 4"],
)
def test_an_axis_reaches_its_own_ranks_only(layout: Layout) -> None:
    for rank, found in enumerate(run_ranks(sums_along_axes, layout)):
        for name in AXES:
            (group,) = (group for group in layout.groups(name) if rank in group)
            assert found[name] == sum(2.0**other for other in group), f"{name} of rank {rank}"


# ---------------------------------------------------------------------- traffic
def one_of_each(mesh: Mesh) -> dict[str, int]:
    world, tensor = mesh.axis("world"), mesh.axis("tensor")
    world.all_reduce(paddle.ones([5, 7]))  # 35 numbers of 4 bytes
    tensor.all_reduce(paddle.ones([3], "bfloat16"), op="max")  # 3 of 2
    world.all_gather(paddle.ones([2, 3], "int64"))  # 6 of 8
    world.gather_uneven(paddle.ones([mesh.rank + 1, 2]), [1, 2, 3, 4])  # 2 (rank + 1) of 4, whatever is padded
    tensor.reduce_scatter(paddle.ones([4, 2]))  # 8 of 4
    send = [0, 1, 0, mesh.rank]
    receive = [[0] * 4, [1] * 4, [0] * 4, [0, 1, 2, 3]][mesh.rank]
    world.all_to_all(paddle.ones([sum(send), 8], "bfloat16"), send, receive)  # 8 (rank + 1) of 2, its own rows too
    world.broadcast(paddle.ones([9]))  # 9 of 4
    mesh.axis("shard").all_reduce(paddle.ones([100]))  # alone: nothing is sent
    return dict(mesh.traffic.sent)


def test_traffic_is_what_the_algorithm_needs() -> None:
    for rank, sent in enumerate(run_ranks(one_of_each, Layout(4, tensor=2))):
        assert sent == {
            "world/all_reduce": 140, "tensor/all_reduce": 6, "world/all_gather": 48 + 8 * (rank + 1),
            "tensor/reduce_scatter": 32, "world/all_to_all": (rank + 1) * 16, "world/broadcast": 36,
        }  # fmt: skip


def test_one_rank_sends_nothing_and_gets_what_it_has() -> None:
    mesh, x = Mesh.single(), paddle.ones([2, 3])
    for name in AXES:
        axis = mesh.axis(name)
        assert (axis.size, axis.index, axis.share(5)) == (1, 0, slice(0, 5))
        for result in (
            axis.all_reduce(x), axis.all_gather(x), axis.gather_uneven(x, [2]), axis.reduce_scatter(x),
            axis.all_to_all(x, [2], [2]), axis.broadcast(x),
        ):  # fmt: skip
            assert result is x
    assert not mesh.traffic.sent
    mesh.meet("x")
    mesh.close()
    assert mesh.words.share("x", {"a": 1}) == {"a": 1} and mesh.words.collect("x", 2) == [2]


def test_shares_are_as_even_as_can_be() -> None:
    axis = Mesh.single().axis("world")
    axis.ranks, axis.index = (0, 1, 2, 3), 2
    assert axis.shares(10) == [3, 3, 2, 2] and axis.share(10) == slice(6, 8)
    assert axis.shares(2) == [1, 1, 0, 0] and axis.share(2) == slice(2, 2)


# ---------------------------------------------------------------------- handles
def test_a_handle_waits_once_and_then_does_more() -> None:
    log: list[str] = []
    x = paddle.ones([1])
    handle = Handle(x, lambda: log.append("waited")).then(lambda: log.append("more"))
    assert log == [] and handle.wait() is x and handle.wait() is x
    assert log == ["waited", "more"]
    assert Handle(x).then(lambda: log.append("at once")).result is x and log[-1] == "at once"

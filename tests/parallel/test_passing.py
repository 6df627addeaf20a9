"""Every pair of parallel/passing.py against one process, forward and backward."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.passing import copy_in, exchange, join, join_in, reduce_out, split, split_out, sum_over
from tests.parallel.ranks import run_ranks

ROWS, WIDTH = 7, 6


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def gradient(value: paddle.Tensor, upstream: np.ndarray, of: paddle.Tensor) -> np.ndarray:
    (value * paddle.to_tensor(upstream)).sum().backward()
    return of.grad.numpy()


def tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array, stop_gradient=False)


def pairs(mesh: Mesh) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(result, gradient) of each on this rank; what comes from above is drawn by rank."""
    axis, found = mesh.axis("world"), {}
    whole, own = numbers(ROWS, WIDTH), numbers(ROWS, WIDTH, seed=10 + mesh.rank)
    here = axis.share(ROWS)
    for name, call, given in (
        ("copy_in", copy_in, whole), ("reduce_out", reduce_out, own), ("sum_over", sum_over, own),
        ("split", lambda x, axis: split(x, axis, dim=0), whole),
        ("split_out", lambda x, axis: split_out(x, axis, dim=0), own),
        ("split_out even", lambda x, axis: split_out(x, axis, dim=1), own[:, :4]),
        ("join", lambda x, axis: join(x, axis, dim=0, total=ROWS), whole[here]),
        ("join_in", lambda x, axis: join_in(x, axis, dim=0, total=ROWS), whole[here]),
        ("join_in inner", lambda x, axis: join_in(x, axis, dim=1, total=WIDTH), whole[:, axis.share(WIDTH)]),
    ):  # fmt: skip
        x = tensor(given)
        y = call(x, axis)
        found[name] = (y.numpy(), gradient(y, numbers(*y.shape, seed=20 + mesh.rank), x))
    return found


def upstreams(size: int, *shape: int) -> list[np.ndarray]:
    return [numbers(*shape, seed=20 + rank) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_pairs(size: int) -> None:
    ranks = run_ranks(pairs, Layout(size))
    whole = numbers(ROWS, WIDTH)
    owns = [numbers(ROWS, WIDTH, seed=10 + rank) for rank in range(size)]
    above = upstreams(size, ROWS, WIDTH)
    shares = [ROWS // size + (rank < ROWS % size) for rank in range(size)]
    stops = np.cumsum(shares)
    rows = [slice(stop - share, stop) for stop, share in zip(stops, shares, strict=True)]
    parts = np.concatenate([numbers(share, WIDTH, seed=20 + rank) for rank, share in enumerate(shares)])

    def check(name: str, rank: int, value: np.ndarray, grad: np.ndarray) -> None:
        got = ranks[rank][name]
        np.testing.assert_allclose(got[0], value, rtol=1e-6, atol=1e-6, err_msg=f"{name} of rank {rank}")
        np.testing.assert_allclose(got[1], grad, rtol=1e-6, atol=1e-6, err_msg=f"gradient of {name} of rank {rank}")

    columns = [WIDTH // size + (rank < WIDTH % size) for rank in range(size)]
    ends = np.cumsum(columns)
    for rank in range(size):
        check("copy_in", rank, whole, sum(above))
        check("reduce_out", rank, sum(owns), above[rank])
        check("sum_over", rank, sum(owns), sum(above))
        check("split", rank, whole[rows[rank]], parts)
        check("split_out", rank, sum(owns)[rows[rank]], parts)
        check("join", rank, whole, above[rank][rows[rank]])
        check("join_in", rank, whole, sum(above)[rows[rank]])
        inner = slice(ends[rank] - columns[rank], ends[rank])
        check("join_in inner", rank, whole, sum(above)[:, inner])
        quarter = slice(rank * 4 // size, (rank + 1) * 4 // size)
        gathered = np.concatenate(upstreams(size, ROWS, 4 // size), axis=1)
        check("split_out even", rank, sum(owns)[:, quarter], gathered)


def routed(mesh: Mesh) -> tuple[np.ndarray, np.ndarray, int]:
    """Rank r sends (r + 2 s) % 3 rows to rank s."""
    axis = mesh.axis("world")
    send = [(mesh.rank + 2 * other) % 3 for other in range(axis.size)]
    receive = [(other + 2 * mesh.rank) % 3 for other in range(axis.size)]
    x = tensor(numbers(sum(send), 2, seed=mesh.rank))
    y = exchange(x, axis, send=send, receive=receive)()
    upstream = 100.0 * mesh.rank + np.arange(2 * sum(receive), dtype="float32").reshape(-1, 2)
    grad = gradient(y, upstream, x) if sum(receive) else np.zeros((0, 2))
    return y.numpy(), grad, mesh.traffic.sent["world/all_to_all"]


def test_rows_go_to_other_ranks_and_gradients_come_back() -> None:
    size = 3
    ranks = run_ranks(routed, Layout(size))
    sent = [numbers(sum((r + 2 * s) % 3 for s in range(size)), 2, seed=r) for r in range(size)]
    firsts = [np.cumsum([0, *((r + 2 * s) % 3 for s in range(size))]) for r in range(size)]
    for s in range(size):
        wanted = np.concatenate([sent[r][firsts[r][s] : firsts[r][s + 1]] for r in range(size)])
        np.testing.assert_array_equal(ranks[s][0], wanted)
    for r in range(size):
        arrived = [np.cumsum([0, *((q + 2 * s) % 3 for q in range(size))]) for s in range(size)]
        wanted = np.concatenate([
            100.0 * s + np.arange(2 * arrived[s][-1]).reshape(-1, 2)[arrived[s][r] : arrived[s][r + 1]]
            for s in range(size)
        ])  # fmt: skip
        np.testing.assert_array_equal(ranks[r][1], wanted)
        there, back = sum((r + 2 * s) % 3 for s in range(size)), sum((q + 2 * r) % 3 for q in range(size))
        assert ranks[r][2] == (there + back) * 2 * 4


def test_one_rank_passes_everything_through() -> None:
    axis, x = Mesh.single().axis("world"), tensor(numbers(3, 2))
    assert all(call(x, axis) is x for call in (copy_in, reduce_out, sum_over))
    assert split(x, axis, dim=0) is x and join(x, axis, dim=1, total=2) is x

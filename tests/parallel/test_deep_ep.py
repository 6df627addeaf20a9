"""DeepEP's way to the experts, on a stand-in for its buffer: what we call, in what order, and what we make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from erniekit.config.layout import Layout
from erniekit.parallel.collectives import Axis
from erniekit.parallel.deep_ep import DeepEP, serves
from erniekit.parallel.expert import ExpertDispatcher
from erniekit.parallel.mesh import Mesh
from tests.parallel.test_expert import assert_equal, make_block, tokens


class Event:
    """Remembers whether it was waited for."""

    waited = False

    def current_stream_wait(self) -> None:
        self.waited = True


class Buffer:
    """What DeepEP promises, over the collectives of an axis: a token goes once to every rank that `is_token_in_rank`
    names; what comes back is added up."""

    def __init__(self, axis: Axis, row_bytes: int) -> None:
        self.axis, self.row_bytes, self.events = axis, row_bytes, list[Event]()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        each = num_experts // self.axis.size
        in_rank = np.stack([(topk_idx.numpy() // each == rank).any(1) for rank in range(self.axis.size)], 1)
        per_expert = np.bincount(topk_idx.numpy().ravel(), minlength=num_experts)
        return in_rank.sum(0), None, per_expert, in_rank, None

    def dispatch(
        self, x: Tensor, *, handle: Any = None, num_tokens_per_rank: Any = None, num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None, num_tokens_per_expert: Any = None, topk_idx: Any = None, topk_weights: Any = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        if handle is not None:
            return self._sent(x, handle), None, None, None, handle, None
        assert num_tokens_per_rdma_rank is None
        assert async_finish
        send = [int(count) for count in num_tokens_per_rank]
        receive = self.axis.all_gather(paddle.to_tensor([send]))[:, self.axis.index].tolist()
        tokens_S = paddle.to_tensor(np.concatenate([np.flatnonzero(each) for each in is_token_in_rank.T]))
        handle = (tokens_S, send, receive, x.shape[0])
        each = len(num_tokens_per_expert) // self.axis.size
        chosen_RK = self._sent(topk_idx, handle) - self.axis.index * each
        here_RK = (chosen_RK >= 0) & (chosen_RK < each)
        weights_RK = self._sent(topk_weights, handle) * here_RK.astype("float32")
        chosen_RK = paddle.where(here_RK, chosen_RK, paddle.full_like(chosen_RK, -1))
        counts = [int((chosen_RK == expert).sum()) for expert in range(each)]
        self.events.append(Event())
        return self._sent(x, handle), chosen_RK, weights_RK, counts, handle, self.events[-1]

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        assert all(event.waited for event in self.events)
        tokens_S, send, receive, total = handle

        def added(rows: Tensor) -> Tensor:
            back = self.axis.all_to_all(rows.detach(), receive, send)
            return paddle.zeros([total, rows.shape[1]], rows.dtype).index_add(tokens_S, 0, back)

        return added(x), None if topk_weights is None else added(topk_weights), None

    def _sent(self, x: Tensor, handle: Any) -> Tensor:
        tokens_S, send, receive, _ = handle
        return self.axis.all_to_all(paddle.gather(x.detach(), tokens_S), send, receive)


def put(block: Any, mesh: Mesh) -> None:
    """Let a block go DeepEP's way."""
    block.dispatcher = ExpertDispatcher(mesh, DeepEP(mesh.axis("expert"), Buffer))


def put_weighing(block: Any, mesh: Mesh) -> None:
    """The same, with experts that weigh their rows."""
    put(block, mesh)
    block.experts.weighs_rows = True


def test_tokens_go_deep_ep_s_way() -> None:
    assert_equal(Layout(2, expert=2), tokens(5, 12), put)
    assert_equal(Layout(2, tensor=2, expert=2, experts_over="tensor"), tokens(7), put)


def test_rows_that_bring_their_weights_are_added_up() -> None:
    assert_equal(Layout(2, expert=2), tokens(5, 12), put_weighing)


def test_it_is_not_for_a_cpu() -> None:
    assert not serves(Mesh.single().axis("expert"), make_block(Layout(), 0))

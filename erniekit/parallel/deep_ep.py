"""DeepEP, kernels that bring tokens to experts over NVLink and RDMA, as a way for the dispatcher of expert.py.

DeepEP sends a token once to every rank that holds one of its experts, not once for every expert, and adds up what the
ranks send back. So the weights travel with the tokens, and a rank adds up what its experts make of a token before that
goes back. Rows travel as they are, whatever wire experts have. The bytes are not counted as traffic: how many there are
only the library knows.

The library itself was not run: it needs Hopper GPUs, and Paddle has it only in wheels for GPUs. What is called here is
called in tests as well, on a stand-in for CPU ranks.
Shapes: M tokens, K experts per token, R tokens received, T rows of experts here, D hidden size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from erniekit.models.moe import Experts
from erniekit.ops.gradients import only, wanted
from erniekit.parallel.collectives import Axis

_MODULE = "paddle.distributed.communication.deep_ep"
_HOPPER = 9  # the major number of its compute capability


def serves(axis: Axis, model: nn.Layer) -> bool:
    """The rule that picks DeepEP: a model in bf16 on Hopper GPUs, a number of ranks that it knows, and a Paddle that
    has it."""
    on_gpu = paddle.device.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")
    if not on_gpu or paddle.device.cuda.get_device_capability()[0] != _HOPPER:
        return False
    if all(p.dtype != paddle.bfloat16 for p in model.parameters()):
        return False
    known = axis.size in (2, 4) or axis.size % 8 == 0
    return known and importlib.util.find_spec(_MODULE) is not None


def open_buffer(axis: Axis, row_bytes: int) -> Any:
    """DeepEP's memory for rows of so many bytes. Not run."""
    library = importlib.import_module(_MODULE)
    configs = [get(axis.size) for get in (library.Buffer.get_dispatch_config, library.Buffer.get_combine_config)]
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, axis.size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row_bytes, axis.size) for config in configs)
    return library.Buffer(axis.nccl_group, nvlink, rdma)


class DeepEP:
    """A way to the experts and back; one for all layers, which take turns in its buffer."""

    def __init__(self, axis: Axis, open_buffer: Callable[[Axis, int], Any] = open_buffer) -> None:
        self._axis, self._open, self._buffer = axis, open_buffer, None

    def __call__(
        self, x_MD: Tensor, chosen_MK: Tensor, weights_MK: Tensor, experts: Experts
    ) -> Callable[[], Tensor]:  # fmt: skip
        """Send tokens; what is returned waits for them, and gives what all experts made of those that were sent."""
        if self._buffer is None:
            self._buffer = self._open(self._axis, x_MD.shape[1] * x_MD.element_size())
        trip = _Trip(self._buffer, chosen_MK, num_experts=experts.num_experts * self._axis.size)
        x_RD, weights_RK = _Send.apply(x_MD, weights_MK.astype("float32"), trip)

        def back() -> Tensor:
            trip.wait()
            return _Return.apply(_expert_sums(x_RD, weights_RK, trip, experts), trip)

        return back


class _Trip:
    """What is known of tokens that are away."""

    def __init__(self, buffer: Any, chosen_MK: Tensor, *, num_experts: int) -> None:
        self.buffer, self.chosen_MK, self.num_experts = buffer, chosen_MK, num_experts
        self.handle: Any = None
        self.event: Any = None
        self.chosen_RK = chosen_MK[:0]  # of the experts here, from 0; -1: one of another rank
        self.counts: list[int] = []

    def wait(self) -> None:
        """Let what follows wait for the tokens."""
        if self.event is not None:
            self.event.current_stream_wait()


class _Send(PyLayer):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weights_MK: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.wanted = trip, wanted(x_MD, weights_MK)
        per_rank, per_node, per_expert, is_in_rank, _ = trip.buffer.get_dispatch_layout(
            trip.chosen_MK, trip.num_experts
        )
        x_RD, trip.chosen_RK, weights_RK, trip.counts, trip.handle, trip.event = trip.buffer.dispatch(
            x_MD, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert, topk_idx=trip.chosen_MK, topk_weights=weights_MK, async_finish=True,
        )  # fmt: skip
        return x_RD, weights_RK

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_RK: Tensor) -> tuple[Tensor | None, ...]:
        grad_MD, grad_MK, _ = ctx.trip.buffer.combine(grad_RD.contiguous(), ctx.trip.handle, topk_weights=grad_RK)
        return only(ctx.wanted, (grad_MD, grad_MK))


class _Return(PyLayer):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.buffer.combine(y_RD, trip.handle)[0]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> Tensor:
        return ctx.trip.buffer.dispatch(grad_MD.contiguous(), handle=ctx.trip.handle)[0]


def _expert_sums(x_RD: Tensor, weights_RK: Tensor, trip: _Trip, experts: Experts) -> Tensor:
    """What the experts here make of every token together: [R, D]."""
    here_T2 = paddle.nonzero(trip.chosen_RK >= 0)  # token, choice
    here_T2 = here_T2[paddle.argsort(paddle.gather_nd(trip.chosen_RK, here_T2), stable=True)]
    token_T = here_T2[:, 0].contiguous()
    x_TD, weights_T = paddle.gather(x_RD, token_T), paddle.gather_nd(weights_RK, here_T2)
    if experts.weighs_rows:
        weighted_TD = experts(x_TD, trip.counts, weights_T).astype("float32")
    else:
        weighted_TD = experts(x_TD, trip.counts).astype("float32") * weights_T.unsqueeze(-1)
    return paddle.zeros(x_RD.shape, "float32").index_add(token_T, 0, weighted_TD).astype(x_RD.dtype)

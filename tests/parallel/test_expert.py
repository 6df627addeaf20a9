"""Experts on many ranks against one process that holds them all: losses, every gradient, weights, statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.models.layers import MLP, parameter
from erniekit.models.moe import MoE
from erniekit.parallel.collectives import Axis, Handle
from erniekit.parallel.expert import use_expert_parallel
from erniekit.parallel.mesh import Mesh
from tests.parallel.equal import Case, Runs
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

ROUTERS = {
    "stage": "SFT", "moe_aux_loss_lambda": 0.5, "moe_z_loss_lambda": 0.3, "moe_orthogonal_loss_lambda": 0.4,
    "moe_use_aux_free": True, "moe_use_aux_free_update_coef": 0.01,
}  # fmt: skip

LORA = {"stage": "SFT", "fine_tuning": "LoRA", "lora_rank": 4, "moe_aux_loss_lambda": 0.5, "recompute": True}
CASES: dict[str, dict[str, Any]] = {
    "routers": ROUTERS,
    "routers, recomputed": {**ROUTERS, "recompute": True},
    "pairs": {"stage": "DPO", "loss_type": "simpo", "moe_aux_loss_lambda": 0.5},
    "adapters": LORA,
    "adapters on 4 bits": {**LORA, "compute_type": "wint4"},
    "adapters on 8 bits": {**LORA, "compute_type": "wint8"},
}
EVERYWHERE = ("routers", "pairs")
TABLE: dict[Layout, tuple[str, ...]] = {
    Layout(2, expert=2): (*EVERYWHERE, "adapters", "adapters on 4 bits", "routers, recomputed"),
    Layout(4, expert=4): EVERYWHERE,
    Layout(4, expert=2): EVERYWHERE,
    Layout(2, tensor=2, expert=2, experts_over="tensor"): (*EVERYWHERE, "adapters", "adapters on 4 bits"),
    Layout(4, tensor=2, expert=2, experts_over="tensor"): EVERYWHERE,
    Layout(4, tensor=2, expert=2): (*EVERYWHERE, "adapters on 8 bits"),
    Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True): EVERYWHERE,
    Layout(4, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True): EVERYWHERE,
    Layout(4, tensor=2, expert=2, sequence_parallel=True): EVERYWHERE,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of a dense layer and two of four experts, of which no token ever chooses the third, and one that looks ahead."""
    folder = tmp_path_factory.mktemp("models") / "sparse"
    write_model(folder, sparse=True, idle=[2], num_nextn_predict_layers=1)
    packed, pairs = steps_of(packed_row, steps=2), steps_of(pair_row, steps=1)
    made = {name: Case(folder, packed, keys, rate=0.02) for name, keys in CASES.items()}
    return Runs({**made, "pairs": Case(folder, pairs, CASES["pairs"])})


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout in TABLE for case in TABLE[layout]], ids=str)
def test_experts_on_ranks_equal_one_process(runs: Runs, layout: Layout, case: str) -> None:
    """Where each rank has one expert, one of them gets no token at all."""
    runs.assert_equal(case, layout, TABLE[layout])


# ---------------------------------------------------------------------- one block by itself
SIZE, EXPERTS, CHOSEN = 6, 4, 2


def make_block(layout: Layout, rank: int) -> MoE:
    """A block without shared experts, which tensor ranks would share; always the same weights."""
    cfg = ErnieConfig(
        vocab_size=8, hidden_size=SIZE, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, head_dim=6,
        num_key_value_heads=1, model_type="ernie4_5_moe", moe_num_experts=EXPERTS, moe_k=CHOSEN,
        moe_intermediate_size=4, moe_layer_start_index=1, moe_layer_end_index=1, moe_num_shared_experts=0,
    )  # fmt: skip
    block, rng, cut = MoE(cfg, dtype="float32"), np.random.default_rng(2), Cut.of(layout, rank)
    held = cut.experts(EXPERTS)
    for name, p in block.named_parameters():
        drawn = rng.normal(0, 0.5, p.shape).astype("float32")
        if name.startswith("experts."):
            p = parameter(block.experts, [len(held), *p.shape[1:]], dtype="float32")
            setattr(block.experts, name.removeprefix("experts."), p)
            drawn = drawn[held.start : held.stop]
        p.set_value(drawn)
    block.experts.num_experts = len(held)
    return block


def tokens(*sizes: int) -> list[np.ndarray]:
    """What the data ranks have: so many tokens each."""
    drawn = np.random.default_rng(5).normal(size=(1, sum(sizes), SIZE)).astype("float32")
    return np.split(drawn, np.cumsum(sizes)[:-1], axis=1)


Passed = tuple[np.ndarray, dict[str, np.ndarray], Counter[str], Counter[str]]
Use = Callable[[nn.Layer, Mesh], None]


def passed(mesh: Mesh, parts: list[np.ndarray], use: Use) -> Passed:
    """A block's output for the tokens of this rank, its gradients, and what was sent forward and in all."""
    block = make_block(mesh.layout, mesh.rank)
    use(block, mesh)
    x = paddle.to_tensor(parts[mesh.coordinates.data], stop_gradient=False)
    y = block(x)[0]
    forward = mesh.traffic.sent.copy()
    paddle.square(y).sum().backward()
    grads = {name: p.grad.numpy() for name, p in block.named_parameters() if not p.stop_gradient}
    return y.numpy(), grads | {"x": x.grad.numpy()}, forward, mesh.traffic.sent


def assert_equal(
    layout: Layout, parts: list[np.ndarray], use: Use = use_expert_parallel
) -> list[tuple[Counter[str], Counter[str]]]:
    """The block on ranks against the block in one piece; what every rank sent, forward and in all."""
    ranks = run_ranks(passed, layout, parts, use)
    y, grads, _, _ = passed(Mesh.single(), [np.concatenate(parts, axis=1)], lambda *_: None)
    rows = np.split(np.arange(y.shape[1]), np.cumsum([part.shape[1] for part in parts])[:-1])
    close = {"rtol": 1e-5, "atol": 1e-6}
    for rank, (own_y, own, _, _) in enumerate(ranks):
        cut = Cut.of(layout, rank)
        held = cut.experts(EXPERTS)
        np.testing.assert_allclose(own_y, y[:, rows[cut.at.data]], **close)
        np.testing.assert_allclose(own["x"], grads["x"][:, rows[cut.at.data]], **close)
        gates = sum(ranks[other][1]["gate.weight"] for other in range(cut.at.tensor, layout.world, layout.tensor))
        np.testing.assert_allclose(gates, grads["gate.weight"], **close)
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            np.testing.assert_allclose(own[name], grads[name][held.start : held.stop], **close)
    return [sent for _, _, *sent in ranks]


@pytest.mark.parametrize("sizes", [(5, 12), (1, 1)], ids=str)
def test_exactly_the_routed_rows_travel_in_both_directions(sizes: tuple[int, ...]) -> None:
    """Rows go out and come back, and so do their gradients; the counts of every expert go first."""
    layout = Layout(2, expert=2)
    sent = assert_equal(layout, tokens(*sizes))
    routed = sum(sizes) * CHOSEN * SIZE * 4  # bytes
    assert sum(forward["expert/all_to_all"] for forward, _ in sent) == 2 * routed
    assert sum(everything["expert/all_to_all"] for _, everything in sent) == 4 * routed
    for _, everything in sent:
        assert everything["expert/all_gather"] == EXPERTS * 8
        assert set(everything) == {"expert/all_to_all", "expert/all_gather"}


def weighing(block: nn.Layer, mesh: Mesh) -> None:
    """Let rows bring their weights to the experts."""
    use_expert_parallel(block, mesh)
    block.experts.weighs_rows = True


@pytest.mark.parametrize("sizes", [(5, 12), (1, 1)], ids=str)
def test_weights_travel_beside_their_rows(sizes: tuple[int, ...]) -> None:
    """The numbers are those of sums that are weighted at the end; the price is an fp32 number for every row."""
    sent = assert_equal(Layout(2, expert=2), tokens(*sizes), weighing)
    rows = sum(sizes) * CHOSEN
    assert sum(forward["expert/all_to_all"] for forward, _ in sent) == rows * (2 * SIZE + 1) * 4
    assert sum(everything["expert/all_to_all"] for _, everything in sent) == 2 * rows * (2 * SIZE + 1) * 4


@pytest.mark.parametrize("size", [7, 1])
def test_tensor_ranks_share_tokens_and_experts(size: int) -> None:
    """Each token goes through the experts of one rank only; of a single token, the second rank sends nothing."""
    layout = Layout(2, tensor=2, expert=2, experts_over="tensor")
    sent = assert_equal(layout, tokens(size))
    assert sum(forward["expert/all_to_all"] for forward, _ in sent) == 2 * size * CHOSEN * SIZE * 4
    assert_equal(layout, tokens(size), weighing)


def test_shared_experts_work_while_rows_are_under_way() -> None:
    order = run_ranks(in_order, Layout(2, expert=2))[0]
    assert order == ["sent", "shared", "arrived", "experts", "sent", "arrived"]


def in_order(mesh: Mesh) -> list[str]:
    """What happens in a block, in order."""
    block, order = make_block(mesh.layout, mesh.rank), []
    use_expert_parallel(block, mesh)
    block.shared_experts = MLP(SIZE, 4, bias=False, dtype="float32")
    block.shared_experts.register_forward_pre_hook(lambda *_: order.append("shared"))
    block.experts.register_forward_pre_hook(lambda *_: order.append("experts"))
    start = Axis.start_all_to_all

    def started(axis: Axis, *given: Any) -> Handle:
        order.append("sent")
        return Handle(start(axis, *given).wait(), lambda: order.append("arrived"))

    Axis.start_all_to_all = started
    block(paddle.to_tensor(tokens(5, 12)[mesh.rank]))
    return order

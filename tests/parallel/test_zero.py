"""Every sharding stage against one process: loss, every gradient, weights after steps of SGD and of AdamW."""

from __future__ import annotations

import functools
import gc
import time
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import paddle
import pytest
from paddle.base import core

from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import Layout
from erniekit.data.batch import Batch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.layered import LayerShards
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.recompute import apply_recompute
from erniekit.parallel.zero import GradientSync
from erniekit.training import optimizer as optimizers
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.optimizer import AdamWSettings, Optimizer
from erniekit.training.step import Totals
from tests.parallel.ranks import run_ranks
from tests.unit.training.micro import make_model

ROWS, LENGTH, MICRO = 4, 16, 2  # rows of a global micro-batch, micro-batches of a step
LAYERS = 24  # of the model whose memory is measured
FLAT_BYTES = 4 * 900  # several flats; the embedding (1024 numbers) is larger than one


def batch(seed: int, rows: slice) -> Batch:
    """Rows of a global micro-batch, with packed documents and another amount of padding in every row."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 64, (ROWS, LENGTH))
    segments = np.repeat(np.array([[1] * 6 + [2] * 10]), ROWS, axis=0)
    for row in range(ROWS):
        segments[row, LENGTH - row :] = 0
    positions = np.broadcast_to(np.array([*range(6), *range(10)]), ids.shape)
    labels = np.where(segments > 0, ids, -100)
    return Batch(*(np.ascontiguousarray(x[rows]) for x in (ids, labels, positions, segments)))


@dataclass(frozen=True)
class Case:
    """How a run is made."""

    adam: bool = True
    steps: int = 3
    clip: float = 0.5
    told: bool = True  # whether backward passes are announced
    recompute: bool = False
    moments: str = "float32"
    ema: float | None = None
    adaptive: bool = False
    frozen: str = ""  # parameters in whose names this is found
    offload: bool = False


@dataclass
class Found:
    """What a rank has seen."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, list[tuple[int, int, np.ndarray]]] = field(default_factory=dict)
    state: list[tuple[str, int, int, bool, np.ndarray]] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    averages: dict[str, np.ndarray] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)


def make(mesh: Mesh, case: Case) -> tuple[ErnieForCausalLM, Optimizer]:
    model = make_model()
    for name, p in model.named_parameters():
        p.stop_gradient = p.stop_gradient or bool(case.frozen and case.frozen in name)
    if case.recompute:
        apply_recompute(model, "full")
    model.train()
    layers = LayerShards(model, mesh) if mesh.layout.stage == 3 else None
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    optimizer = Optimizer(
        model.named_parameters(), AdamWSettings(max_grad_norm=case.clip, weight_decay=0.1, epsilon=1e-5),
        rates={name: 0.5 for name in trained if "gate" in name}, moments=case.moments, ema_decay=case.ema,
        adaptive_clip=case.adaptive, offload=case.offload,
        sync=GradientSync(trained, mesh, flat_bytes=FLAT_BYTES, layers=layers),
    )  # fmt: skip
    return model, optimizer


def train(mesh: Mesh, case: Case) -> Found:
    model, optimizer = make(mesh, case)
    found, objective = Found(), LanguageModelObjective(LossWeights())
    here = mesh.axis("data").share(ROWS)
    for step in range(case.steps):
        whole = [batch(10 * step + micro, slice(None)) for micro in range(MICRO)]
        totals, loss = Totals.of(whole, row_length=LENGTH), paddle.zeros([])
        for micro in range(MICRO):
            if case.told:
                optimizer.expect(last=micro == MICRO - 1)
            made = objective(model, batch(10 * step + micro, here), totals)
            made.total.backward()
            loss = loss + made.total.detach()
        found.losses.append(float(mesh.axis("data").all_reduce(loss)))
        found.norms.append(optimizer.gradient_norm())
        for piece in optimizer.gradients():
            name = f"{step} {piece.name}"
            numbers = piece.tensor.numpy().reshape(-1)
            found.gradients.setdefault(name, []).append((piece.start, piece.stop, numbers.copy()))
        if case.adam:
            optimizer.step(0.01, gradient_norm=found.norms[-1])
        else:
            sgd(optimizer, found.norms[-1], clip=case.clip)
    found.traffic = dict(mesh.traffic.sent)
    for piece in optimizer.pieces():
        numbers = piece.tensor.astype("float32").numpy().reshape(-1)
        found.state.append((f"{piece.name}.{piece.part}", piece.start, piece.stop, piece.first, numbers.copy()))
    with optimizer.whole_weights():
        found.weights = {name: p.numpy().copy() for name, p in model.named_parameters()}
    if case.ema:
        with optimizer.averaged(), optimizer.whole_weights():
            found.averages = {name: p.numpy().copy() for name, p in model.named_parameters()}
        with optimizer.whole_weights():
            assert all(np.array_equal(found.weights[name], p.numpy()) for name, p in model.named_parameters())
    return found


@paddle.no_grad()
def sgd(optimizer: Optimizer, norm: float, *, clip: float) -> None:
    """weight -= rate * gradient, by the same ranges as AdamW."""
    sync = optimizer.sync
    for name in sync.names:
        weight, gradient = sync.weight(name), sync.gradient(name)
        if weight.size:
            weight.subtract_(gradient * (0.5 * min(1.0, clip / norm)))
    optimizer.clear()
    sync.gather_weights()


def joined(ranks: list[Found], name: str) -> np.ndarray:
    """A gradient from what the ranks have of it; where several have the same numbers, they agree."""
    pieces = [piece for found in ranks for piece in found.gradients[name]]
    whole = np.full(max(stop for _, stop, _ in pieces), np.nan, np.float32)
    for start, stop, numbers in pieces:
        seen = ~np.isnan(whole[start:stop])
        np.testing.assert_array_equal(whole[start:stop][seen], numbers[seen], err_msg=name)
        whole[start:stop] = numbers
    assert not np.isnan(whole).any(), name
    return whole


def compare(ranks: list[Found], single: Found, *, tolerance: float) -> None:
    for found in ranks:
        np.testing.assert_allclose(found.losses, single.losses, rtol=1e-6)
        np.testing.assert_allclose(found.norms, single.norms, rtol=1e-5)
        assert found.gradients.keys() <= single.gradients.keys()
        for name, value in single.weights.items():
            np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=tolerance, err_msg=name)
        for name, value in single.averages.items():
            np.testing.assert_allclose(found.averages[name], value, rtol=0, atol=tolerance, err_msg=name)
    for name, [(_, _, wanted)] in single.gradients.items():
        got = joined(ranks, name)
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


LAYOUTS = [
    Layout(2), Layout(4), Layout(2, sharding=2, stage=1), Layout(4, sharding=2, stage=1),
    Layout(2, sharding=2, stage=2), Layout(4, sharding=4, stage=2), Layout(4, sharding=2, stage=2),
    Layout(2, sharding=2, stage=3), Layout(4, sharding=4, stage=3), Layout(4, sharding=2, stage=3),
]  # fmt: skip


def label(layout: Layout) -> str:
    return f"{layout.world} ranks, stage{layout.stage} over {layout.sharding}"


def train_all(mesh: Mesh, cases: list[Case]) -> list[Found]:
    """One after the other: ranks that are up already cost nothing."""
    found = []
    for case in cases:
        mesh.traffic.sent.clear()
        found.append(train(mesh, case))
    return found


@functools.cache
def alone(case: Case) -> Found:
    return train(Mesh.single(), case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_steps_equal_those_of_one_process(layout: Layout) -> None:
    """Of SGD, of AdamW, and of AdamW with everything that may be in the way."""
    busy = Case(told=False, recompute=True, ema=0.5, adaptive=True, frozen="embed_tokens", steps=2)
    cases = [Case(adam=False), Case(), busy, Case(moments="bfloat16", steps=2)]
    for case, *ranks in zip(cases, *run_ranks(train_all, layout, cases), strict=True):
        # bf16 has 8 bits: where a moment falls between two numbers, the last bit of fp32 decides
        compare(ranks, alone(case), tolerance=2e-6 if case.moments == "float32" else 2e-4)
        states_agree(ranks, alone(case))
        if case == Case():
            traffic_is_as_predicted(layout, ranks[0].traffic, steps=case.steps)


def train_offloaded(mesh: Mesh, case: Case) -> tuple[Found, Found]:
    """With states on the device, and in a memory of their own: what is not brought back from there is lost."""
    moved = mock.Mock(side_effect=lambda tensor, *_: tensor.clone())
    with mock.patch.multiple(optimizers, to_host=moved, to_device=moved):
        found = train(mesh, case), train(mesh, replace(case, offload=True))
    assert moved.called
    return found


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_offloaded_states_of_sharded_ranks_give_the_same_bits(moments: str) -> None:
    for resident, offloaded in run_ranks(train_offloaded, LAYOUTS[2], Case(moments=moments, ema=0.5)):
        assert [piece[:4] for piece in offloaded.state] == [piece[:4] for piece in resident.state]
        for mine, its in zip(offloaded.state, resident.state, strict=True):
            np.testing.assert_array_equal(mine[4], its[4], err_msg=its[0])
        for name, array in resident.weights.items():
            np.testing.assert_array_equal(offloaded.weights[name], array, err_msg=name)
        assert (offloaded.losses, offloaded.norms) == (resident.losses, resident.norms)


def states_agree(ranks: list[Found], single: Found) -> None:
    """The pieces of all ranks are the state of one process, each number once among those who come first."""
    for key, start, stop, first, wanted in single.state:
        assert first and (start, stop) == (0, wanted.size)
        pieces = sorted((start, stop, i) for i, found in enumerate(ranks) for k, start, stop, first, _ in found.state
                        if k == key and first and start < stop)  # fmt: skip
        assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces)][:-1], key
        assert pieces[-1][1] == wanted.size, key
        got = np.concatenate([next(x[4] for x in ranks[i].state if x[0] == key) for _, _, i in pieces])
        assert np.abs(got - wanted).max() <= 1e-2 * np.abs(wanted).max(), key


def traffic_is_as_predicted(layout: Layout, sent: dict[str, int], *, steps: int) -> None:
    """4 bytes for every number, padded to whole ranges: accumulation costs nothing before stage 2."""
    parameters = {name: p for name, p in make_model().named_parameters() if not p.stop_gradient}
    cut = [name for name, p in parameters.items() if "layers." in name and p.ndim > 1 and "gate.weight" not in name]
    numbers, held = sum(p.size for p in parameters.values()), sum(parameters[name].size for name in cut)
    assert sent["world/all_reduce"] == steps * 4 * 2 * len(parameters)  # norms, and who has a gradient
    if not layout.stage:
        losses = 4 * steps  # this test's
        assert sent["data/all_reduce"] + sent["expert_copies/all_reduce"] == steps * 4 * numbers + losses
        return

    def total(collective: str) -> float:
        return sum(number for key, number in sent.items() if key.endswith(collective) and "data" not in key) / steps

    padding = 4 * 32 * layout.sharding
    rounds = MICRO if layout.stage > 1 else 1
    assert 4 * numbers * rounds <= total("/reduce_scatter") <= (4 * numbers + padding) * rounds
    own = 4 * numbers / layout.sharding if layout.replicas > 1 else 0
    replicas = sum(sent.get(f"{axis}/all_reduce", 0) for axis in ("replica", "expert_replica")) / steps
    assert own <= replicas <= own + padding
    times = 2 * MICRO if layout.stage == 3 else 1  # before a layer's forward and before its backward
    wanted = 4 * (numbers - held + held * times)
    assert wanted <= total("/all_gather") * layout.sharding <= wanted + padding * times


# ---------------------------------------------------------------------- memory
def tensors() -> int:
    return core.host_memory_stat_current_value("Allocated", 0)


def settled() -> int:
    """The same, once it stays: gloo's threads let go of what they have sent a while after they said that it is done."""
    gc.collect()
    seen, since = tensors(), time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        if (now := tensors()) != seen:
            seen, since = now, time.monotonic()
    return seen


def memory(mesh: Mesh, layout: Layout, *, recompute: bool) -> dict[str, int]:
    """Bytes of tensors on this rank beyond what was there before."""
    before = settled()
    cfg = ErnieConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = ErnieForCausalLM(cfg)
    model.train()
    if recompute:
        apply_recompute(model, "full")
    parameters = dict(model.named_parameters())
    layers = LayerShards(model, mesh) if layout.stage == 3 else None
    sync = GradientSync(parameters, mesh, flat_bytes=2**18, layers=layers)
    resting = settled() - before
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    rows, activations = batch(0, slice(0, 1)), 0
    for last in (False, True):
        made = LanguageModelObjective(LossWeights())(model, rows, Totals.of([rows], row_length=LENGTH))
        activations = activations or tensors() - before - resting
        sync.expect(last=last)
        made.total.backward()
        del made
    sync.finish()
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    kept = settled() - before - resting
    return {"resting": resting, "gradients": kept, "peak": peak, "activations": activations}


def both_memories(mesh: Mesh, layout: Layout) -> list[dict[str, int]]:
    """Of two runs the lower peak: in one, a thread of gloo may have held on to what it had sent for longer."""
    found = []
    for recompute in (False, True):
        one, other = (memory(mesh, layout, recompute=recompute) for _ in range(2))
        found.append(one | {"peak": min(one["peak"], other["peak"])})
    return found


def test_memory_falls() -> None:
    """Of gradients to a half of them, at stage 2; of weights, too, at stage 3, with and without recomputation."""
    second, third = (run_ranks(both_memories, layout, layout)[0] for layout in (LAYOUTS[4], LAYOUTS[7]))
    for two, three in zip(second, third, strict=True):
        whole = two["resting"]
        for found in (two, three):
            assert found["gradients"] == pytest.approx(whole / 2, rel=0.02)
        assert three["resting"] == pytest.approx(whole / 2, rel=0.02)
        layer = whole / LAYERS
        assert two["peak"] < 1.5 * whole + two["activations"] + 3 * layer
        assert three["peak"] < whole + three["activations"] + 6 * layer  # two of weights, gradients on their way

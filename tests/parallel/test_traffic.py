"""What a training step hands to collectives, in bytes, is what arithmetic says of its layout: neither more nor less.

Shapes: N positions of a rank's micro-batch, D hidden size, K experts of a token, E experts, L sparse layers.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from erniekit.checkpoint.ernie45 import memory_table
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.data.batch import Document, Row
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.styles import partial_over_tensor
from tests.parallel.equal import Case, train
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import VOCABULARY, write_model

ROWS, LENGTH = 4, 16  # rows of a micro-batch of all data ranks
N, D, K, E, L = ROWS * LENGTH, 16, 2, 4, 2
LAYERS = {False: 2, True: 3}  # of the models of samples.py; in the sparse one, L of them
EXPERTS = ".mlp.experts."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {sparse: write_model(folder / str(sparse), sparse=sparse) for sparse in (False, True)}


def case_of(folder: Path, micro_batches: int) -> Case:
    """One step of full rows."""
    rng = np.random.default_rng(0)
    step = [
        [Row((Document("text", *rng.integers(3, VOCABULARY, (2, LENGTH))),)) for _ in range(ROWS)]
        for _ in range(micro_batches)
    ]
    return Case(folder, [step], {"stage": "SFT", "moe_health_steps": 0})


def sent(mesh: Mesh, cases: list[Case]) -> list[Counter[str]]:
    found = []
    for case in cases:
        mesh.traffic.sent.clear()
        train(mesh, case)
        found.append(mesh.traffic.sent.copy())
    return found


# ---------------------------------------------------------------------- arithmetic
def between_tensor_ranks(layout: Layout, *, sparse: bool) -> Counter[str]:
    """Of the activations of a micro-batch, on one rank."""
    x, size, bytes_ = 4 * N // layout.data * D, layout.tensor, Counter[str]()
    weights, dense, mixed = x * K // D, LAYERS[sparse] - L * sparse, L * sparse
    whole_experts = layout.experts_over == "tensor"
    if size == 1:
        return bytes_
    bytes_["all_gather"] += 3 * 4 * N // layout.data  # of the head: three numbers of every token
    bytes_["all_reduce"] += x  # the gradient that comes out of the head
    blocks = 2 * dense + mixed + mixed * whole_experts  # attention, MLPs, and shared experts that are as they are
    if layout.sequence_parallel:
        doors = 2 * blocks + 1  # into and out of blocks, and out of the embedding
        bytes_["reduce_scatter"] += doors * x
        bytes_["all_gather"] += (doors + 1) * x // size  # and before the head
    else:
        bytes_["all_reduce"] += (2 * blocks + 1) * x
    if whole_experts and not layout.sequence_parallel:  # every rank takes a part of the tokens, there and back
        bytes_["all_gather"] += mixed * (2 * x + weights) // size
    if not whole_experts:  # shared and routed experts are cut in width
        bytes_["all_reduce"] += mixed * (4 * x + weights)
        if layout.sequence_parallel:  # whole rows for the router
            bytes_["all_gather"] += mixed * 2 * x // size
    return Counter({f"tensor/{kind}": number for kind, number in bytes_.items()})


def between_expert_ranks(layout: Layout) -> Counter[str]:
    """Of a micro-batch, on one rank, in the mean over all: the tokens of one and only these."""
    if layout.expert == 1:
        return Counter()
    tokens = N // layout.data // (layout.tensor if layout.experts_over == "tensor" else 1)
    return Counter({"expert/all_gather": L * 8 * E, "expert/all_to_all": L * 4 * tokens * K * 4 * D})


def of_statistics(layout: Layout, *, micro_batches: int, sparse: bool) -> Counter[str]:
    """Of routers, and what ranks tell each other of a step."""
    bytes_, balance, usage = Counter[str](), 4 * (1 + 2 * E) * L * micro_batches, 4 * L * E
    if layout.data > 1:
        bytes_["data/all_reduce"] += 5 * 8 + sparse * (2 * balance + usage)
    if sparse and layout.experts_over == "tensor" and layout.sequence_parallel:
        bytes_["tensor/all_reduce"] += balance + usage
    bytes_["world/all_reduce"] += 8 * (2 + sparse)  # loss, gradient norm, balance
    return bytes_


def of_parameters(case: Case, layout: Layout, *, micro_batches: int) -> Counter[str]:
    """Gradients and weights on one rank. Flats hold everything of one kind; at stage 3, of one kind in one layer."""
    table = memory_table(case.arch, head_bias=False, cut=Cut.of(layout, 0)).tensors
    shapes = {name: tensor.shape for name, tensor in table.items() if "correction_bias" not in name}
    partial, flats = partial_over_tensor(shapes, layout, case.arch), Counter[tuple[bool, str, str]]()
    for name, shape in shapes.items():
        in_layer = layout.stage == 3 and "layers." in name and len(shape) > 1 and ".gate." not in name
        copies = "several" if name in partial and ("k_proj" in name or "v_proj" in name) else "all"
        layer = name.split(".")[2] if in_layer else ""
        flats[EXPERTS in name, layer, copies if name in partial else ""] += math.prod(shape)
    bytes_ = Counter({"world/all_reduce": 4 * 2 * len(shapes)})  # squares, and who has a gradient
    for (experts, layer, copies), numbers in flats.items():
        axes = ("expert_shard", "expert_replica", "expert_copies") if experts else ("shard", "replica", "data")
        shards, replicas, data = (len(layout.groups(axis)[0]) for axis in axes)
        if not layout.stage:
            bytes_[f"{axes[2]}/all_reduce"] += 4 * numbers * (data > 1)
        else:
            own = 4 * -(-numbers // shards)
            rounds = micro_batches if layout.stage > 1 else 1
            bytes_[f"{axes[0]}/reduce_scatter"] += own * shards * rounds * (shards > 1)
            gathered = 2 * micro_batches + 1 if layer else 1  # the last one is `train` reading the weights
            bytes_[f"{axes[0]}/all_gather"] += own * gathered * (shards > 1)
            bytes_[f"{axes[1]}/all_reduce"] += own * (replicas > 1)
            numbers = own // 4
        if copies:
            bytes_["tensor/all_reduce" if copies == "all" else "tensor/all_gather"] += 4 * numbers
    return bytes_


def predicted(case: Case, layout: Layout, *, micro_batches: int) -> Counter[str]:
    """Of all ranks together."""
    sparse, bytes_ = case.arch.is_moe, Counter[str]()
    for _ in range(micro_batches):
        bytes_ += between_tensor_ranks(layout, sparse=sparse)
        bytes_ += between_expert_ranks(layout) if sparse else Counter()
    bytes_ += of_statistics(layout, micro_batches=micro_batches, sparse=sparse)
    bytes_ += of_parameters(case, layout, micro_batches=micro_batches)
    return Counter({kind: number * layout.world for kind, number in bytes_.items() if number})


# ---------------------------------------------------------------------- the layouts of the issue
@pytest.mark.parametrize("layout", [
    Layout(2), Layout(2, tensor=2), Layout(4, tensor=4), Layout(2, tensor=2, sequence_parallel=True),
    Layout(2, expert=2), Layout(4, expert=4), Layout(2, tensor=2, expert=2, experts_over="tensor"),
    Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True),
    Layout(2, sharding=2, stage=1), Layout(4, sharding=4, stage=1), Layout(2, sharding=2, stage=2),
    Layout(4, sharding=2, stage=2), Layout(2, sharding=2, stage=3), Layout(4, sharding=4, stage=3),
    Layout(4, tensor=2, expert=2), Layout(4, expert=2, sharding=2, stage=2), Layout(4, tensor=2, sharding=2, stage=1),
    Layout(4, tensor=2, sharding=2, stage=3, sequence_parallel=True),
], ids=str)  # fmt: skip
def test_a_step_sends_what_arithmetic_says(folders: dict[bool, Path], layout: Layout) -> None:
    """With and without accumulation."""
    kinds = [True] if layout.expert > 1 else [False, True]
    cases = [(case_of(folders[sparse], number), number) for sparse in kinds for number in (1, 2)]
    ranks = run_ranks(sent, layout, [case for case, _ in cases])
    for (case, number), *found in zip(cases, *ranks, strict=True):
        together: Counter[str] = sum(found, Counter())
        assert dict(together) == dict(predicted(case, layout, micro_batches=number)), (case.folder.name, number)

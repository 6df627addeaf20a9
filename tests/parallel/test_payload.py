"""What ranks hand to collectives where a forward pass runs twice (recomputation) and where most weights stand still
(adapters), byte by byte: along the axes of tensors and experts. (Of a plain step, along all axes: test_traffic.py.)

Shapes: M tokens of a micro-batch, padding included; D hidden size; K experts per token; T tensor ranks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from erniekit.config.layout import Layout
from erniekit.parallel.mesh import Mesh
from tests.parallel.equal import Case, batches_of, train
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import packed_row, steps_of, write_model

FLOAT, INT = 4, 8
TWO, IN_PARTS = Layout(2, tensor=2), Layout(2, tensor=2, sequence_parallel=True)
OVER_TENSOR = Layout(2, tensor=2, expert=2, experts_over="tensor")
OVER_TENSOR_IN_PARTS = Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True)
SFT = {"stage": "SFT", "moe_aux_loss_lambda": 0.0, "moe_health_steps": 0}
AGAIN = {**SFT, "recompute": True}
LORA = {**SFT, "fine_tuning": "LoRA", "lora_rank": 4, "lora_target_modules": ["attention"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, sparse=name == "sparse") for name in ("dense", "sparse")}


def sent(mesh: Mesh, cases: list[Case]) -> list[Counter[str]]:
    """What this rank hands over along the axes of tensors and experts, in each case."""
    found = []
    for case in cases:
        mesh.traffic.sent.clear()
        train(mesh, case)
        found.append(Counter({key: size for key, size in mesh.traffic.sent.items() if key.startswith(("ten", "exp"))}))
    return found


def needed(case: Case, layout: Layout) -> Counter[str]:
    """The same, predicted for all ranks together."""
    arch, parts, total = case.arch, layout.tensor, Counter[str]()
    again, adapted = 1 + case.cfg.train.recompute, case.cfg.model.fine_tuning == "LoRA"
    [step] = case.steps
    for rows in step:
        for data in range(layout.data):
            share = len(rows) // layout.data
            [batch] = batches_of([rows[data * share : (data + 1) * share]], Mesh.single())
            tokens = batch.input_ids.size
            for ways in _ways(arch, layout, again=again, adapted=adapted):
                for (key, width, number), times in ways.items():
                    total[key] += parts * times * tokens * width * number
    once = _once(case, layout)
    return +(total + Counter({key: layout.world * size for key, size in once.items()}))


def _ways(arch: Any, layout: Layout, *, again: int, adapted: bool) -> list[Counter[tuple[str, float, int]]]:
    """How often each tensor rank hands over so many numbers of so many bytes for every token: of the embedding and the
    head, and of every layer."""
    hidden, parts = arch.hidden_size, layout.tensor
    whole = ("tensor/all_reduce", hidden, FLOAT)
    scattered, gathered = ("tensor/reduce_scatter", hidden, FLOAT), ("tensor/all_gather", hidden / parts, FLOAT)
    inside = Counter({scattered: 1, gathered: 1} if layout.sequence_parallel else {whole: 1})  # a block, one way
    if layout.tensor == 1:
        inside = Counter()
    found = []
    if layout.tensor > 1:
        ends = Counter({whole: 1, ("tensor/all_gather", 3, FLOAT): 1})  # into the head, and what is known of a token
        if layout.sequence_parallel:  # out of the embedding and back, whole rows for the head
            ends += Counter({scattered: 1, gathered: 1 + (not adapted)})
        else:
            ends += Counter({whole: 1})
        found.append(ends)
    for layer in range(arch.num_hidden_layers):
        way, back = Counter(inside), Counter(inside)
        if adapted and layer == 0:  # the frozen embedding wants no gradient
            back = Counter({gathered: 1} if layout.sequence_parallel else {})
        if not arch.is_sparse(layer):
            way, back = way + inside, back + inside
        else:
            one, other = _mixture(arch, layout, inside=inside)
            way, back = way + one, back + other
        found += [way] * again + [back]
    return found


def _mixture(arch: Any, layout: Layout, *, inside: Counter) -> tuple[Counter, Counter]:
    """Of a mixture of experts with shared ones, there and back."""
    hidden, chosen, parts = arch.hidden_size, arch.moe_k, layout.tensor
    routed = Counter[tuple[str, float, int]]()
    if layout.expert > 1:  # rows go out and come back
        routed["expert/all_to_all", hidden * chosen / (parts if layout.experts_over == "tensor" else 1), FLOAT] = 2
    part, weights = ("tensor/all_gather", hidden / parts, FLOAT), ("tensor/all_gather", chosen / parts, FLOAT)
    if parts == 1:
        return routed, routed
    if layout.experts_over == "tensor":
        if layout.sequence_parallel:
            return routed + inside, routed + inside
        return routed + inside + Counter({part: 1}), routed + inside + Counter({part: 1, weights: 1})
    whole = ("tensor/all_reduce", hidden, FLOAT)  # of the shared experts, and of the routed ones
    there, back = Counter({whole: 2}), Counter({whole: 2, ("tensor/all_reduce", chosen, FLOAT): 1})
    rows = Counter({part: 1} if layout.sequence_parallel else {})
    return routed + rows + there, routed + rows + back


def _once(case: Case, layout: Layout) -> Counter[str]:
    """What a rank hands over whatever the number of tokens: counts of rows in every pass; gradients that are partial
    and usage of experts once in a step, however many micro-batches it has."""
    arch, keys, found = case.arch, case.cfg, Counter[str]()
    layers, experts = len(arch.moe_layers), arch.moe_num_experts
    if layout.expert > 1:
        passes = len(case.steps[0]) * (1 + keys.train.recompute)
        found["expert/all_gather"] = passes * layers * experts * INT
    partial = 0
    if keys.model.fine_tuning == "LoRA":  # A of queries, keys and values, B of outputs
        partial = arch.num_hidden_layers * 4 * arch.hidden_size * keys.lora.lora_rank
    elif layout.sequence_parallel:
        partial = (2 * arch.num_hidden_layers + 1) * arch.hidden_size
        if layout.experts_over == "tensor":  # routers see a part of the positions
            partial += layers * arch.hidden_size * experts
    if layout.sequence_parallel and layout.experts_over == "tensor":
        partial += layers * experts  # usage
    if layout.tensor > 1:
        found["tensor/all_reduce"] = partial * FLOAT
    if layout.tensor > arch.num_key_value_heads:  # several ranks hold the same key head: a matrix, or B of its adapter
        ins = keys.lora.lora_rank if keys.model.fine_tuning == "LoRA" else arch.hidden_size
        found["tensor/all_gather"] = arch.num_hidden_layers * 2 * ins * arch.head_dim * FLOAT
    return found


@pytest.mark.parametrize(("layout", "names"), [
    (TWO, ("dense", "sparse")), (IN_PARTS, ("dense", "sparse")), (Layout(4, tensor=4), ("dense",)),
    (Layout(2, expert=2), ("sparse",)), (OVER_TENSOR, ("sparse",)), (OVER_TENSOR_IN_PARTS, ("sparse",)),
    (Layout(4, tensor=2, expert=2), ("sparse",)),
], ids=str)  # fmt: skip
def test_bytes_of_a_step(folders: dict[str, Path], layout: Layout, names: tuple[str, ...]) -> None:
    """Of two micro-batches; adapters are on attention, over a frozen embedding."""
    step = steps_of(packed_row, steps=1)
    cases = [Case(folders[name], step, keys) for name in names for keys in (AGAIN, LORA)]
    for case, *ranks in zip(cases, *run_ranks(sent, layout, cases), strict=True):
        assert dict(sum(ranks, Counter())) == dict(needed(case, layout)), case.keys

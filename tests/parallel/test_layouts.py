"""That a layout trains as one process does: losses and figures, every gradient, the weights after some steps.

Every case has several documents in a row, padding, two micro-batches in a step and a gradient that is clipped; three
steps of SGD. What has to be shown, and the rows of TABLE that show it (beside them: test_tensor.py, test_expert.py,
test_zero.py, each for its own part; test_chance.py, for everything mixed at random):

    layout                          with                                              rows
    tensor 2                        packing, tied head, head of its own               tensor 2
    tensor 4                        the same; 2 key heads on 4 ranks                  tensor 4 | tensor 4, sequences
    tensor 2 and sequences          the same                                          tensor 2, sequences
    experts 2, 4, over tensor 2     aux, z and orthogonal losses, correction bias     experts 2 | tensor 2, experts 2 |
                                                                                      experts over tensor
                                    a rank whose experts get no token                 experts 2 | experts 4 |
                                                                                      experts over tensor
    stage 1, 2, 3 on 2 ranks        accumulation, clip; dense and experts             states | gradients | weights
    stage 1, 2, 3 on 4 ranks        the same                                          states 4 | gradients 2, twice |
                                                                                      weights 4
    tensor 2 x experts 2            recomputation, LoRA, DPO, prediction ahead        tensor 2, experts 2
    experts 2 x sharding 2          the same                                          experts 2, gradients 2 |
                                                                                      experts 2, weights 2
    tensor 2 x sharding 2           the same                                          tensor 2, gradients 2 |
                                                                                      tensor 2, weights 2
"""

from __future__ import annotations

from typing import Any

import pytest

from erniekit.config.layout import Layout
from tests.parallel.equal import Case, Runs
from tests.parallel.sabotage import unnoticed
from tests.parallel.samples import packed_row, pair_row, steps_of, write_model

ROUTERS = {
    "moe_aux_loss_lambda": 0.5, "moe_z_loss_lambda": 0.3, "moe_orthogonal_loss_lambda": 0.4, "moe_use_aux_free": True,
    "moe_use_aux_free_update_coef": 0.01,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False, "use_bias": True}
TEXT, PAIRS = steps_of(packed_row), steps_of(pair_row)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All models have 2 key heads."""
    folder = tmp_path_factory.mktemp("models")
    tied = write_model(folder / "tied", sparse=False)
    untied = write_model(folder / "untied", sparse=False, head_bias=True, **UNTIED)
    sparse = write_model(folder / "sparse", sparse=True, num_nextn_predict_layers=1)
    biased = write_model(folder / "biased", sparse=True, num_nextn_predict_layers=1, **UNTIED)
    idle = write_model(folder / "idle", sparse=True, idle=range(4), moe_num_experts=8)
    sft: dict[str, Any] = {"stage": "SFT", **ROUTERS}
    dpo: dict[str, Any] = {"stage": "DPO", "num_nextn_predict_layers": 1}
    return Runs({
        "tied": Case(tied, TEXT, {"stage": "SFT"}),
        "untied": Case(untied, TEXT, {"stage": "SFT"}),
        "adamw": Case(tied, TEXT, {"stage": "SFT", "adam_epsilon": 1e-4}, rate=0.01, adamw=True),
        "experts": Case(sparse, TEXT, sft),
        "biased experts": Case(biased, TEXT, {**sft, "recompute": True, "recompute_granularity": "full_attn"}),
        "a rank without tokens": Case(idle, TEXT, {**sft, "recompute": True}),
        "adapters": Case(sparse, TEXT, {**sft, "fine_tuning": "LoRA", "recompute": True}),
        "pairs": Case(sparse, PAIRS, {**dpo, "loss_type": "simpo"}),
        "pairs with adapters": Case(sparse, PAIRS, {**dpo, "fine_tuning": "LoRA", "recompute": True}),
    })  # fmt: skip


TABLE: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "tensor 2": (Layout(2, tensor=2), ("tied", "untied", "biased experts", "pairs")),
    "tensor 2, sequences": (
        Layout(2, tensor=2, sequence_parallel=True), ("tied", "untied", "biased experts", "adapters"),
    ),
    "tensor 4": (Layout(4, tensor=4), ("untied", "experts")),
    "tensor 4, sequences": (Layout(4, tensor=4, sequence_parallel=True), ("untied", "biased experts")),
    "experts 2": (Layout(2, expert=2), ("experts", "a rank without tokens", "adapters")),
    "experts 4": (Layout(4, expert=4), ("a rank without tokens", "pairs")),
    "experts over tensor": (
        Layout(2, tensor=2, expert=2, experts_over="tensor"), ("experts", "a rank without tokens", "adapters"),
    ),
    "experts over tensor, sequences": (
        Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True), ("biased experts", "pairs"),
    ),
    "data 2": (Layout(2), ("experts", "pairs with adapters")),
    "states": (Layout(2, sharding=2, stage=1), ("experts", "adamw")),
    "gradients": (Layout(2, sharding=2, stage=2), ("experts", "adamw")),
    "weights": (Layout(2, sharding=2, stage=3), ("experts", "adamw", "adapters")),
    "states 4": (Layout(4, sharding=4, stage=1), ("experts", "adamw")),
    "gradients 2, twice": (Layout(4, sharding=2, stage=2), ("untied", "experts")),
    "weights 4": (Layout(4, sharding=4, stage=3), ("adamw", "a rank without tokens")),
    "tensor 2, experts 2": (
        Layout(4, tensor=2, expert=2), ("experts", "biased experts", "pairs with adapters"),
    ),
    "experts 2, gradients 2": (Layout(4, expert=2, sharding=2, stage=2), ("a rank without tokens", "pairs")),
    "experts 2, weights 2": (Layout(2, expert=2, sharding=2, stage=3), ("experts", "adapters")),
    "tensor 2, gradients 2": (Layout(4, tensor=2, sharding=2, stage=2), ("biased experts", "adapters")),
    "tensor 2, weights 2": (
        Layout(4, tensor=2, sharding=2, stage=3, sequence_parallel=True), ("experts", "pairs with adapters", "adamw"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in TABLE for case in TABLE[name][1]])
def test_parallel_equals_single(runs: Runs, name: str, case: str) -> None:
    runs.assert_equal(case, *TABLE[name])


@pytest.mark.parametrize(("name", "case", "least"), [
    ("tensor 2, experts 2", "experts", 24), ("tensor 2, sequences", "biased experts", 20),
    ("experts over tensor, sequences", "experts", 20), ("experts 2, gradients 2", "a rank without tokens", 15),
    ("weights", "experts", 18),
])  # fmt: skip
def test_no_exchange_between_ranks_can_be_left_out(runs: Runs, name: str, case: str, least: int) -> None:
    """Every place in the program where numbers go over ranks, left out in turn, forward and backward."""
    layout, chosen = TABLE[name][0], runs.cases[case]
    keys = {**chosen.keys, "num_nextn_predict_layers": 0}  # one more layer has no other places
    sites, missed = unnoticed(Case(chosen.folder, steps_of(packed_row, steps=1), keys), layout)
    assert len(sites) >= least, sites
    assert not missed, "\n".join(missed)

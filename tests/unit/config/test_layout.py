"""The arithmetic of layouts by hand, and every way in which degrees, ranks and models do not fit each other."""

from __future__ import annotations

import pytest

from erniekit.base.errors import ConfigError, MeshError
from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import AXES, Coordinates, Layout, layout_of
from erniekit.config.layout_rules import idle
from erniekit.config.load import load_config

DENSE = ErnieConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip
SPARSE = DENSE.replace(
    model_type="ernie4_5_moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=2,
    moe_layer_start_index=1, moe_layer_end_index=1,
)  # fmt: skip


def of(world: int, arch: ErnieConfig | None = SPARSE, **keys: object) -> Layout:
    return layout_of(load_config(keys), world, arch)


def problems(world: int, arch: ErnieConfig | None = SPARSE, **keys: object) -> list[str]:
    with pytest.raises(MeshError) as caught:
        of(world, arch, **keys)
    return caught.value.problems


# ---------------------------------------------------------------------- arithmetic
def test_ranks_are_counted_with_the_tensor_axis_innermost() -> None:
    layout = Layout(8, tensor=2, expert=2, sharding=2, stage=1)
    assert (layout.data, layout.replicas) == (4, 2)
    assert layout.coordinates(5) == Coordinates(tensor=1, data=2, shard=0, replica=1, expert=0)
    assert layout.groups("world") == [list(range(8))]
    assert layout.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("data") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.groups("shard") == layout.groups("expert") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("replica") == layout.groups("expert_copies") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("expert_shard") == [[rank] for rank in range(8)]
    assert layout.groups("expert_replica") == layout.groups("expert_copies")


def test_more_expert_ranks_than_shards_and_the_other_way_round() -> None:
    more = Layout(8, expert=4, sharding=2, stage=1)
    assert more.groups("expert") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert more.groups("expert_copies") == more.groups("expert_replica") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    fewer = Layout(8, expert=2, sharding=4, stage=1)
    assert fewer.groups("expert_copies") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert fewer.groups("expert_shard") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert fewer.groups("expert_replica") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_experts_over_the_tensor_ranks() -> None:
    layout = Layout(4, tensor=2, expert=2, experts_over="tensor")
    assert layout.groups("expert") == layout.groups("tensor") == [[0, 1], [2, 3]]
    assert [layout.coordinates(rank).expert for rank in range(4)] == [0, 1, 0, 1]
    assert layout.groups("expert_copies") == layout.groups("data") == [[0, 2], [1, 3]]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("expert", [1, 2, 4])
@pytest.mark.parametrize("sharding", [1, 2, 4])
def test_groups_of_every_axis_are_all_ranks_once(tensor: int, expert: int, sharding: int) -> None:
    layout = Layout(8 * tensor, tensor=tensor, expert=expert, sharding=sharding, stage=1)
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        assert len({len(group) for group in groups}) == 1 and all(group == sorted(group) for group in groups)
    copies, parts = len(layout.groups("expert_copies")[0]), ("expert_shard", "expert_replica")
    assert copies == len(layout.groups(parts[0])[0]) * len(layout.groups(parts[1])[0]) == layout.data // expert


# ---------------------------------------------------------------------- what degrees ask for
@pytest.mark.parametrize(
    ("world", "keys", "layout"),
    [
        (1, {}, Layout()),
        (4, {}, Layout(4)),
        (1, {"sharding": "stage1", "moe_group": "mp", "sequence_parallel": True}, Layout()),
        (4, {"tensor_parallel_degree": 2}, Layout(4, tensor=2)),
        (2, {"tensor_parallel_degree": 2, "sequence_parallel": True}, Layout(2, tensor=2, sequence_parallel=True)),
        (4, {"sharding": "stage2"}, Layout(4, sharding=4, stage=2)),
        (4, {"sharding": "stage1", "sharding_parallel_degree": 1}, Layout(4)),
        (4, {"sharding": "stage3", "sharding_degree": 2}, Layout(4, sharding=2, stage=3)),
        (4, {"expert_parallel_degree": 2}, Layout(4, expert=2)),
        (4, {"use_expert_parallel": True}, Layout(4, expert=4)),
        (4, {"use_expert_parallel": True, "expert_parallel_degree": 2}, Layout(4, expert=2)),
        (8, {"moe_group": "dp", "tensor_parallel_degree": 2}, Layout(8, tensor=2, expert=4)),
        (
            4, {"moe_group": "tp", "tensor_parallel_degree": 2, "expert_parallel_degree": 2},
            Layout(4, tensor=2, expert=2, experts_over="tensor"),
        ),
        (
            4, {"moe_group": None, "tensor_parallel_degree": 2, "expert_parallel_degree": 2},
            Layout(4, tensor=2, expert=2),
        ),
    ],
)  # fmt: skip
def test_what_degrees_imply(world: int, keys: dict, layout: Layout) -> None:
    config = load_config(keys)
    before = config.flat()
    assert layout_of(config, world, SPARSE) == layout
    assert config.flat() == before


def test_a_model_without_experts_shares_none() -> None:
    keys = {"moe_group": "mp", "tensor_parallel_degree": 2, "use_expert_parallel": True}
    assert of(4, DENSE, **keys) == Layout(4, tensor=2)
    assert of(4, None, **keys) == Layout(4, tensor=2, expert=2, experts_over="tensor")


# ---------------------------------------------------------------------- what does not fit
def test_two_groups_for_the_experts_are_refused_with_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"moe_group": "mp", "tensor_parallel_degree": 2, "expert_parallel_degree": 4})
    (line,) = caught.value.problems
    for word in ("moe_group: mp", "tensor_parallel_degree: 2", "expert_parallel_degree: 4", "moe_group=dummy"):
        assert word in line


def test_experts_and_shards_that_group_ranks_otherwise() -> None:
    with pytest.raises(ConfigError, match=r"expert_parallel_degree: 2.*sharding_parallel_degree: 3"):
        load_config({"sharding": "stage1", "sharding_parallel_degree": 3, "expert_parallel_degree": 2})


@pytest.mark.parametrize(
    ("world", "keys", "words"),
    [
        (1, {"tensor_parallel_degree": 2}, ["tensor_parallel_degree: 2 (argument) needs 2 devices", "CFG --nproc 2",
                                            "set tensor_parallel_degree=1"]),
        (1, {"expert_parallel_degree": 4, "sharding": "stage1", "sharding_parallel_degree": 2},
         ["need 4 devices", "--nproc 4", "sharding_parallel_degree=1, expert_parallel_degree=1"]),
        (3, {"tensor_parallel_degree": 2}, ["there are 3", "start 2 or 4"]),
        (2, {"tensor_parallel_degree": 2, "expert_parallel_degree": 2}, ["there are 2", "start 4 ("]),
        (2, {"sharding_parallel_degree": 2}, ["does not say what is sharded", "sharding: null", "sharding=stage1"]),
        (2, {"tensor_parallel_degree": 2, "optim": "muon"},
         ["optim: muon", "tensor_parallel_degree: 2", "optim=adamw", "tensor_parallel_degree=1"]),
        (2, {"sharding": "stage1", "optim": "muon"}, ["optim: muon", "sharding: stage1", "sharding=null"]),
        (2, {"stage": "DPO", "sharding": "stage3", "ref_model_update_steps": 5},
         ["ref_model_update_steps: 5", "sharding: stage3", "sharding=stage2", "ref_model_update_steps=-1"]),
        (2, {"stage": "KTO", "sharding": "stage3", "fine_tuning": "LoRA", "lora_path": "adapter"},
         ["lora_path: adapter", "sharding: stage3", "sharding=stage2", "lora_path=null"]),
        (2, {"stage": "DPO", "sharding": "stage3", "fine_tuning": "LoRA", "modules_to_save": ["lm_head"]},
         ["modules_to_save: ", "sharding: stage3", "sharding=stage2", "modules_to_save=null"]),
        (16, {"tensor_parallel_degree": 16}, ["8 attention heads", "24 width of experts", "1, 2, 4, 8"]),
        (5, {"tensor_parallel_degree": 5}, ["2 key and value heads", "96 words", "48 width of MLPs", "1, 2, 4, 8",
                                            "--pad-to-multiple 5"]),
        (16, {"tensor_parallel_degree": 16, "moe_group": "mp"}, ["8 experts"]),
        (3, {"expert_parallel_degree": 3}, ["expert_parallel_degree: 3", "8 experts", "3 ranks: 1"]),
        (6, {"use_expert_parallel": True}, ["use_expert_parallel: true", "6 devices", "8 experts", "6 ranks: 1, 2"]),
        (6, {"moe_group": "data"}, ["moe_group: data", "6 devices"]),
    ],
)  # fmt: skip
def test_what_does_not_fit(world: int, keys: dict, words: list[str]) -> None:
    (line,) = problems(world, **keys)
    for word in words:
        assert word in line


@pytest.mark.parametrize("keys", [
    {"stage": "DPO", "sharding": "stage2", "ref_model_update_steps": 5},
    {"stage": "DPO", "sharding": "stage3", "loss_type": "simpo", "ref_model_update_steps": 5},
    {"stage": "RM", "sharding": "stage3", "fine_tuning": "LoRA", "lora_path": "adapter"},
    {"stage": "SFT", "sharding": "stage3", "fine_tuning": "LoRA", "lora_path": "adapter", "modules_to_save": ["norm"]},
    {"stage": "DPO", "sharding": "stage3", "fine_tuning": "Full", "lora_path": "adapter"},
], ids=str)  # fmt: skip
def test_copies_that_nobody_makes_do_not_matter(keys: dict) -> None:
    assert of(2, **keys).sharding == 2


def test_what_is_shared_by_one_rank_alone_is_told_and_no_error() -> None:
    cfg = load_config({"sharding": "stage1", "sequence_parallel": True})
    assert layout_of(cfg, 1).stage == 0
    assert idle(cfg, layout_of(cfg, 1)) == (
        "on one rank nothing is shared by sharding: stage1 (argument) and sequence_parallel: true (argument)"
    )
    of_two = idle(cfg, layout_of(cfg, 2))
    assert of_two == "on 2 ranks laid out so nothing is shared by sequence_parallel: true (argument)"
    other = load_config({"sharding": "stage2", "sequence_parallel": True, "tensor_parallel_degree": 2})
    assert idle(other, layout_of(other, 4)) == idle(load_config({}), Layout()) == ""


def test_experts_of_a_model_without_any() -> None:
    (line,) = problems(2, DENSE, expert_parallel_degree=2)
    assert "expert_parallel_degree: 2" in line and "no experts" in line


def test_the_model_is_judged_where_it_is_known() -> None:
    assert of(16, None, tensor_parallel_degree=16) == Layout(16, tensor=16)


def test_everything_at_once() -> None:
    found = problems(
        4, tensor_parallel_degree=3, expert_parallel_degree=3, sharding_parallel_degree=3, optim="muon"
    )
    assert len(found) == 5
    for line, word in zip(found, ("sharded", "there are 4", "muon", "attention heads", "3 devices"), strict=True):
        assert word in line


def test_a_run_resumes_under_another_layout() -> None:
    one = load_config({})
    other = load_config({
        "tensor_parallel_degree": 2, "sequence_parallel": True, "expert_parallel_degree": 2, "sharding": "stage2",
        "sharding_parallel_degree": 2, "use_expert_parallel": True, "moe_group": "dummy",
    })  # fmt: skip
    assert other.difference(one.flat()) == [] and one.results_hash() == other.results_hash()

"""What ranks hold of a model, out of whole folders: together everything, each its own part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from paddle.base import core

from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.create import create
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import weight_files
from erniekit.checkpoint.model_io import build_model
from erniekit.checkpoint.source import Held, fill
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.config.layout import Layout

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
LAYOUTS = [
    Layout(2, tensor=2), Layout(4, tensor=4), Layout(4, expert=4), Layout(4, tensor=2, expert=2),
    Layout(2, tensor=2, expert=2, experts_over="tensor"),
]  # fmt: skip


def fits(cfg: ErnieConfig, layout: Layout) -> bool:
    """Whether a model can be cut so."""
    cut_sizes = (cfg.num_attention_heads, cfg.vocab_size, cfg.intermediate_size)
    whole = cfg.is_vl or any(total % layout.tensor for total in cut_sizes)
    return not whole and (layout.expert == 1 or cfg.is_moe)


def cases() -> Iterator[tuple[Path, Layout]]:
    """Every golden model with every layout that fits."""
    for path in sorted(path.parent for path in GOLDEN.rglob("config.json")):
        if weight_files(path) and not is_adapter(path):
            yield from ((path, layout) for layout in LAYOUTS if fits(ErnieConfig.from_folder(path), layout))


def tensors(folder: Folder, cut: Cut) -> dict[str, np.ndarray]:
    """The parameters of a rank."""
    table = memory_table(folder.config, head_bias=folder.has_head_bias, cut=cut)
    found = {}
    for name, tensor in table.tensors.items():
        found[name] = np.full(tensor.shape, np.nan, np.float32)
        fill(found[name], tensor, Held(folder, table.held))
    return found


def expected(name: str, whole: np.ndarray, cut: Cut, folder: Folder) -> np.ndarray:
    """The part of a parameter, said once more in the plainest way."""
    cfg, t, at = folder.config, cut.layout.tensor, cut.at
    if name.endswith((".o_proj.bias", ".down_proj.bias")):
        return whole
    if ".experts." in name:
        each = len(whole) // cut.layout.expert
        whole = whole[at.expert * each : (at.expert + 1) * each]
        if cut.layout.experts_over == "tensor":
            return whole
        if name.endswith("gate_up_proj"):
            return np.concatenate([np.split(half, t, -1)[at.tensor] for half in np.split(whole, 2, -1)], -1)
        return np.split(whole, t, 1)[at.tensor]
    if ".k_proj." in name or ".v_proj." in name:
        heads = np.split(whole, cfg.num_key_value_heads, -1)
        each = max(cfg.num_attention_heads // t, 1)
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        mine = sorted({query // group for query in range(at.tensor * each, (at.tensor + 1) * each)})
        return np.concatenate([heads[head] for head in mine], -1)
    if any(part in name for part in (".q_proj.", ".gate_proj.", ".up_proj.")):
        return np.split(whole, t, -1)[at.tensor]
    if name.endswith((".o_proj.weight", ".down_proj.weight")) or "embed_tokens" in name or name == "lm_head.bias":
        return np.split(whole, t, 0)[at.tensor]
    if name == "lm_head.weight":
        return np.split(whole, t, whole.shape.index(cfg.vocab_size))[at.tensor]
    return whole


@pytest.mark.parametrize(("path", "layout"), list(cases()), ids=str)
def test_every_rank_gets_its_part_of_every_parameter(path: Path, layout: Layout) -> None:
    folder = Folder.open(path)
    whole = tensors(folder, WHOLE)
    for rank in range(layout.world):
        cut = Cut.of(layout, rank)
        mine = tensors(folder, cut)
        assert mine.keys() == whole.keys()
        for name, array in mine.items():
            np.testing.assert_array_equal(array, expected(name, whole[name], cut, folder), err_msg=f"{name}, {rank}")


@pytest.mark.parametrize("layout", LAYOUTS[-2:], ids=str)
def test_a_model_of_a_part_has_the_part_in_its_parameters(layout: Layout) -> None:
    folder = Folder.open(next(path for path, _ in cases() if ErnieConfig.from_folder(path).is_moe))
    for rank in range(layout.world):
        cut = Cut.of(layout, rank)
        model, wanted = build_model(folder, folder.config, cut=cut), tensors(folder, cut)
        found = dict(model.named_parameters())
        assert list(found) == list(dict(build_model(folder, folder.config).named_parameters()))
        for name, p in found.items():
            np.testing.assert_array_equal(p.numpy(), wanted[name], err_msg=name)
        experts = next(layer.mlp.experts for layer in model.model.layers if layer.sparse)
        assert [experts.num_experts, experts.width, experts.size] == experts.down_proj.shape
        attention = model.model.layers[0].self_attn
        assert [attention.q_proj.num_in, attention.q_proj.num_out] == attention.q_proj.weight.shape


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("ranks", [Layout(2, tensor=2), Layout(4, tensor=2, expert=2)], ids=str)
def test_a_rank_reads_its_slices_and_holds_no_more(
    layout: str, ranks: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create("micro-moe", tmp_path / "model", layout=layout)
    folder, read, real = Folder.open(tmp_path / "model"), list[int](), Held.read

    def counted(self: Held, atom: str) -> np.ndarray:
        seen = real(self, atom)
        read.append(seen.size)
        return seen

    monkeypatch.setattr(Held, "read", counted)
    table = memory_table(folder.config, head_bias=False)
    everything = sum(math.prod(tensor.shape) for tensor in table.tensors.values())
    for rank in range(ranks.world):
        read.clear()
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        before = core.host_memory_stat_current_value("Allocated", 0)
        model = build_model(folder, folder.config, cut=Cut.of(ranks, rank))
        peak = core.host_memory_stat_peak_value("Allocated", 0) - before
        sizes = [p.size for p in model.parameters()]
        assert sum(read) == sum(sizes) < 0.6 * everything
        assert peak < 4 * (sum(sizes) + 2 * max(sizes)) + 512 * len(sizes)  # a tensor or two on their way; alignment
        del model


def test_drawn_weights_are_parts_of_the_whole_drawn_one() -> None:
    folder = Folder.open(next(path for path, _ in cases() if ErnieConfig.from_folder(path).is_moe))
    cfg = folder.config.replace(num_nextn_predict_layers=1)
    whole = dict(build_model(folder, cfg, mtp_init="random", seed=5).named_parameters())
    for rank in range(2):
        cut = Cut.of(Layout(2, tensor=2), rank)
        part = dict(build_model(folder, cfg, mtp_init="random", seed=5, cut=cut).named_parameters())
        name = "model.mtp_block.0.self_attn.q_proj.weight"
        np.testing.assert_array_equal(part[name].numpy(), np.split(whole[name].numpy(), 2, 1)[rank])


def test_layouts_partition_the_world() -> None:
    for world, tensor, expert, sharding in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4), (1, 2, 4)):
        data = world // tensor
        if world % tensor or data % expert or data % sharding:
            continue
        layout = Layout(world, tensor=tensor, expert=expert, sharding=sharding)
        for axis in ("tensor", "data", "shard", "replica", "expert", "expert_copies", "expert_shard", "expert_replica"):
            groups = layout.groups(axis)
            assert sorted(rank for group in groups for rank in group) == list(range(world))
        for rank in range(world):
            group = {axis: next(g for g in layout.groups(axis) if rank in g) for axis in (
                "data", "shard", "replica", "expert", "expert_copies", "expert_shard", "expert_replica", "tensor",
            )}  # fmt: skip
            assert len(group["shard"]) * len(group["replica"]) == len(group["data"]) == data
            assert len(group["expert"]) * len(group["expert_copies"]) == data
            assert len(group["expert_shard"]) * len(group["expert_replica"]) == len(group["expert_copies"])
            assert set(group["expert_shard"]) <= set(group["shard"]) and set(group["shard"]) <= set(group["data"])

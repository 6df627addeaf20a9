"""The table of tensor parallelism says the same as the checkpoint's map of what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import weight_files
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout
from erniekit.parallel.styles import held_ranges, holders, partial_over_tensor, slot_of

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
TWO, FOUR = Layout(2, tensor=2), Layout(4, tensor=4)
OVER_TENSOR = Layout(2, tensor=2, expert=2, experts_over="tensor")
BLOCK = "model.layers.0."
GQA = ErnieConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip


def cases() -> Iterator[tuple[Path, Layout]]:
    """Every golden text model with every layout that fits."""
    for path in sorted(path.parent for path in GOLDEN.rglob("config.json")):
        if weight_files(path) and not is_adapter(path) and not (arch := ErnieConfig.from_folder(path)).is_vl:
            yield from ((path, layout) for layout in (TWO, FOUR, OVER_TENSOR) if layout.expert == 1 or arch.is_moe)


@pytest.mark.parametrize(("path", "layout"), list(cases()), ids=str)
def test_parts_have_the_sizes_of_the_checkpoint_map(path: Path, layout: Layout) -> None:
    folder = Folder.open(path)
    arch = folder.config
    whole = memory_table(arch, head_bias=folder.has_head_bias)
    for rank in range(layout.world):
        cut = Cut.of(layout, rank)
        part = memory_table(arch, head_bias=folder.has_head_bias, cut=cut)
        for name, tensor in whole.tensors.items():
            shape = list(tensor.shape)
            if slot_of(name).style.experts:
                shape[0] = len(cut.experts(shape[0]))
            dim, ranges = held_ranges(name, tuple(shape), cut, arch)
            if dim is not None:
                shape[dim] = sum(held.stop - held.start for held in ranges)
            assert tuple(shape) == tuple(part.tensors[name].shape), (name, rank)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.z_proj.weight", "model.layers.0.mlp.gates.weight", "heads"])
def test_a_name_without_a_row_is_an_error(name: str) -> None:
    with pytest.raises(AssertionError, match="no row"):
        slot_of(name)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (BLOCK + "self_attn.q_proj.weight", [[0], [1], [2], [3]]),
        (BLOCK + "self_attn.k_proj.weight", [[0, 1], [2, 3]]),
        (BLOCK + "self_attn.v_proj.adapter.lora_B", [[0, 1], [2, 3]]),
        (BLOCK + "self_attn.v_proj.adapter.lora_A", [[0, 1, 2, 3]]),
        (BLOCK + "self_attn.o_proj.bias", [[0, 1, 2, 3]]),
        (BLOCK + "mlp.experts.down_adapter.lora_A", [[0], [1], [2], [3]]),
        ("model.norm.weight", [[0, 1, 2, 3]]),
        ("model.embed_tokens.weight", [[0], [1], [2], [3]]),
    ],
)
def test_holders(name: str, groups: list[list[int]]) -> None:
    assert holders(name, FOUR, GQA) == groups
    assert holders(name, Layout(), GQA) == [[0]]


def test_partial_gradients() -> None:
    names = {
        "row": [BLOCK + "mlp.down_proj.adapter.lora_B", BLOCK + "self_attn.o_proj.adapter.magnitude"],
        "column": [BLOCK + "mlp.gate_proj.adapter.lora_A", BLOCK + "mlp.experts.gate_up_adapter.lora_A"],
        "few heads": [BLOCK + "self_attn.k_proj.weight", BLOCK + "self_attn.v_proj.bias"],
        "positions": [BLOCK + "input_layernorm.weight", "model.norm.weight", BLOCK + "self_attn.o_proj.bias"],
        "never": [BLOCK + "mlp.gate.weight", BLOCK + "mlp.up_proj.weight", "score.weight", "lm_head.weight"],
    }
    everything = [name for group in names.values() for name in group]

    def found(layout: Layout) -> list[str]:
        return partial_over_tensor(everything, layout, GQA)

    assert found(Layout(4)) == []
    assert found(TWO) == names["row"] + names["column"]
    assert found(FOUR) == names["row"] + names["column"] + names["few heads"]
    in_parts = Layout(2, tensor=2, sequence_parallel=True)
    assert found(in_parts) == names["row"] + names["column"] + names["positions"]
    routed = Layout(2, tensor=2, expert=2, experts_over="tensor", sequence_parallel=True)
    assert found(routed) == [*names["row"], names["column"][0], *names["positions"], names["never"][0]]

"""Spans of a rank's numbers as boxes of atoms, against counting every number."""

from __future__ import annotations

import numpy as np
import pytest

from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.keys import View, columns, expert, head_triplets, split_heads, transposed, whole
from erniekit.checkpoint.pieces import Part, boxes
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.layout import Layout

VIEWS: dict[str, tuple[View, tuple[int, ...]]] = {
    "whole": (whole, (5, 3)),
    "transposed": (transposed, (4, 6)),
    "bias": (transposed, (7,)),
    "columns": (columns(2, 5), (4, 7)),
    "heads": (split_heads(transposed, 3), (4, 6)),
    "triplets": (head_triplets(1, 2), (3, 12)),
    "an expert's up": (expert(1, columns(2, 4)), (3, 5, 4)),
    "an expert's down": (expert(2, transposed), (3, 2, 4)),
    "one column": (transposed, (5, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_boxes_of_every_span_are_its_numbers_and_few(name: str) -> None:
    view, shape = VIEWS[name]
    tensor = np.arange(np.prod(shape)).reshape(shape)
    seen = view(tensor)
    strides = [step // tensor.itemsize for step in seen.strides]
    offset = int(seen.min())
    for start in range(tensor.size + 1):
        for stop in range(start, tensor.size + 1):
            taken = list(boxes(seen.shape, strides, offset=offset, span=(start, stop)))
            numbers = np.concatenate([seen[box].reshape(-1) for box in taken] or [np.empty(0, int)])
            wanted = seen[(seen >= start) & (seen < stop)]
            np.testing.assert_array_equal(np.sort(numbers), np.sort(wanted.reshape(-1)))
            assert len(taken) <= max(1, 2 * seen.ndim - 1)


def test_the_parts_of_all_ranks_are_the_whole() -> None:
    cfg = ErnieConfig.from_dict({
        "model_type": "ernie4_5_moe", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40, "moe_num_experts": 4, "moe_k": 2,
        "moe_intermediate_size": 8, "moe_layer_start_index": 1, "moe_num_shared_experts": 1, "use_bias": True,
    })  # fmt: skip
    layout = Layout(4, tensor=2, expert=2, sharding=2, stage=3)
    everything = memory_table(cfg, head_bias=True)
    tensors = {
        name: np.random.default_rng(0).integers(0, 10**6, tensor.shape) for name, tensor in everything.tensors.items()
    }
    atoms = {atom: place.view(tensors[place.tensor]) for atom, place in everything.places.items()}
    written = {atom: np.zeros(array.shape, int) for atom, array in atoms.items()}
    for rank in range(layout.world):
        table = memory_table(cfg, head_bias=True, cut=Cut.of(layout, rank))
        sizes = {name: int(np.prod(tensor.shape)) for name, tensor in table.tensors.items()}
        half = layout.coordinates(rank).shard
        part = Part(table, {
            name: (0, size // 3) if half == 0 else (size // 3, size)
            for name, size in sizes.items() if ".experts." not in name
        })  # fmt: skip
        for name in table.tensors:
            numbers = part.filled(name, atoms, np.dtype(np.int64))
            assert numbers.size == part.span(name)[1] - part.span(name)[0]
            for atom, _ in table.tensors[name].parts:
                for piece in part.pieces(atom):
                    written[atom][piece.box] = piece.seen(numbers)
    for atom, array in atoms.items():
        np.testing.assert_array_equal(written[atom], array, err_msg=atom)

"""From a quantised folder to a model that answers: codes go from the file into stores, and no weight is ever dense.

A layer of the model may be a part of a stored tensor (q of q|k|v, in the order of its heads): then it takes its outputs
of the codes. All that is not quantised is loaded as from any other folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.base.console import notice
from erniekit.checkpoint.ernie45 import Tensor, memory_table
from erniekit.checkpoint.model_io import Packed, fill_model
from erniekit.checkpoint.quantised import TRAINED
from erniekit.checkpoint.quantised_folder import QuantisedFolder, require_whole_matrices
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.models.cache import Kept
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.reward import ErnieForReward
from erniekit.parallel.part import hold_part
from erniekit.precision.encoders import ACTIVATION_SCALE
from erniekit.precision.inputs import FixedRounding, Int8Cache, int8_steps, rounding_by_rows
from erniekit.precision.packed import Rounding, Store, packed_weights, use_stores
from erniekit.precision.stored import StoredCodes, store_of


class Origin(NamedTuple):
    """Where a weight [in, out] of the model lies: a tensor of the folder, and which of its outputs (None: all)."""

    tensor: str
    columns: np.ndarray | None


Origins = Mapping[str, Sequence[Origin]]  # of the weights that are quantised: one for each expert


def build_quantised(
    folder: QuantisedFolder, cfg: ErnieConfig, *, dtype: str, cut: Cut = WHOLE
) -> ErnieForCausalLM:  # fmt: skip
    """The model of a quantised folder, to ask and not to train: nothing in it has a gradient. `cut` may share experts.

    Raises CheckpointError if a tensor is missing, extra or misshapen.
    """
    require_whole_matrices(folder, tensor=cut.layout.tensor)
    folder.check()
    for text in folder.notices:
        notice(text)
    table = memory_table(cfg, head_bias=folder.has_head_bias, cut=cut)
    found = {name: _origins(tensor, folder) for name, tensor in table.tensors.items()}
    origins = {name: own for name, own in found.items() if own}

    def store(module: str, shape: tuple[int, int, int]) -> Store | None:
        name = _weight_of(module, origins)
        encoder = folder.scheme.encoder_of(origins[name][0].tensor) if name in origins else None
        return store_of(encoder, shape, dtype=dtype) if encoder else None

    with paddle.LazyGuard():  # what is quantised never gets memory of its own
        if cfg.is_reward:
            model = ErnieForReward(cfg, dtype=dtype)
        else:
            model = ErnieForCausalLM(cfg, dtype=dtype, lm_head_bias=folder.has_head_bias)
        if cut != WHOLE:
            hold_part(model, {name: tensor.shape for name, tensor in table.tensors.items()})
    use_stores(model, store)
    for p in model.parameters():
        p.initialize()
        p.stop_gradient = True
    fill_model(model, folder, cut=cut, fill_packed=lambda name, layer: _take(layer, origins[name], folder))
    for name, layer in packed_weights(model).items():
        layer.rounding = _rounding(name, origins[name], folder)
    for number, block in enumerate(model.model.layers):
        if (scales := folder.cache_scales(number)) is not None:
            steps = [int8_steps(largest).reshape(-1, cfg.head_dim) for largest in scales]
            block.self_attn.kept = Kept(*(Int8Cache(steps_Kd, dtype=dtype) for steps_Kd in steps))
    model.eval()
    return model


def _weight_of(module: str, origins: Origins) -> str:
    """The name of a module's weight; stacked experts have the name of their module."""
    return module if module in origins else f"{module}.weight"


def _origins(tensor: Tensor, folder: QuantisedFolder) -> list[Origin]:
    """Where each weight of a tensor in memory lies; empty if it is not quantised."""
    if folder.scheme.encoder_of(folder.table.places[tensor.parts[0][0]].tensor) is None:
        return []
    *experts, _, num_out = tensor.shape
    count = experts[0] if experts else 1
    num_parts = len(tensor.parts) // count
    places = np.broadcast_to(np.arange(num_out), [*experts, 1, num_out])  # one row: every view shows its outputs
    found = []
    for first in range(0, len(tensor.parts), num_parts):
        columns, names = np.full(num_out, -1), set()
        for atom, view in tensor.parts[first : first + num_parts]:
            place = folder.table.places[atom]
            names.add(place.tensor)
            stored = np.arange(folder.shapes[place.tensor][1])[None]
            columns[view(places).reshape(-1)] = place.view(stored).reshape(-1)
        (name,) = names
        assert columns.min() >= 0, (name, columns)
        whole = np.array_equal(columns, np.arange(folder.shapes[name][1]))
        found.append(Origin(name, None if whole else columns))
    return found


def _take(layer: Packed, origins: Sequence[Origin], folder: QuantisedFolder) -> None:
    store = layer.store
    assert isinstance(store, StoredCodes), store
    for index, (tensor, columns) in enumerate(origins):
        store.take(index, folder.arrays(tensor), columns)
        folder.release_tensor(tensor)


def _rounding(name: str, origins: Sequence[Origin], folder: QuantisedFolder) -> Rounding | None:
    """What the inputs of a quantised weight go through, if the format rounds them."""
    kind = folder.scheme.kind_of(origins[0].tensor)
    if kind == "fp8_blocks":
        return rounding_by_rows(name)
    if kind in TRAINED or not folder.scheme.rounds_inputs(origins[0].tensor):  # those round by themselves
        return None
    scales_E = np.concatenate([folder.arrays(tensor)[ACTIVATION_SCALE].reshape(-1) for tensor, _ in origins])
    if kind == "w4a8":  # the largest number; of fp8 the step between codes
        return FixedRounding(int8_steps(scales_E), "int8", name=name)
    return FixedRounding(scales_E, "e4m3", name=name)

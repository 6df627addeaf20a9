"""Between adapter folders and adapters of models in memory; the other files of this room never touch paddle tensors.

save_adapter(model, path, config=..., form="peft", base=folder, dtype="float32")
folder = AdapterFolder.open(path);  add_adapters(model, folder.config, seed=0, draw=False)
load_adapter(model, folder)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from erniekit.adapters.lora import adapter_config_of, adapter_parameters
from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError, listed
from erniekit.base.files import writing
from erniekit.checkpoint.adapter import Adapter, memory_adapter
from erniekit.checkpoint.adapter_folder import AdapterFolder, mark_of
from erniekit.checkpoint.adapter_forms import Form
from erniekit.checkpoint.adapter_save import write_adapter
from erniekit.checkpoint.ernie45 import HEAD_BIAS, Table, memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import SafetensorsFile
from erniekit.checkpoint.keys import assign
from erniekit.checkpoint.model_io import HostParameters, Ranges, Writer
from erniekit.checkpoint.named import Named, Numbers, parameter_table
from erniekit.checkpoint.pieces import Part
from erniekit.checkpoint.together import SharedStage, Team
from erniekit.config.adapter import AdapterConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.models.decoder import ErnieForCausalLM

_WHOLE = "adapter.safetensors"

__all__ = ["AdapterFolder", "adapter_writer", "check_base", "load_adapter", "save_adapter"]


def save_adapter(
    model: ErnieForCausalLM, path: str | Path, *,
    config: AdapterConfig, form: Form, base: Folder, dtype: str, team: Team | None = None,
    ranges: Ranges | None = None,
) -> None:  # fmt: skip
    """Write the model's adapter (`config` says which) as a folder, with the tokenizer of `base`; see adapter_save.py.

    What began as PiSSA is written as the plain adapter of twice the rank that it is; `load_adapter` takes it apart.
    All ranks of a `team` call this, each with its part of the adapter, and of the parameters in `ranges` only these.
    """
    adapter_writer(model, config=config, form=form, base=base, dtype=dtype, ranges=ranges)(Path(path), team)


def adapter_writer(
    model: ErnieForCausalLM, *, config: AdapterConfig, form: Form, base: Folder, dtype: str,
    ranges: Ranges | None = None, copied: bool = False,
) -> Writer:  # fmt: skip
    """What saves the adapter as it is now (`copied`: into host memory), or as it is when it is called.

    Ranks first put their parts together in a file beside the result, as the model in memory has them. Rank 0 makes the
    folder from that: which form an adapter gets can depend on the numbers of all of it.
    """
    parameters = adapter_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    held = HostParameters(parameters, ranges)
    numbers: Mapping[str, np.ndarray] = held.copied(shapes) if copied else held
    table = _table(model)

    def write(path: Path, team: Team | None) -> None:
        def written(arrays: Mapping[str, np.ndarray]) -> None:
            adapter = memory_adapter(plain_config(config), _Plain(arrays), table)
            write_adapter(path, adapter, form=form, base=base, dtype=dtype)

        if team is None or team.layout.world == 1:
            written(numbers)
            return
        named = Named(model.config, shapes, team.layout, team.rank)
        mine = {
            name: Numbers(partial(numbers.__getitem__, name), "F32", span=held.spans.get(name)) for name in shapes
        }  # fmt: skip
        stage = SharedStage(team, lambda: _scratch(path))
        with stage:
            named.write(stage, _WHOLE, mine)
            if team.rank == 0:
                whole = SafetensorsFile(stage.path / _WHOLE)
                written({name: whole.read(name) for name in whole.tensors})
        stage.settle()

    return write


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A hidden folder in `path` that is gone afterwards."""
    scratch = path / ".together"
    with writing(path):
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
        try:
            scratch.mkdir(parents=True)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def plain_config(config: AdapterConfig) -> AdapterConfig:
    """The adapter without its start: PiSSA is a plain adapter of twice the rank, what was learned less the start."""
    if config.init != "pissa":
        return config
    alpha = config.alpha * (math.sqrt(2) if config.rslora else 2)
    return dataclasses.replace(config, rank=2 * config.rank, alpha=alpha, init="default")


def load_adapter(model: ErnieForCausalLM, folder: AdapterFolder, *, cut: Cut = WHOLE) -> None:
    """Put the adapter of `folder` in the place of the model's, as far as `cut` holds it. Raises CheckpointError, before
    anything is written, unless the folder holds exactly the model's adapter: the same modules, the same rank."""
    wanted = adapter_config_of(model)
    assert wanted is not None, "the model has no adapters"
    parameters, adapter = adapter_parameters(model), folder.on(model.config)
    arrays = {**dict(adapter.in_memory(_table(model))), **_whole(adapter, _table(model))}
    if wanted.init == "pissa":
        arrays = {name: part for whole, array in arrays.items() for name, part in _taken_apart(whole, array)}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    everything = parameter_table(model.config, shapes).tensors
    problems = [f"{folder.path}: '{name}' has no place in the model." for name in arrays.keys() - parameters.keys()]
    problems += [f"{folder.path}: '{name}' is missing." for name in parameters.keys() - arrays.keys()]
    problems += [
        f"{folder.path}: '{name}' is {list(arrays[name].shape)}; the model's is {list(tensor.shape)}."
        for name, tensor in everything.items()
        if name in arrays and arrays[name].shape != tensor.shape
    ]
    if not math.isclose(folder.config.scaling, plain_config(wanted).scaling, rel_tol=1e-12):
        problems.append(f"{folder.path}: its scale is {folder.config.scaling:g}; the model's is {wanted.scaling:g}.")
    if problems:
        raise CheckpointError(listed(sorted(problems)))
    part = Part(parameter_table(model.config, shapes, cut=cut))
    for name, p in parameters.items():
        atoms = {atom: view(arrays[name]) for atom, view in everything[name].parts}
        p.set_value(paddle.to_tensor(part.filled(name, atoms, np.dtype(np.float32))).astype(p.dtype))


class _Plain(Mapping[str, np.ndarray]):
    """An adapter's parameters as those of a plain one: what was learned and the start of PiSSA side by side, which is
    twice the rank."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        learned, start = self._arrays[name], name.replace(".lora_", ".initial_")
        if start == name or start not in self._arrays:
            return learned
        a = name.endswith(".lora_A")
        return np.concatenate([learned, self._arrays[start] if a else -self._arrays[start]], axis=-1 if a else -2)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _taken_apart(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What was learned and the start of PiSSA, of a factor of twice the rank."""
    if name.endswith(".lora_A"):
        learned, start = np.split(array, 2, axis=-1)
    elif name.endswith(".lora_B"):
        learned, start = np.split(array, 2, axis=-2)
        start = -start
    else:
        return [(name, array)]
    return [(name, learned), (name.replace(".lora_", ".initial_"), start)]


def _whole(adapter: Adapter, table: Table) -> dict[str, np.ndarray]:
    """The parameters in memory of the modules that were trained whole."""
    arrays = {}
    for name, tensor in table.tensors.items():
        if all(atom in adapter.whole for atom, _ in tensor.parts):
            arrays[name] = np.empty(tensor.shape, np.float32)
            for atom, view in tensor.parts:
                assign(view(arrays[name]), adapter.whole[atom]())
    return arrays


def check_base(folder: AdapterFolder, base: Folder) -> None:
    """Raise CheckpointError if the adapter does not fit the model in `base`; warn if it was made for other weights."""
    whole = folder.on(base.disk_config, mtp_layers=base.form.mtp_layers).whole
    if HEAD_BIAS in whole and not base.has_head_bias:
        raise CheckpointError(f"{folder.path}: '{HEAD_BIAS}' has no place in the model of {base.path}.")
    if folder.base_mark not in (None, mark_of(base)):
        made = f" ({folder.base_name})" if folder.base_name else ""
        warn(f"{folder.path}: was made for other weights than those of {base.path}{made}; its shapes fit them.")


def _table(model: ErnieForCausalLM) -> Table:
    return memory_table(model.config, head_bias=any(name == HEAD_BIAS for name, _ in model.named_parameters()))

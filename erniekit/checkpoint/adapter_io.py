"""Between adapter folders and adapters of models in memory; the other files of this room never touch paddle tensors.

save_adapter(model, path, config=..., form="peft", base=folder, dtype="float32")
folder = AdapterFolder.open(path);  add_adapters(model, folder.config, seed=0, draw=False)
load_adapter(model, folder)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import paddle

from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError, listed
from erniekit.checkpoint.adapter import memory_adapter
from erniekit.checkpoint.adapter_folder import AdapterFolder, mark_of
from erniekit.checkpoint.adapter_forms import Form
from erniekit.checkpoint.adapter_save import write_adapter
from erniekit.checkpoint.ernie45 import HEAD_BIAS, Table, memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import host_array
from erniekit.config.adapter import AdapterConfig
from erniekit.models.decoder import ErnieForCausalLM

__all__ = ["AdapterFolder", "check_base", "load_adapter", "save_adapter"]


class _Parameters(Mapping[str, np.ndarray]):
    """Parameters by name, each fetched when it is asked for."""

    def __init__(self, parameters: Mapping[str, paddle.Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> np.ndarray:
        return host_array(self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def save_adapter(
    model: ErnieForCausalLM, path: str | Path, *, config: AdapterConfig, form: Form, base: Folder, dtype: str
) -> None:
    """Write the model's adapter (`config` says which) as a folder, with the tokenizer of `base`; see adapter_save.py.

    With `init="pissa"` it is written as the plain adapter of twice the rank that it is.
    """
    parameters = dict(model.named_parameters())
    arrays: Mapping[str, np.ndarray] = _Parameters(parameters)
    adapter = memory_adapter(config, arrays, _table(model))
    write_adapter(path, adapter, form=form, base=base, dtype=dtype)


def load_adapter(model: ErnieForCausalLM, folder: AdapterFolder) -> None:
    """Put the adapter of `folder` in the place of the model's. Raises CheckpointError, before anything is written,
    unless the folder holds exactly the model's adapter: the same modules, the same rank."""
    parameters = dict(model.named_parameters())
    adapter, table = folder.on(model.config), _table(model)
    problems = []
    for name, array in adapter.in_memory(table):
        if name not in parameters:
            problems.append(f"{folder.path}: '{name}' has no place in the model.")
        elif array.shape != tuple(parameters[name].shape):
            problems.append(f"{folder.path}: '{name}' is {list(array.shape)}; the model's is {parameters[name].shape}.")
    if problems:
        raise CheckpointError(listed(problems))
    with paddle.no_grad():
        for name, array in adapter.in_memory(table):
            paddle.assign(paddle.to_tensor(array).astype(parameters[name].dtype), parameters[name])


def check_base(folder: AdapterFolder, base: Folder) -> None:
    """Raise CheckpointError if the adapter does not fit the model in `base`; warn if it was made for other weights."""
    folder.on(base.disk_config, mtp_layers=base.form.mtp_layers)
    if folder.base_mark not in (None, mark_of(base)):
        made = f" ({folder.base_name})" if folder.base_name else ""
        warn(f"{folder.path}: was made for other weights than those of {base.path}{made}; its shapes fit them.")


def _table(model: ErnieForCausalLM) -> Table:
    return memory_table(model.config, head_bias=any(name == HEAD_BIAS for name, _ in model.named_parameters()))

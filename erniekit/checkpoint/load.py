"""A model to answer with: a folder, with an adapter beside it or none, in full or in few bits.

Used by whoever asks a model and does not train it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import paddle

from erniekit.adapters.lora import add_adapters
from erniekit.base.errors import ConfigError
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_io import check_base, load_adapter
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.merge import Merged
from erniekit.checkpoint.model_io import build_model
from erniekit.checkpoint.quantised_folder import QuantisedFolder, open_to_answer
from erniekit.checkpoint.quantised_io import build_quantised
from erniekit.checkpoint.source import made
from erniekit.config.cut import Cut
from erniekit.config.packing import Packing
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.expert import use_expert_parallel
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tensor import use_tensor_parallel
from erniekit.parallel.whole import Wholes


def load_model(path: str | Path, dtype: str | None = None) -> ErnieForCausalLM:
    """A model for inference from a folder in either layout, or a quantised one; see `ErnieForCausalLM.forward`.

    `dtype` is "float32" or "bfloat16"; None: fp32 on a CPU (which computes in nothing else), the folder's on a GPU.
    """
    return load_for_answers(path, dtype=dtype)


def load_for_answers(
    path: str | Path, *, adapter: Path | None = None, pack: Packing | None = None, dtype: str | None = None,
    mesh: Mesh = Mesh.single(),
) -> ErnieForCausalLM:  # fmt: skip
    """The model in `path` in evaluation mode, with the adapter folder `adapter`; what `pack` names is quantised, and of
    a quantised folder everything stays so. Each rank of the `mesh` gets its part, and all of them have to be asked the
    same. `dtype` as in `load_model`.
    """
    folder = open_to_answer(path)
    require_alone(folder, adapter=adapter, pack=pack)
    dtype = dtype or _dtype(folder)
    if isinstance(folder, QuantisedFolder):
        model = build_quantised(folder, folder.config, dtype=dtype, cut=Cut.of(mesh.layout, mesh.rank))
        use_expert_parallel(model, mesh)
        return model
    opened = AdapterFolder.open(adapter) if adapter else None
    if opened:
        check_base(opened, folder)
    cfg = folder.config
    if opened and opened.config.is_reward:
        cfg = cfg.replace(is_reward=True, num_nextn_predict_layers=0)
    cut, parts = Cut.of(mesh.layout, mesh.rank), Wholes(mesh, cfg)
    model = build_model(folder, cfg, dtype=dtype, pack=pack, cut=cut, greatest=parts.greatest)
    if opened:
        add_adapters(model, opened.config, seed=0, draw=False, parts=parts)
        load_adapter(model, opened, cut=cut)
    use_tensor_parallel(model, mesh)
    use_expert_parallel(model, mesh)
    model.eval()
    return model


def require_alone(folder: Folder, *, adapter: Path | None, pack: Packing | None) -> None:
    """Raise ConfigError if an adapter, or a quantisation while it is loaded, is asked for beside a quantised folder."""
    if not isinstance(folder, QuantisedFolder):
        return
    where = f"{folder.path}: is quantised ({folder.scheme.format.name}) for inference"
    if adapter:
        raise ConfigError(
            f"{where}, and {adapter} belongs to the high-precision folder: answer with that, or merge the adapter into "
            "it (`erniekit export`) and quantise the result."
        )
    if pack:
        raise ConfigError(
            f"{where} already; leave compute_type: {pack.compute_type} out, or take the high-precision folder."
        )


def answering_bytes(folder: Folder, *, mesh: Mesh) -> int:
    """What the weights of a high-precision folder take on this rank when `load_for_answers` has made a model of it."""
    table = memory_table(folder.config, head_bias=folder.has_head_bias, cut=Cut.of(mesh.layout, mesh.rank))
    numbers = sum(math.prod(tensor.shape) for tensor in table.tensors.values())
    return numbers * (4 if _dtype(folder) == "float32" else 2)


def _dtype(folder: Folder) -> str:
    """What is computed in when nobody says."""
    return folder.config.dtype if paddle.device.is_compiled_with_cuda() else "float32"


def load_merged(source: Merged) -> ErnieForCausalLM:
    """The model of a merge as it is before it is written: in fp32, rounded nowhere."""
    model = build_model(source.base, source.base.config)
    table = memory_table(source.base.config, head_bias=source.base.has_head_bias)
    for name, p in model.named_parameters():
        if all(atom in source.base.table.atoms for atom, _ in table.tensors[name].parts):
            p.set_value(paddle.to_tensor(made(table.tensors[name], np.dtype(np.float32), source)))
    model.eval()
    return model

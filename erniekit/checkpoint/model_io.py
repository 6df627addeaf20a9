"""Between folders and models in memory: the only file of this room that touches paddle tensors.

Weights stream into the parameters' own memory and out of it, so that a model is never held twice.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

import numpy as np
import paddle
from numpy.lib.stride_tricks import as_strided
from paddle import nn

from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.ernie45 import CORRECTION_BIAS, HEAD_BIAS, Table, Tensor, memory_table
from erniekit.checkpoint.folder import Folder, plan_load
from erniekit.checkpoint.pieces import Span
from erniekit.checkpoint.save import MAX_SHARD_BYTES, save_folder
from erniekit.checkpoint.source import Held, Memory, Source, fill
from erniekit.checkpoint.together import Team, assigned
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.config.packing import Packing
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.reward import ErnieForReward
from erniekit.parallel.part import hold_part
from erniekit.precision.packed import Codes, GPUCodes, PackedExperts, PackedLinear, packed_weights, use_packed_weights
from erniekit.precision.quantize import Greatest


def host_array(tensor: paddle.Tensor) -> np.ndarray:
    """A tensor's numbers as a numpy array: its own memory on a CPU (numpy 2 may write there), a copy of a GPU's. bf16
    as fp32."""
    if tensor.dtype == paddle.bfloat16:
        tensor = tensor.astype("float32")  # numpy knows no bfloat16; the way back rounds to the same bits
    if tensor.place.is_cpu_place():
        return np.from_dlpack(tensor.detach())
    return tensor.numpy()


Ranges = Mapping[str, tuple[paddle.Tensor, Span]]  # the numbers that a rank has of its block of a parameter, and which


class HostParameters(Mapping[str, np.ndarray]):
    """Parameters by name, each fetched when it is asked for; of those in `ranges`, these numbers (`spans` of them)."""

    def __init__(self, parameters: Mapping[str, paddle.Tensor], ranges: Ranges | None = None) -> None:
        held = {name: part for name, part in (ranges or {}).items() if name in parameters}
        self._parameters = {**parameters, **{name: tensor for name, (tensor, _) in held.items()}}
        self.spans = {name: span for name, (_, span) in held.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return host_array(self._parameters[name])

    def copied(self, names: Container[str]) -> dict[str, np.ndarray]:
        """The numbers of these names as they are now; for the others an empty array stands."""
        return {name: np.array(self[name]) if name in names else np.empty(0) for name in self}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def build_model(
    folder: Folder, cfg: ErnieConfig, *, dtype: str = "float32", mtp_init: str | None = None, seed: int = 0,
    pack: Packing | None = None, cut: Cut = WHOLE, greatest: Callable[[str], Greatest | None] = lambda _module: None,
) -> ErnieForCausalLM:  # fmt: skip
    """A model of architecture `cfg` with the weights of `folder`, in `dtype` ("float32" or "bfloat16"), as far as `cut`
    holds them.

    `mtp_init="random"` draws multi-token prediction weights that the folder does not have, from `seed`; the score of
    a reward model that is made from a language model is always drawn. What `pack` names is quantised while it is read:
    an expert or a linear layer is dense at a time, never the model; `greatest` looks at inputs that others hold
    (precision/packed.py).
    Raises CheckpointError if a tensor is missing, extra or misshapen.
    """
    for text in folder.notices:
        notice(text)
    # A lazy parameter has no memory until it is initialised: what `pack` names, and what others hold, never gets any.
    lazy = pack is not None or cut != WHOLE
    with paddle.LazyGuard() if lazy else contextlib.nullcontext():
        if cfg.is_reward:
            model = ErnieForReward(cfg, dtype=dtype)
        else:
            model = ErnieForCausalLM(cfg, dtype=dtype, lm_head_bias=folder.has_head_bias)
        if cut != WHOLE:
            table = memory_table(cfg, head_bias=folder.has_head_bias, cut=cut)
            hold_part(model, {name: tensor.shape for name, tensor in table.tensors.items()})
    if pack:
        use_packed_weights(model, pack, dtype=dtype, greatest=greatest)
    for p in model.parameters() if lazy else ():
        p.initialize()
    fill_model(model, folder, mtp_init=mtp_init, seed=seed, cut=cut)
    return model


Packed = PackedLinear | PackedExperts


def fill_model(
    model: ErnieForCausalLM, folder: Folder, *, mtp_init: str | None = None, seed: int = 0, cut: Cut = WHOLE,
    fill_packed: Callable[[str, Packed], None] | None = None,
) -> None:  # fmt: skip
    """Put the weights of `folder` in the place of the model's; see `build_model`. `fill_packed` gives a packed weight,
    by its name, what the folder has for it, if that is no dense one."""
    parameters, packed, cfg = dict(model.named_parameters()), packed_weights(model), model.config
    shapes = {name: p.shape for name, p in parameters.items()} | {name: layer.shape for name, layer in packed.items()}
    table = memory_table(cfg, head_bias=HEAD_BIAS in shapes, cut=cut)
    atoms = Held(folder, table.held)
    for name, tensor in plan_load(folder, shapes, cfg=cfg, cut=cut, mtp_init=mtp_init).items():
        source = _absent(name, table, cfg, seed=seed, cut=cut) if tensor is None else tensor
        if name in packed and fill_packed:
            fill_packed(name, packed[name])
        elif name in packed:
            _fill_packed(packed[name], source, atoms, path=folder.path)
        else:
            _fill_parameter(parameters[name], source, atoms)


def fill_layer(layer: nn.Layer, prefix: str, source: Source, *, table: Table, stored: Container[str]) -> None:
    """Fill a part of a model, whose names begin with `prefix`, from atoms; what is not in `stored` stays as it is."""
    for name, p in layer.named_parameters():
        tensor = table.tensors[prefix + name]
        if all(atom in stored for atom, _ in tensor.parts):
            _fill_parameter(p, tensor, source)


def _fill_parameter(p: paddle.Tensor, source: Tensor | np.ndarray, atoms: Source) -> None:
    """From the atoms, or from an array that stands in for what is not stored."""
    in_place = p.dtype == paddle.float32 and _writable(p)
    array = host_array(p) if in_place else np.empty(p.shape, np.float32)
    if isinstance(source, Tensor):
        fill(array, source, atoms)
    else:
        array[...] = source
    if not in_place:
        p.set_value(paddle.to_tensor(array).astype(p.dtype))


def _fill_packed(layer: Packed, source: Tensor | np.ndarray, atoms: Source, *, path: Path) -> None:
    """One expert after the other goes through the same memory."""
    store = layer.store
    assert isinstance(store, (Codes, GPUCodes)), store
    count, *shape = store.shape
    weight = np.empty(shape, np.float32)
    for index in range(count):
        names = "a drawn weight"
        if isinstance(source, Tensor):
            # The stack as the views know it, with every expert in the same place.
            stack = as_strided(weight, source.shape, (0, *weight.strides)[-len(source.shape) :])
            num_parts = len(source.parts) // count
            parts = source.parts[index * num_parts : (index + 1) * num_parts]
            fill(stack, Tensor(source.shape, parts), atoms)
            names = f"{path}: {' or '.join(atom for atom, _ in parts)}"
        else:
            weight[...] = source.reshape(store.shape)[index]
        store.put(index, weight, name=names)


def _writable(p: paddle.Tensor) -> bool:
    """Whether numpy can write into the tensor's own memory; numpy 1 and GPUs cannot."""
    return p.place.is_cpu_place() and host_array(p).flags.writeable


def _absent(name: str, table: Table, cfg: ErnieConfig, *, seed: int, cut: Cut) -> np.ndarray:
    """What stands in for weights that may be absent; of a drawn one that `cut` holds a part of, that part."""
    part = table.tensors[name]
    if name.endswith(CORRECTION_BIAS):
        return np.zeros(part.shape, np.float32)
    if "norm" in name:
        return np.ones(part.shape, np.float32)
    everything = memory_table(cfg, head_bias=HEAD_BIAS in table.tensors)
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    drawn = generator.standard_normal(everything.tensors[name].shape, np.float32) * np.float32(cfg.initializer_range)
    if cut == WHOLE:
        return drawn
    array = np.empty(part.shape, np.float32)
    fill(array, part, Held(Memory(everything, {name: drawn}), table.held))
    return array


Writer = Callable[[Path, Team | None], None]  # writes a folder, together with a team


def save_model(
    model: ErnieForCausalLM, path: str | Path, layout: str = "pt", *,
    dtype: str | None = None, base: Folder | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
    team: Team | None = None, ranges: Ranges | None = None,
) -> None:  # fmt: skip
    """Save a model as a folder in "pt" or "paddle"; `dtype` None: as config.json says.

    `base`, the folder that it came from, gives tokenizer files and multi-token prediction weights that were not loaded.
    All ranks of a `team` call this, each with its part of the model, and of the parameters in `ranges` only these.
    """
    write = model_writer(model, layout, dtype=dtype, base=base, max_shard_bytes=max_shard_bytes, ranges=ranges)
    write(Path(path), team)


def model_writer(
    model: ErnieForCausalLM, layout: str, *,
    dtype: str | None = None, base: Folder | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
    ranges: Ranges | None = None, copied_for: Team | None = None,
) -> Writer:  # fmt: skip
    """What saves the model as it is when it is called; or as it is now: what this rank of `copied_for` will write is
    copied into host memory, and all its ranks call this."""
    if packed := packed_weights(model):
        raise CheckpointError(
            f"this model holds {len(packed)} weights in few bits ('{next(iter(packed))}' ...), and only models in high "
            "precision are saved. `erniekit export --quantize` writes quantised folders from those."
        )
    cfg, dtype = model.config, dtype or model.config.dtype
    numbers = HostParameters(dict(model.named_parameters()), ranges)
    arrays: Mapping[str, np.ndarray] = numbers
    if copied_for is not None:
        has_bias = HEAD_BIAS in numbers
        _, mine = assigned(
            copied_for, lambda cut: memory_table(cfg, head_bias=has_bias, cut=cut), spans=numbers.spans
        )  # fmt: skip
        arrays = numbers.copied(mine)

    def write(path: Path, team: Team | None) -> None:
        save_folder(
            path, arrays, cfg=cfg, layout=layout, dtype=dtype, base=base, max_shard_bytes=max_shard_bytes, team=team,
            spans=numbers.spans,
        )  # fmt: skip

    return write

"""Writes an adapter folder in PEFT's or in ERNIEKit's form: streamed, all or nothing, with a manifest.

PEFT's form is exact: every pair as it is, A and B transposed. ERNIEKit has one pair for q|k|v and one for gate|up:
pairs with different A's are put side by side, B becomes block-diagonal, and the rank of the whole adapter grows to that
of the widest pair (three times, where q, k and v are trained apart); the scaling is kept, so is what is computed.
Where they share one A the rank stays. Knows no paddle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError
from erniekit.base.files import write_json
from erniekit.checkpoint.adapter import EXPERTS, Adapter, Factors, alpha_of, fused, shares_a, weight_of
from erniekit.checkpoint.adapter_folder import mark_of
from erniekit.checkpoint.adapter_forms import (
    CONFIG_FILES,
    ERNIEKIT_INDEX,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Form,
    erniekit_config,
    peft_config,
)
from erniekit.checkpoint.ernie45 import EMBEDDING, HEAD, Table, is_mtp, layout_table
from erniekit.checkpoint.ernie45 import Form as ModelForm
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import BFLOAT16, Entry, index_content, write_safetensors
from erniekit.checkpoint.manifest import write_manifest
from erniekit.checkpoint.save import ADAPTER_FILE, METADATA, copy_companions, staged

_ERNIEKIT_WEIGHTS = "peft_model-00001-of-00001.safetensors"

Arrays = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]  # name -> shape and how to make the numbers


def write_adapter(path: str | Path, adapter: Adapter, *, form: Form, base: Folder, dtype: str) -> None:
    """Write `adapter`, which fits the model in `base`, into the folder `path`, its numbers in `dtype` ("float32" or
    "bfloat16"), beside the base's tokenizer."""
    mtp, cfg = base.form.mtp_layers, base.disk_config.replace(is_reward=adapter.config.is_reward)
    tables = {
        layout: layout_table(
            cfg, layout, replace(ModelForm.usual(cfg, layout, mtp_layers=mtp), head_bias=base.has_head_bias)
        )
        for layout in ("ram", "pt", "paddle")
    }
    name = str(base.path)
    if form == "peft":
        arrays, settings = _peft(adapter, tables["ram"], tables["pt"], tied=cfg.tie_word_embeddings)
        file, config = PEFT_WEIGHTS, peft_config(settings, base=name, is_reward=cfg.is_reward)
    else:
        arrays, settings = _erniekit(adapter, tables["paddle"], dtype=dtype)
        file, config = _ERNIEKIT_WEIGHTS, erniekit_config(settings, base=name)
    tag = "F32" if dtype == "float32" else "BF16" if form == "peft" else "U16"
    entries = [Entry(name, tag, shape) for name, (shape, _) in arrays.items()]
    number = np.dtype(np.float32) if dtype == "float32" else BFLOAT16

    def made(ordered: list[Entry]) -> Iterator[np.ndarray]:
        for entry in ordered:
            yield arrays[entry.name][1]().astype(number)

    with staged(path) as stage:
        metadata = METADATA["pt" if form == "peft" else "paddle"]
        digest = write_safetensors(stage / file, entries, metadata=metadata, arrays=made)
        if form == "erniekit":
            write_json(stage / ERNIEKIT_INDEX, {**index_content({file: entries}), "type": "lora"})
        copy_companions(base.path, stage)
        write_json(stage / ADAPTER_FILE, {"base_mark": mark_of(base)})
        write_json(stage / CONFIG_FILES[form], config)
        write_manifest(stage, known={file: digest})


# ---------------------------------------------------------------------- PEFT
def _peft(adapter: Adapter, ram: Table, pt: Table, *, tied: bool) -> tuple[Arrays, dict[str, Any]]:
    config, arrays = adapter.config, Arrays()
    for target in config.targets:
        atoms = [atom for atom, _ in ram.tensors[weight_of(target)].parts]
        if EXPERTS.fullmatch(target):
            arrays |= _peft_experts(adapter, target, atoms, ram)
            continue
        out, into = ram.atoms[atoms[0]].shape
        stem = f"{PEFT_PREFIX}{target}"
        shapes = {"lora_A.weight": (config.rank, into), "lora_B.weight": (out, config.rank)}
        for part, shape in {**shapes, **({"lora_magnitude_vector": (out,)} if config.dora else {})}.items():
            arrays[f"{stem}.{part}"] = shape, functools.partial(_part, adapter, atoms[0], part)
    for module in config.modules_to_save:
        for name in (name for name in pt.tensors if name.startswith(module + ".")):
            arrays[PEFT_PREFIX + name] = pt.tensors[name].shape, adapter.whole[name]
        if module.endswith(".experts"):
            notice(f"{module}: PEFT has no place for experts that are trained whole; they are in the folder.")
    if tied and EMBEDDING in adapter.whole:  # PEFT saves the head that is tied to it as well
        arrays[PEFT_PREFIX + HEAD] = pt.tensors[EMBEDDING].shape, adapter.whole[EMBEDDING]
    if any(map(is_mtp, config.targets)):
        notice("transformers has no multi-token prediction: PEFT leaves those adapters out; they are in the folder.")
    modules, parameters = _peft_targets(config.targets, ram, dora=config.dora)
    return arrays, {
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0 if parameters else config.dropout,
        "use_rslora": config.rslora, "use_dora": config.dora, "target_modules": modules,
        "target_parameters": parameters, "modules_to_save": list(config.modules_to_save),
        "ensure_weight_tying": tied and EMBEDDING in adapter.whole,
    }  # fmt: skip


def _peft_experts(adapter: Adapter, target: str, atoms: Sequence[str], ram: Table) -> Arrays:
    """Stacked experts as PEFT's nested wrappers have them: experts slowest in A and fastest in B."""
    found = EXPERTS.fullmatch(target)
    assert found
    experts, rank = ram.tensors[target].shape[0], adapter.config.rank
    size, into = len(atoms) // experts, ram.atoms[atoms[0]].shape[1]
    widths = [ram.atoms[atom].shape[0] for atom in atoms[:size]]
    both = f"{found['head']}.gate_up_proj" in adapter.config.targets
    inner = ".base_layer" if both and found["part"] == "gate_up" and _down(target) in adapter.config.targets else ""

    def stack() -> list[Factors]:
        pairs = list(zip(widths * experts, map(adapter.factors, atoms), strict=True))
        per_expert = [fused(pairs[size * e : size * (e + 1)]) for e in range(experts)]
        return [pair.widened(rank, adapter.config.scaling) for pair in per_expert]

    stem = f"{PEFT_PREFIX}{found['head']}{inner}"
    return {
        f"{stem}.lora_A.weight": (
            (experts * rank, into), lambda: np.concatenate([pair.rank_in for pair in stack()]),
        ),
        f"{stem}.lora_B.weight": (
            (sum(widths), rank * experts),
            lambda: np.stack([pair.out_rank for pair in stack()], axis=-1).reshape(sum(widths), -1),
        ),
    }  # fmt: skip


def _down(target: str) -> str:
    return target.removesuffix("gate_up_proj") + "down_proj"


def _peft_targets(targets: Sequence[str], ram: Table, *, dora: bool) -> tuple[list[str], list[str]]:
    """target_modules and target_parameters, short where every module of that name is meant.

    In a model with experts PEFT takes target_modules that end in gate_proj, up_proj or down_proj for those of the
    routed experts, and drops the dense and shared ones. As parameters ("mlp.gate_proj.weight") it finds them, and the
    tensors' names are the same; that way has no DoRA.
    """
    mixture = any(EXPERTS.fullmatch(name) for name in ram.tensors)
    modules, parameters = [], []
    for target in targets:
        if EXPERTS.fullmatch(target):
            parameters.append(target)
        elif mixture and ".mlp." in target and not dora:
            parameters.append(f"{target}.weight")
        else:
            modules.append(target)
    everything = [name.removesuffix(".weight") for name in ram.tensors]
    return _shortened(modules, everything), _shortened(parameters, list(ram.tensors))


def _shortened(paths: Sequence[str], everything: Sequence[str]) -> list[str]:
    """The ends of paths that pick exactly these paths among all."""
    wanted, short = set(paths), dict[str, None]()
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[next(
            end for end in ends
            if all(name in wanted for name in everything if name == end or name.endswith(f".{end}"))
        )] = None  # fmt: skip
    return list(short)


# ---------------------------------------------------------------------- ERNIEKit
def _erniekit(adapter: Adapter, table: Table, *, dtype: str) -> tuple[Arrays, dict[str, Any]]:
    config = adapter.config
    if config.dora:
        raise CheckpointError("ERNIEKit knows no DoRA: write the adapter in PEFT's form, or merge it into the model.")
    adapted = {
        name.removesuffix(".weight"): tensor for name, tensor in table.tensors.items()
        if any(atom in adapter.low_rank for atom, _ in tensor.parts)
    }  # fmt: skip
    ranks = []
    for tensor in adapted.values():
        present = [pair for atom, _ in tensor.parts if (pair := adapter.factors(atom)) is not None]
        ranks.append(present[0].rank if shares_a(present) else sum(pair.rank for pair in present))
    rank = max(ranks, default=config.rank)
    rslora = config.rslora and rank == config.rank
    arrays = Arrays()
    for module, tensor in adapted.items():
        into, out = tensor.shape
        for which, (part, shape) in enumerate({"lora_A": (into, rank), "lora_B": (rank, out)}.items()):
            arrays[f"{module}.{part}"] = shape, functools.partial(_paddle_pair, adapter, table, module, rank, which)
    whole = _paddle_whole(adapter, table)
    ends = {module: module.rpartition(".")[2] for module in adapted}
    linear = [name.removesuffix(".weight") for name in table.tensors if name.endswith("_proj.weight")]
    wide = [
        end for end in sorted(set(ends.values()))
        if end.endswith("_proj") and all(module in adapted for module in linear if module.endswith(end))
    ]  # fmt: skip
    named = [module.replace(".", r"\.") for module, end in ends.items() if end not in wide]
    alpha = config.alpha if rank == config.rank else alpha_of(config.scaling, rank, rslora=rslora)
    return arrays | whole, {
        "r": rank, "lora_alpha": alpha, "rslora": rslora, "scaling": config.scaling, "lora_dropout": config.dropout,
        "dtype": dtype, "target_modules": [f".*{end}.*" for end in wide] + named,
        "trainable_modules": [name.replace(".", r"\.") for name in whole] or None,
    }  # fmt: skip


def _paddle_pair(adapter: Adapter, table: Table, module: str, rank: int, which: int) -> np.ndarray:
    """A [in, rank] (0) or B [rank, out] (1) of a module whose out axis holds the atoms as the layout has them."""
    tensor = table.tensors[f"{module}.weight"]
    parts = [(table.atoms[atom].shape[0], adapter.factors(atom)) for atom, _ in tensor.parts]
    pair = fused(parts).widened(rank, adapter.config.scaling)
    if which == 0:
        return pair.rank_in.T
    b_rank_out = np.zeros((rank, tensor.shape[1]), np.float32)
    row = 0
    for (width, _), (_, view) in zip(parts, tensor.parts, strict=True):
        seen = view(b_rank_out)
        seen[...] = pair.out_rank[row : row + width].reshape(seen.shape)
        row += width
    return b_rank_out


def _paddle_whole(adapter: Adapter, table: Table) -> Arrays:
    """The parameters of modules that were trained whole."""
    arrays = Arrays()
    for name, tensor in table.tensors.items():
        held = [atom in adapter.whole for atom, _ in tensor.parts]
        if any(held) and not all(held):
            raise CheckpointError(f"'{name}' is one parameter in ERNIEKit's form, and only a part of it was trained.")
        if all(held):
            arrays[name] = tensor.shape, functools.partial(_filled, adapter, tensor.shape, tensor.parts)
    return arrays


def _filled(adapter: Adapter, shape: tuple[int, ...], parts: Sequence[tuple[str, Callable]]) -> np.ndarray:
    array = np.empty(shape, np.float32)
    for atom, view in parts:
        seen = view(array)
        seen[...] = adapter.whole[atom]().reshape(seen.shape)
    return array


def _part(adapter: Adapter, atom: str, part: str) -> np.ndarray:
    """A, B or the magnitude of an atom, in the adapter's rank and scaling."""
    found = adapter.factors(atom)
    assert found is not None, atom
    wide = found.widened(adapter.config.rank, adapter.config.scaling)
    array = {"lora_A.weight": wide.rank_in, "lora_B.weight": wide.out_rank}.get(part, wide.magnitude)
    assert array is not None, atom
    return array

"""An adapter folder on disk, PEFT's or ERNIEKit's: opened lazily, judged strictly, nothing in it executed.

Ranks and scalings that differ between modules become one of each, exactly: a smaller rank is filled up with zeros, a
factor moves into B. Knows no paddle.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError, listed
from erniekit.checkpoint.adapter import EXPERTS, Adapter, Factors, alpha_of, fused, target_of
from erniekit.checkpoint.adapter_forms import (
    CONFIG_FILES,
    ERNIEKIT_INDEX,
    ERNIEKIT_PICKLE,
    PEFT_WEIGHTS,
    Form,
    read_settings,
    sort_names,
)
from erniekit.checkpoint.ernie45 import EMBEDDING, HEAD, HEAD_BIAS, SCORE, Table, layout_table
from erniekit.checkpoint.ernie45 import Form as ModelForm
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import BFLOAT16, SafetensorsFile
from erniekit.checkpoint.pdparams import read_pdparams
from erniekit.checkpoint.save import ADAPTER_FILE
from erniekit.config.adapter import AdapterConfig
from erniekit.config.architecture import ErnieConfig

_FORMATS = ("F32", "BF16", "U16", "F16")
_SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}
_EXPERT = re.compile(r"\.experts\.\d+\..*")  # a part of the one module that the experts of a layer are
_SAMPLE = 64


def mark_of(base: Folder) -> str:
    """A short mark of a model's weights, the same in either layout: sha256 over the ends of every atom."""
    digest = hashlib.sha256()
    for atom in sorted(base.table.atoms):
        seen = base.read(atom)
        row, last = seen.reshape(-1) if seen.ndim == 1 else seen[(0,) * (seen.ndim - 1)], seen[(-1,) * (seen.ndim - 1)]
        digest.update(f"{atom}{base.table.atoms[atom].shape}".encode())
        for piece in (row[:_SAMPLE], last[-_SAMPLE:]):
            digest.update(np.ascontiguousarray(piece, np.float32).tobytes())
    return digest.hexdigest()


class AdapterFolder:
    """An opened adapter folder. `base_name` and `base_mark` say which model it was made for, as far as it says so."""

    def __init__(self, path: Path, form: Form, values: Any, tensors: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self.path, self.form, self._tensors = path, form, tensors
        self.settings = read_settings(form, values, str(path / CONFIG_FILES[form]))
        self.names = sort_names(form, list(tensors), self.settings)
        self._head_copy = self.names.whole.pop(HEAD, None) if self.settings.tied else None
        self.base_name, self.base_mark = self.settings.base_name, _mark_beside(path)
        self._require_sense()

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Open an adapter folder. Raises CheckpointError if it is absent, damaged, or asks for what we cannot do."""
        folder = Path(path)
        forms = [form for form, name in CONFIG_FILES.items() if (folder / name).is_file()]
        if len(forms) != 1:
            raise CheckpointError(_not_an_adapter(folder, len(forms)))
        form = forms[0]
        config = folder / CONFIG_FILES[form]
        try:
            values = json.loads(config.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{config}: is not valid JSON ({error}).") from error
        return cls(folder, form, values, _peft_tensors(folder) if form == "peft" else _erniekit_tensors(folder))

    # ------------------------------------------------------------------ what it is
    @functools.cached_property
    def config(self) -> AdapterConfig:
        """The adapter as a model in memory would hold it: one rank and one scaling."""
        settings, widths = self.settings, dict[str, int]()
        per_expert: dict[str, list[str]] = {}
        for module, parts in self.names.parts.items():
            for part in self._split(module):
                target = target_of(part)
                per_expert.setdefault(target, []).append(module)
                widths[target] = max(widths.get(target, 0), self._rank(module, parts))
        for target, modules in per_expert.items():
            if self.form == "peft" and target.endswith(".experts.gate_up_proj") and len(modules) > 1:
                widths[target] = self._gate_up_rank(modules)
        rank, scaling = max(widths.values()), settings.scaling_of("")
        scalings = {settings.scaling_of(module) for module in self.names.parts}
        if scaling not in scalings:
            scaling = min(scalings)
        alpha = settings.alpha
        if rank != settings.rank or scaling != settings.scaling_of(""):
            alpha = alpha_of(scaling, rank, rslora=settings.rslora)
        owners = dict.fromkeys(_EXPERT.sub(".experts", name.rpartition(".")[0]) for name in self.names.whole)
        return AdapterConfig(
            rank=rank, alpha=alpha, dropout=settings.dropout, rslora=settings.rslora, dora=settings.dora,
            targets=tuple(sorted(widths, key=_natural)), modules_to_save=tuple(owners),
        )  # fmt: skip

    @functools.cached_property
    def dtype(self) -> str:
        """The format of its numbers: "bfloat16" if all have it, else "float32"."""
        return "bfloat16" if all(read().dtype == BFLOAT16 for read in self._tensors.values()) else "float32"

    def on(self, cfg: ErnieConfig, *, mtp_layers: int | None = None) -> Adapter:
        """The adapter on a model of architecture `cfg`, of which it may make a reward model. Raises CheckpointError
        naming everything that does not fit."""
        cfg = cfg.replace(is_reward=cfg.is_reward or SCORE in self.names.whole)
        mtp = cfg.num_nextn_predict_layers if mtp_layers is None else mtp_layers
        layout = "pt" if self.form == "peft" else "paddle"
        form = replace(ModelForm.usual(cfg, layout, mtp_layers=mtp), head_bias=HEAD_BIAS in self.names.whole)
        table = layout_table(cfg, layout, form)
        low_rank, problems = self._fitted(table)
        whole = {}
        problems += self._tied_problems(cfg)
        for name, tensor in self.names.whole.items():
            stored = tensor if self.form == "erniekit" else name
            if stored not in table.tensors:
                problems.append(f"{self._where(tensor)} is of no module of this model.")
                continue
            problems += self._misshapen(tensor, table.tensors[stored].shape)
            for atom, view in table.tensors[stored].parts:
                shape = table.atoms[atom].shape
                whole[atom] = lambda tensor=tensor, view=view, shape=shape: view(self._read(tensor)).reshape(shape)
        if problems:
            name = self.base_name or "another model"
            raise CheckpointError(
                [f"{self.path}: this adapter was made for {name}; it does not fit:", *listed(problems)]
            )
        return Adapter(self.config, str(self.path), low_rank, whole)

    # ------------------------------------------------------------------ judging
    def require_finite(self) -> None:
        """Raise CheckpointError naming every tensor that holds NaN or infinity."""
        wrong = [name for name in self._tensors if not np.isfinite(self._read(name)).all()]
        if wrong:
            raise CheckpointError(listed(f"{self._where(name)} holds NaN or infinite numbers." for name in wrong))

    def _require_sense(self) -> None:
        """Raise CheckpointError for tensors that are not understood, missing halves and ranks that contradict."""
        problems = [
            f"{self._where(name)} is not understood; lora_A, lora_B, magnitudes and whole weights of modules are read."
            for name in self.names.strange
        ]
        for module, parts in self.names.parts.items():
            wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if self.settings.dora else set())
            problems += [f"{self.path}: '{module}' lacks its {part}." for part in sorted(wanted - parts.keys())]
            problems += [f"{self._where(parts[part])}: use_dora is off." for part in sorted(parts.keys() - wanted)]
            if module.endswith(".experts.?"):
                problems.append(
                    f"{self.path}: target_parameters does not say which parameter of '{module[:-2]}' it is."
                )
            if self.settings.dora and ".experts." in module:
                problems.append(f"{self.path}: DoRA on routed experts ('{module}') cannot be represented here.")
        if not self.names.parts and not problems:
            problems.append(f"{self.path}: holds no adapter tensor.")
        if problems:
            raise CheckpointError(listed(problems))

    def _tied_problems(self, cfg: ErnieConfig) -> list[str]:
        """What is wrong with an embedding that was trained whole and, where it is the head too, with its copy."""
        embedding = self.names.whole.get(EMBEDDING)
        if self._head_copy and not (
            embedding and cfg.tie_word_embeddings and np.array_equal(self._read(self._head_copy), self._read(embedding))
        ):
            return [f"{self._where(self._head_copy)}: ensure_weight_tying is on, and it is no copy of the embedding."]
        if self.form == "peft" and embedding and cfg.tie_word_embeddings and not self._head_copy:
            warn(
                f"{self.path}: holds a trained embedding, which is the head here, too; PEFT went on with the old head."
            )
        return []

    def _fitted(self, table: Table) -> tuple[dict[str, Callable[[], Factors]], list[str]]:
        """How to read the factors of every adapted atom, and what does not fit."""
        found: dict[str, Callable[[], Factors]] = {}
        problems = []
        for module, parts in self.names.parts.items():
            if EXPERTS.fullmatch(module):
                problems += self._stacked(module, parts, table, found)
                continue
            stored = f"{module}.weight" if self.form == "peft" else f"ernie.{module.removeprefix('model.')}.weight"
            if stored not in table.tensors or len(table.tensors[stored].shape) != 2 or "_proj" not in module:
                problems.append(f"{self._where(parts['lora_A'])} adapts no linear layer of this model.")
                continue
            tensor, rank = table.tensors[stored], self.settings.rank_of(module)
            out, into = tensor.shape if self.form == "peft" else tensor.shape[::-1]
            shapes = {"lora_A": (rank, into), "lora_B": (out, rank), "lora_magnitude_vector": (out,)}
            for part, name in parts.items():
                wanted = shapes[part]
                problems += self._misshapen(name, wanted if self.form == "peft" else wanted[::-1])
            for atom, view in tensor.parts:
                found[atom] = functools.partial(self._factors, module, parts, view, table.atoms[atom].shape[0])
        return found, problems

    def _stacked(
        self, module: str, parts: Mapping[str, str], table: Table, found: dict[str, Callable[[], Factors]]
    ) -> list[str]:
        """The experts of a layer as PEFT's target_parameters store them."""
        head, _, kind = module.rpartition(".")
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        pattern = re.compile(re.escape(head) + rf"\.(\d+)\.{names[0]}\.weight")
        experts = sum(pattern.fullmatch(atom) is not None for atom in table.atoms)
        if not experts:
            return [f"{self._where(parts['lora_A'])}: this model has no experts there."]
        width, into = table.atoms[f"{head}.0.{names[0]}.weight"].shape
        rank = self.settings.rank_of(module)
        problems = self._misshapen(parts["lora_A"], (experts * rank, into))
        problems += self._misshapen(parts["lora_B"], (width * len(names), rank * experts))
        for expert in range(experts):
            for i, name in enumerate(names):
                rows = slice(i * width, (i + 1) * width)
                found[f"{head}.{expert}.{name}.weight"] = functools.partial(
                    self._expert_factors, module, parts, expert, rows
                )
        return problems

    def _misshapen(self, name: str, wanted: tuple[int, ...]) -> list[str]:
        shape = self._tensors[name]().shape
        return [] if shape == wanted else [f"{self._where(name)} has shape {list(shape)}; {list(wanted)} is needed."]

    def _where(self, name: str) -> str:
        return f"{self.path}: tensor '{name}'"

    # ------------------------------------------------------------------ reading
    def _read(self, name: str) -> np.ndarray:
        return self._tensors[name]().astype(np.float32)

    def _factors(self, module: str, parts: Mapping[str, str], view: Callable[..., np.ndarray], width: int) -> Factors:
        rank_in, out_rank = self._read(parts["lora_A"]), self._read(parts["lora_B"])
        magnitude = self._read(parts["lora_magnitude_vector"]) if self.settings.dora else None
        if self.form == "erniekit":
            rank_in = rank_in.T
        return Factors(rank_in, view(out_rank).reshape(width, -1), self.settings.scaling_of(module), magnitude)

    def _expert_factors(self, module: str, parts: Mapping[str, str], expert: int, rows: slice) -> Factors:
        rank = self.settings.rank_of(module)
        rank_in = self._tensors[parts["lora_A"]]()[expert * rank : (expert + 1) * rank].astype(np.float32)
        stacked = self._tensors[parts["lora_B"]]()
        out_rank = stacked.reshape(len(stacked), rank, -1)[rows, :, expert].astype(np.float32)
        return Factors(rank_in, out_rank, self.settings.scaling_of(module))

    def _rank(self, module: str, parts: Mapping[str, str]) -> int:
        """The rank at a module as its tensors say; the stacked ones leave it to the config."""
        rank, shape = self.settings.rank_of(module), self._tensors[parts["lora_A"]]().shape
        stored = rank if EXPERTS.fullmatch(module) else shape[0 if self.form == "peft" else -1] if shape else 0
        if stored != rank:
            raise CheckpointError(
                f"{self._where(parts['lora_A'])} has rank {stored}; {CONFIG_FILES[self.form]} says {rank}."
            )
        return rank

    def _gate_up_rank(self, modules: list[str]) -> int:
        """The rank of gate and up together, where every expert has a pair of its own for each."""
        experts: dict[str, list[tuple[int, Factors | None]]] = {}
        for module in modules:
            parts = self.names.parts[module]
            factors = self._factors(module, parts, lambda array: array, self._tensors[parts["lora_B"]]().shape[0])
            experts.setdefault(module.rpartition(".")[0], []).append((len(factors.out_rank), factors))
        return max(fused(pairs).rank for pairs in experts.values())

    def _split(self, module: str) -> list[str]:
        """The modules in -PT that a fused one stands for."""
        head, _, last = module.rpartition(".")
        return [f"{head}.{part}" for part in _SPLIT.get(last, (last,))] if self.form == "erniekit" else [module]


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _mark_beside(folder: Path) -> str | None:
    path = folder / ADAPTER_FILE
    try:
        return str(json.loads(path.read_bytes())["base_mark"]) if path.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not understood ({error}). Remove it to go on without it.") from error


def _peft_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        other = "adapter_model.bin" if (folder / "adapter_model.bin").is_file() else None
        found = f"; {other} is a pickle, which could execute code: save it as safetensors" if other else ""
        raise CheckpointError(f"{path}: missing{found}.")
    return _tensors_of([path])


def _erniekit_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    if (folder / ERNIEKIT_PICKLE).is_file():
        arrays = read_pdparams(folder / ERNIEKIT_PICKLE)
        return {name: functools.partial(_as_number, array) for name, array in arrays.items()}
    shards = sorted(folder.glob("lora_model_state.*.pdparams"))
    if shards:
        raise CheckpointError(
            f"{folder}: holds {len(shards)} shards of a tensor-parallel run ({shards[0].name} ...). Merge them with "
            "the tool that wrote them (merge_tensor_parallel)."
        )
    files = sorted(folder.glob("peft_model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds neither {ERNIEKIT_PICKLE} nor peft_model*.safetensors.")
    tensors = _tensors_of(files)
    index = folder / ERNIEKIT_INDEX
    if index.is_file():
        try:
            wanted = {str(name) for name in json.loads(index.read_bytes())["weight_map"]}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: is not an index ({error}).") from error
        if missing := sorted(wanted - tensors.keys()):
            raise CheckpointError(
                listed(f"{folder}: tensor '{name}' is in {index.name} and missing." for name in missing)
            )
    return tensors


def _tensors_of(files: list[Path]) -> dict[str, Callable[[], np.ndarray]]:
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for file in map(SafetensorsFile, files):
        for name, stored in file.tensors.items():
            if stored.tag not in _FORMATS:
                raise CheckpointError(
                    f"{file.path}: tensor '{name}' has format {stored.tag}; {', '.join(_FORMATS)} are read."
                )
            tensors[name] = functools.partial(_read_number, file, name)
    return tensors


def _read_number(file: SafetensorsFile, name: str) -> np.ndarray:
    return _as_number(file.read(name))


def _as_number(array: np.ndarray) -> np.ndarray:
    """bfloat16 that is stored as its bits, as numbers."""
    return array.view(BFLOAT16) if array.dtype == np.uint16 else array


def _not_an_adapter(folder: Path, num_forms: int) -> str:
    names = " nor ".join(CONFIG_FILES.values())
    if num_forms:
        return f"{folder}: holds both {' and '.join(CONFIG_FILES.values())}; which adapter is meant? Remove one."
    if not folder.is_dir():
        return f"{folder}: no such adapter folder."
    whole = " It holds a whole model: give it as model_name_or_path." if (folder / "config.json").is_file() else ""
    return f"{folder}: holds no adapter (neither {names}).{whole}"

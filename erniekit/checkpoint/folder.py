"""A model folder on disk, in any layout we read: opened lazily, judged strictly.

A missing, extra or misshapen tensor is an error, never a random initialisation. The few exceptions are told as notices.
Refuses to know paddle, devices and ranks: it fills arrays that the caller owns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.errors import CheckpointError, listed
from erniekit.base.files import nearest_sibling
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.ernie45 import (
    CORRECTION_BIAS,
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    SCORE,
    Form,
    Tensor,
    is_mtp,
    layout_of,
    layout_table,
    memory_table,
)
from erniekit.checkpoint.hf_files import BFLOAT16, INDEX_FILE, SINGLE_FILE, SafetensorsFile, open_shards, weight_files
from erniekit.checkpoint.pdparams import read_pdparams
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut
from erniekit.config.hubs import download_command, is_repository

WEIGHT_FORMATS = {"BF16": "bfloat16", "U16": "bfloat16", "F32": "float32"}  # U16: Paddle's name for bfloat16 bits
_CODES = ("U8", "I8")
_COMPARED_ROWS = 4096
_Opened = SafetensorsFile | dict[str, np.ndarray]


class Folder:
    """An opened model folder. `config` is what its tensors and config.json say together, `layout` is told by names."""

    def __init__(self, path: Path, config_json: bytes, files: Mapping[str, _Opened]) -> None:
        self.path, self.config_json, self._files = path, config_json, files
        self.file_of = {name: file for file, opened in files.items() for name in _names(opened)}
        coded = [name for name in self.file_of if self.tag(name) in _CODES]
        if coded:
            raise CheckpointError(_quantised(path, f"'{coded[0]}' has format {self.tag(coded[0])}"))
        self.layout = layout_of(self.file_of, str(path))
        self.shapes = {name: self._shape(name) for name in self.file_of}
        self.disk_config = self._disk_config()
        self.form = Form.found(self.disk_config, self.layout, self.shapes)
        self.table = layout_table(self.disk_config, self.layout, self.form)
        self.config, self.notices = self._judge()

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Open a folder. Raises CheckpointError if it is absent, damaged, not ERNIE 4.5, or in another layout."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(_absent(str(path)))
        if is_adapter(folder) and not weight_files(folder):
            raise CheckpointError(
                f"{path}: holds an adapter, not a model. Name its base as model_name_or_path and this folder as "
                "lora_path (with fine_tuning: LoRA), or merge the two with `erniekit export`."
            )
        config_path = folder / "config.json"
        ErnieConfig.from_folder(folder)  # its errors come before those of the weights
        method = json.loads(config_path.read_bytes()).get("quantization_config")
        if method:
            raise CheckpointError(_quantised(folder, f"config.json has quantization_config: {json.dumps(method)[:80]}"))
        files: dict[str, Any] = dict(open_shards(folder))
        if not files:
            pickled = _pdparams_file(folder)
            files = {pickled.name: read_pdparams(pickled)}
        return cls(folder, config_path.read_bytes(), files)

    # ------------------------------------------------------------------ reading
    @property
    def names(self) -> list[str]:
        """The names of the stored tensors."""
        return list(self.file_of)

    @property
    def has_mtp(self) -> bool:
        """Whether multi-token prediction weights are stored."""
        return self.form.mtp_layers > 0

    @property
    def has_head_bias(self) -> bool:
        """Whether lm_head.bias is stored; config.json does not say."""
        return self.form.head_bias

    def tag(self, name: str) -> str:
        """The format of a stored tensor: "BF16", "U16" (also bfloat16) or "F32"."""
        opened = self._files[self.file_of[name]]
        if isinstance(opened, SafetensorsFile):
            return opened.tensors[name].tag
        return "U16" if opened[name].dtype == np.uint16 else "F32"

    def metadata(self, file: str) -> dict[str, str]:
        """The free-form metadata of a weight file."""
        opened = self._files[file]
        return opened.metadata if isinstance(opened, SafetensorsFile) else {}

    def read_tensor(self, name: str) -> np.ndarray:
        """A stored tensor, read-only; bfloat16 whatever its tag says."""
        opened = self._files[self.file_of[name]]
        array = opened.read(name) if isinstance(opened, SafetensorsFile) else opened[name]
        return array.view(BFLOAT16) if array.dtype == np.uint16 else array

    def read(self, atom: str) -> np.ndarray:
        """An atom as its view shows it (q, k, v as [heads, head_dim, in]); a read-only view of the file."""
        place = self.table.places[atom]
        return place.view(self.read_tensor(place.tensor))

    def read_atom(self, atom: str) -> np.ndarray:
        """An atom as [out, in]; a view of the file wherever numpy can."""
        return self.read(atom).reshape(self.table.atoms[atom].shape)

    def release(self, atom: str) -> None:
        """Let the system drop the atom's pages."""
        self.release_tensor(self.table.places[atom].tensor)

    def release_tensor(self, name: str) -> None:
        """Let the system drop a tensor's pages."""
        opened = self._files[self.file_of[name]]
        if isinstance(opened, SafetensorsFile):
            opened.release(name)

    # ------------------------------------------------------------------ judging
    def check(self) -> None:
        """Raise CheckpointError listing every missing, extra, misshapen or unreadable tensor."""
        expected = self.table.tensors
        problems = []
        for name, tensor in expected.items():
            if name not in self.shapes:
                problems.append(f"{self._where()}: tensor '{name}' {list(tensor.shape)} is missing.{self._hint(name)}")
            elif self.shapes[name] != tensor.shape:
                problems.append(
                    f"{self._where(name)}: tensor '{name}' has shape {list(self.shapes[name])}; config.json asks for "
                    f"{list(tensor.shape)}."
                )
            elif self.tag(name) not in WEIGHT_FORMATS:
                known = ", ".join(WEIGHT_FORMATS)
                problems.append(f"{self._where(name)}: tensor '{name}' has format {self.tag(name)}; {known} are read.")
        problems += [
            f"{self._where(name)}: tensor '{name}' {list(self.shapes[name])} does not belong to this config.json."
            for name in self.shapes
            if name not in expected
        ]
        if not problems and self.form.head_copy:
            problems += self._tied_problems()
        if problems:
            raise CheckpointError(listed(problems))

    def _where(self, name: str | None = None) -> str:
        return str(self.path if name is None else self.path / self.file_of[name])

    def _hint(self, name: str) -> str:
        if name == HEAD:
            return " If the model uses its embedding as the head, set tie_word_embeddings to true in config.json."
        return ""

    def _tied_problems(self) -> list[str]:
        view = next(view for atom, view in self.table.tensors[HEAD].parts if atom == EMBEDDING)
        head, embedding = view(self.read_tensor(HEAD)), self.read(EMBEDDING)
        for start in range(0, len(head), _COMPARED_ROWS):
            rows = slice(start, start + _COMPARED_ROWS)
            differs = (head[rows] != embedding[rows]).any(axis=1)
            if differs.any():
                return [
                    f"{self._where(HEAD)}: tie_word_embeddings is true in config.json, but '{HEAD}' differs from the "
                    f"embedding (first in row {start + int(differs.argmax())}). Set tie_word_embeddings to false to "
                    f"use this head, or remove '{HEAD}' from the folder."
                ]
        return []

    def _judge(self) -> tuple[ErnieConfig, list[str]]:
        """The effective config, and one notice for each exception that was made."""
        cfg, form, notices = self.disk_config, self.form, []
        wanted, stored = cfg.num_nextn_predict_layers, form.mtp_layers
        if wanted > stored:
            notices.append(
                f"{self.path}: config.json asks for num_nextn_predict_layers {wanted}, and weights for {stored} are "
                f"stored; {stored or 'none'} will be used."
            )
            cfg = cfg.replace(num_nextn_predict_layers=stored)
        elif stored > wanted:
            notices.append(
                f"{self.path}: holds {stored} multi-token prediction block(s) that num_nextn_predict_layers {wanted} "
                "does not use; they are carried through to saved and converted folders."
            )
        if not form.correction_bias:
            notices.append(f"{self.path}: no '{CORRECTION_BIAS}' is stored; zeros are used.")
        return cfg, notices

    def _disk_config(self) -> ErnieConfig:
        values = json.loads(self.config_json)
        cfg = ErnieConfig.from_dict(values, source=str(self.path / "config.json"))
        embedding = "ernie.embed_tokens.weight" if self.layout == "paddle" else EMBEDDING
        if not (values.get("dtype") or values.get("torch_dtype")) and embedding in self.file_of:
            cfg = cfg.replace(dtype=WEIGHT_FORMATS.get(self.tag(embedding), cfg.dtype))
        return cfg

    def _shape(self, name: str) -> tuple[int, ...]:
        opened = self._files[self.file_of[name]]
        return opened.tensors[name].shape if isinstance(opened, SafetensorsFile) else opened[name].shape


def _names(opened: _Opened) -> Iterable[str]:
    return opened.tensors if isinstance(opened, SafetensorsFile) else opened


def _pdparams_file(folder: Path) -> Path:
    """The one .pdparams file with a whole model (adapters are something else)."""
    found = sorted(path for path in folder.glob("*.pdparams") if not path.name.startswith("lora_"))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds several .pdparams files ({', '.join(listed([path.name for path in found], limit=3))}); "
            "one whole model is read. Merge tensor-parallel shards with the tool that wrote them."
        )
    if not found:
        raise CheckpointError(
            f"{folder}: holds no weights ({SINGLE_FILE}, {INDEX_FILE} with its shards, or a .pdparams file)."
        )
    return found[0]


def _quantised(path: Path, because: str) -> str:
    return (
        f"{path}: is a quantised model ({because}), made for inference: its weights can neither be trained nor "
        "converted nor quantised again. Take the folder that it was made from; compute_type: wint8, wint4/8, wint4 or "
        "nf4 quantises that while it is loaded, to train adapters on it (fine_tuning: LoRA), to evaluate it or to chat."
    )


def _absent(path: str) -> str:
    """The message for a model folder that is not there."""
    if Path(path).exists():
        return f"{path}: is a file; a model is a folder with config.json and weights."
    name = Path(path).name
    known, near = name.upper().startswith("ERNIE-4.5"), nearest_sibling(path)
    if not (known or is_repository(path)):
        return f"{path}: no such model folder.{near}"
    command = download_command(None, path if is_repository(path) else f"baidu/{name}", path)
    words = "Download it" if known else "If it is a Hugging Face id, download it"
    return f"{path}: no such model folder.{near} {words} with\n    {command}\n(`pip install huggingface_hub`)."


def plan_load(
    folder: Folder, shapes: Mapping[str, Sequence[int]], *, cfg: ErnieConfig, cut: Cut = WHOLE,
    mtp_init: str | None = None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """What fills each weight of a model in memory (`shapes`: all of them by name, as far as `cut` holds them): a tensor
    of the folder's atoms, or None for what is not stored.

    Raises CheckpointError unless every weight is stored and everything stored is used. Multi-token prediction weights
    may be unused, and with `mtp_init="random"` they may be absent. A correction bias may be absent: it is zeros. A
    reward model may be filled from a language model: the head is unused then, and the score absent.
    """
    folder.check()
    everything = memory_table(cfg, head_bias=HEAD_BIAS in shapes)
    table = everything if cut == WHOLE else memory_table(cfg, head_bias=HEAD_BIAS in shapes, cut=cut)
    given = {name: tuple(shape) for name, shape in shapes.items()}
    assert given == {name: tensor.shape for name, tensor in table.tensors.items()}, (
        "the model does not match its config"
    )

    stored = folder.table.atoms
    problems, absent, predicting = [], set(), []
    for atom in everything.atoms.keys() - stored.keys():
        absent.add(everything.places[atom].tensor)
        if atom.endswith(CORRECTION_BIAS) and not folder.form.correction_bias:
            continue
        if atom == SCORE and not folder.config.is_reward:
            continue
        if not is_mtp(atom):
            problems.append(f"{folder.path}: '{atom}' is wanted and not stored.")
        elif mtp_init != "random":
            predicting.append(atom)
    if predicting:
        problems.append(
            f"{folder.path}: num_nextn_predict_layers {cfg.num_nextn_predict_layers} wants '{min(predicting)}' and "
            f"{len(predicting) - 1} more weights that are not stored. Set mtp_init: random to start multi-token "
            "prediction from random weights, or num_nextn_predict_layers: 0."
        )
    may_stay = {HEAD, HEAD_BIAS} if cfg.is_reward and not folder.config.is_reward else set()
    unused = [atom for atom in stored.keys() - everything.atoms.keys() - may_stay if not is_mtp(atom)]
    problems += [f"{folder.path}: '{atom}' is stored and the model has no place for it." for atom in unused]
    if problems:
        raise CheckpointError(listed(sorted(problems)))
    return {name: None if name in absent else tensor for name, tensor in table.tensors.items()}

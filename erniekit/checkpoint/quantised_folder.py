"""An opened quantised folder: judged as strictly as any other, and read as one whose quantised weights are decoded.

It stands wherever a `Folder` stands to be read; each decoded weight is fp32. What a quantised folder may not become
(a base to train, a folder to convert) is refused by those who would make that of it: they open a `Folder`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.base.errors import CheckpointError, MeshError, listed
from erniekit.checkpoint.ernie45 import Form, Table, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import FORMATS, SafetensorsFile, format_tag, open_shards
from erniekit.checkpoint.quantised import CACHE_SCALES, QUANTIZATION, Scheme, stored_name
from erniekit.config.architecture import ErnieConfig
from erniekit.precision.encoders import ACTIVATION_SCALE


def is_quantised(path: str | Path) -> bool:
    """Whether the folder's config.json says that its weights are quantised."""
    try:
        return bool(json.loads((Path(path) / "config.json").read_bytes()).get(QUANTIZATION))
    except (OSError, ValueError, AttributeError):
        return False


def open_to_answer(path: str | Path) -> Folder:
    """A model folder, quantised or not, to ask its model something."""
    return QuantisedFolder.open(path) if is_quantised(path) else Folder.open(path)


def require_whole_matrices(folder: Folder, *, tensor: int) -> None:
    """Raise MeshError if `tensor` ranks are to share the matrices of a quantised folder."""
    if tensor > 1 and isinstance(folder, QuantisedFolder):
        raise MeshError(
            f"{folder.path}: is quantised, and codes are not cut over tensor ranks (tensor_parallel_degree is "
            f"{tensor}). Set it to 1; ranks can share experts: expert_parallel_degree."
        )


def layout_fields(table: Table, scheme: Scheme, cfg: ErnieConfig) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """What is stored in place of each tensor of `table`: name -> (format tag, shape). Tensors that stay as they are
    are not in it; the scales of a cache stand under the fused projection that fills it."""
    made = {}
    for name, tensor in table.tensors.items():
        encoder = scheme.encoder_of(name)
        if encoder is None:
            continue
        fields = {
            stored_name(name, field): (format_tag(dtype), shape)
            for field, (dtype, shape) in encoder.fields(*tensor.shape).items()
        }
        if scheme.rounds_inputs(name):
            fields[stored_name(name, ACTIVATION_SCALE)] = ("F32", (1,))
        if scheme.format.int8_cache and name.endswith("self_attn.qkv_proj.weight"):
            attention = name.removesuffix(".qkv_proj.weight")
            width = (cfg.num_key_value_heads * cfg.head_dim,)
            fields |= {f"{attention}.{scale}": ("F32", width) for scale in CACHE_SCALES}
        made[name] = fields
    return made


class QuantisedFolder(Folder):
    """A folder of --quantize. `scheme` says what each tensor is kept in; `names` are those of the decoded tensors."""

    def __init__(self, path: Path, config_json: bytes, files: dict[str, SafetensorsFile]) -> None:
        self.path, self.config_json, self._files = path, config_json, files
        self.stored = {name: opened for opened in files.values() for name in opened.tensors}
        self.layout = "paddle"
        self.notices: list[str] = []
        values: dict[str, Any] = json.loads(config_json)
        cfg = ErnieConfig.from_dict(values, source=str(path / "config.json"))
        self.scheme = Scheme.found(values, cfg, where=str(path))
        self.disk_config = self.config = cfg
        shapes = {name: opened.tensors[name].shape for name, opened in self.stored.items()}
        self.form = Form.found(cfg, self.layout, shapes)
        if cfg.num_nextn_predict_layers > self.form.mtp_layers:
            self.config = cfg.replace(num_nextn_predict_layers=self.form.mtp_layers)
        self.table = layout_table(cfg, self.layout, self.form)
        self.fields = layout_fields(self.table, self.scheme, cfg)
        self.shapes = {name: tensor.shape for name, tensor in self.table.tensors.items()}
        self.file_of = {name: self._file(name) for name in self.table.tensors}
        self._decoded: tuple[str, np.ndarray] | None = None

    @classmethod
    def open(cls, path: str | Path) -> QuantisedFolder:
        """Open a quantised folder. Raises CheckpointError if it is none of ours or damaged."""
        folder = Path(path)
        files = open_shards(folder)
        if not files:
            raise CheckpointError(f"{folder}: holds no weights.")
        return cls(folder, (folder / "config.json").read_bytes(), files)

    def _file(self, tensor: str) -> str:
        first = next(iter(self.fields[tensor]), tensor) if tensor in self.fields else tensor
        opened = self.stored.get(first)
        return opened.path.name if opened else ""

    # ------------------------------------------------------------------ reading
    def tag(self, name: str) -> str:
        """The format of a tensor as `read_tensor` gives it."""
        return "F32" if name in self.fields else self.stored[name].tensors[name].tag

    def arrays(self, tensor: str) -> dict[str, np.ndarray]:
        """What is stored of a quantised tensor, by field: codes, scales, activation_scale."""
        prefix = tensor.removesuffix("weight")
        names = [name for name in self.fields[tensor] if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.stored[name].read(name) for name in names}

    def cache_scales(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The largest number of each channel of a layer's keys and values, where the format has them."""
        names = [f"ernie.layers.{layer}.self_attn.{scale}" for scale in CACHE_SCALES]
        if not self.scheme.format.int8_cache:
            return None
        key, value = (self.stored[name].read(name) for name in names)
        return key, value

    def read_tensor(self, name: str) -> np.ndarray:
        """A tensor, decoded to fp32 if it is quantised. The last decoded one is kept: its atoms are read in turn."""
        if name not in self.fields:
            array = self.stored[name].read(name)
            return array.view(FORMATS["BF16"]) if array.dtype == np.uint16 else array
        found = self._decoded
        if found is None or found[0] != name:
            encoder = self.scheme.encoder_of(name)
            assert encoder is not None
            found = (name, encoder.decode(self.arrays(name), num_in=self.shapes[name][0]))
            self._decoded = found  # another thread may put its own there
        return found[1]

    def release_tensor(self, name: str) -> None:
        """Let the system drop a tensor's pages."""
        for stored in self.fields.get(name, {name: None}):
            self.stored[stored].release(stored)

    # ------------------------------------------------------------------ judging
    def check(self) -> None:
        """Raise CheckpointError listing every missing, extra or misshapen tensor."""
        expected: dict[str, tuple[str, tuple[int, ...]] | None] = {}
        for name in self.table.tensors:
            expected |= self.fields.get(name, {name: None})
        problems = []
        for name, wanted in expected.items():
            if name not in self.stored:
                problems.append(f"{self.path}: tensor '{name}' is missing.")
                continue
            found = self.stored[name].tensors[name]
            tag, shape = wanted or (found.tag, self.shapes[name])
            if (found.tag, found.shape) != (tag, shape):
                problems.append(
                    f"{self.stored[name].path}: tensor '{name}' is {found.tag} {list(found.shape)}; format "
                    f"{self.scheme.format.name} asks for {tag} {list(shape)}."
                )
        problems += [
            f"{self.stored[name].path}: tensor '{name}' does not belong to format {self.scheme.format.name} of this "
            "config.json."
            for name in self.stored
            if name not in expected
        ]
        if problems:
            raise CheckpointError(listed(problems))

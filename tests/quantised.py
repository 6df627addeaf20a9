"""Quantised folders written in a few lines, for tests of those who read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.hf_files import FORMATS, Entry, format_tag, write_safetensors
from erniekit.checkpoint.quantised import QUANTIZATION, Scheme, stored_name
from erniekit.checkpoint.quantised_folder import layout_fields

LARGEST_INPUT, LARGEST_KEPT = 3.0, 4.0


def quantise_folder(
    source: Path, target: Path, name: str, *, group_size: int | None = None, int4_layers: int | None = None
) -> Path:
    """`source` (-Paddle layout) in the format `name`; activation scales are made up, each another one."""
    folder = Folder.open(source)
    cfg = folder.disk_config
    scheme = Scheme.new(name, cfg, group_size=group_size, int4_layers=int4_layers)
    fields = layout_fields(folder.table, scheme, cfg)
    made: dict[str, np.ndarray] = {}
    draw = np.random.default_rng(3)
    for tensor, shape in folder.shapes.items():
        encoder = scheme.encoder_of(tensor)
        if encoder is None:
            made[tensor] = folder.read_tensor(tensor)
            continue
        made |= {
            stored_name(tensor, field): array
            for field, array in encoder.encode(folder.read_tensor(tensor).astype(np.float32), name=tensor).items()
        }
        for field, (_, size) in fields[tensor].items():
            if field not in made:
                scale = LARGEST_KEPT if "cache" in field else LARGEST_INPUT
                scale /= 448 if scheme.kind_of(tensor) == "fp8" and "cache" not in field else 1
                made[field] = np.float32(scale) * draw.uniform(0.9, 1.1, size).astype(np.float32)
        assert shape == folder.shapes[tensor]
    target.mkdir()
    for file in source.iterdir():
        if not file.name.startswith(("model", "manifest")):
            shutil.copy(file, target / file.name)
    config = json.loads(folder.config_json) | {QUANTIZATION: scheme.settings()}
    (target / "config.json").write_text(json.dumps(config))
    entries = [Entry(key, format_tag(array.dtype), array.shape) for key, array in made.items()]
    assert all(entry.tag in FORMATS for entry in entries)
    write_safetensors(
        target / "model.safetensors", entries, arrays=lambda ordered: (made[entry.name] for entry in ordered),
        metadata={"format": "np"},
    )  # fmt: skip
    return target

"""Model folders for these tests, and a reader and writer of safetensors that share no code with the ones under test."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erniekit.checkpoint.create import create

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
_NUMPY = {"F32": np.float32, "BF16": np.uint16, "U16": np.uint16, "F16": np.float16}

Raw = dict[str, tuple[str, np.ndarray]]  # tensor name -> (format tag, array; bfloat16 as its bits)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def read_raw() -> Callable[[Path], Raw]:
    """All tensors of a weight file, or of all weight files of a folder."""

    def read(path: Path) -> Raw:
        if path.is_dir():
            return {
                name: value for file in sorted(path.glob("model*.safetensors")) for name, value in read(file).items()
            }
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                array = np.frombuffer(content[start:stop], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
                tensors[name] = (entry["dtype"], array)
        return tensors

    return read


@pytest.fixture(scope="session")
def write_raw() -> Callable[[Path, Raw], None]:
    """Write one safetensors file, in the order given."""

    def write(path: Path, tensors: Raw) -> None:
        header, blocks, end = {}, [], 0
        for name, (tag, array) in tensors.items():
            blocks.append(np.ascontiguousarray(array).tobytes())
            header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [end, end + len(blocks[-1])]}
            end += len(blocks[-1])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blocks))

    return write


@pytest.fixture(scope="session")
def _made(tmp_path_factory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def make(family: str, layout: str, dtype: str) -> Path:
        key = (family, layout, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("models") / "-".join(key)
            create(family, made[key], layout=layout, dtype=dtype, seed=7)
        return made[key]

    return make


@pytest.fixture
def model(_made, tmp_path) -> Callable[..., Path]:
    """A small random model in a folder of the test's own: model("micro-moe", layout="paddle")."""

    def make(family: str = "micro-moe", *, layout: str = "pt", dtype: str = "bfloat16", name: str = "model") -> Path:
        copy = tmp_path / name
        shutil.copytree(_made(family, layout, dtype), copy)
        (copy / "manifest.json").unlink()  # these tests change files on purpose
        return copy

    return make


@pytest.fixture
def change(read_raw, write_raw) -> Callable[..., None]:
    """Edit a folder's tensors and config.json in place: change(folder, lambda tensors: ..., moe_k=3)."""

    def edit(folder: Path, tensors: Callable[[Raw], Any] | None = None, **settings: Any) -> None:
        if tensors is not None:
            raw = read_raw(folder)
            tensors(raw)
            write_raw(folder / "model.safetensors", raw)
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return edit

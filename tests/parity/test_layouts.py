"""Every golden folder: atoms are the same from -PT and from -Paddle, in memory, and after saving in either layout.

The folders were written by transformers and by the real ERNIEKit, not by us (tests/data/golden/README.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from erniekit.checkpoint.convert import convert
from erniekit.checkpoint.ernie45 import Form, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.save import save_folder
from tests.loading import load_into

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
BOTH = ["dense/tied", "dense/untied_bias", "moe/shared_tied", "moe/noshared_untied"]
REAL = ["dense_mha", "dense_tied", "dense_tied_bf16_u16", "moe_shared", "moe_mtp", "moe_shared_bf16_sharded"]
TEXT = [f"{case}/{layout}" for case in BOTH for layout in ("pt", "paddle")] + [f"paddle_real/{case}" for case in REAL]


def exact(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def assert_same_atoms(folder: Folder, other: Folder) -> None:
    assert folder.table.atoms == other.table.atoms
    for atom in folder.table.atoms:
        np.testing.assert_array_equal(exact(folder.read_atom(atom)), exact(other.read_atom(atom)), err_msg=atom)


@pytest.mark.parametrize("case", BOTH)
def test_both_layouts_of_a_model_hold_equal_atoms(case):
    """transformers wrote pt/; paddle/ was fused from it by a script of its own."""
    pt, paddle = Folder.open(GOLDEN / case / "pt"), Folder.open(GOLDEN / case / "paddle")
    assert (pt.layout, paddle.layout) == ("pt", "paddle")
    pt.check()
    paddle.check()
    assert pt.config.replace(extras={}, dtype="") == paddle.config.replace(extras={}, dtype="")
    assert_same_atoms(pt, paddle)


def test_a_vision_language_model_exports_the_tensors_that_transformers_wrote(tmp_path):
    case = GOLDEN / "vl" / "vl_moe"
    expected = json.loads((case / "pt_tensors.json").read_bytes())
    convert(case / "paddle", tmp_path / "pt", to="pt")
    folder = Folder.open(tmp_path / "pt")
    folder.check()
    found = {}
    for name in folder.names:
        array = np.ascontiguousarray(exact(folder.read_tensor(name)))
        found[name] = {"shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    assert found == expected


@pytest.mark.parametrize("case", TEXT)
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_from_disk_to_memory_to_either_layout(case, layout, tmp_path):
    source = Folder.open(GOLDEN / case)
    cfg = source.config
    form = dataclasses.replace(
        Form.usual(cfg, "ram", mtp_layers=cfg.num_nextn_predict_layers), head_bias=source.has_head_bias
    )
    tensors = layout_table(cfg, "ram", form).tensors
    arrays = {name: np.full(tensor.shape, np.nan, np.float32) for name, tensor in tensors.items()}
    load_into(source, arrays, cfg=cfg)
    dtype = "float32" if source.read_atom("model.norm.weight").dtype == np.float32 else "bfloat16"
    save_folder(tmp_path / "saved", arrays, cfg=cfg, layout=layout, dtype=dtype, base=source)
    saved = Folder.open(tmp_path / "saved")
    saved.check()
    assert saved.layout == layout
    assert saved.config.replace(extras={}) == cfg.replace(extras={}, dtype=dtype)
    assert_same_atoms(source, saved)


@pytest.mark.parametrize("case", REAL)
def test_the_real_erniekit_s_fused_tensors_by_hand(case):
    """Our views against plain slicing of the stored arrays, as models.md describes them."""
    folder = Folder.open(GOLDEN / "paddle_real" / case)
    cfg, layer = folder.config, "layers.1."
    heads, groups, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    fused = folder.read_tensor(f"ernie.{layer}self_attn.qkv_proj.weight")
    if heads == groups:
        by_head = fused.reshape(cfg.hidden_size, heads, 3, dim)
        parts = [by_head[:, :, i].reshape(cfg.hidden_size, -1) for i in range(3)]
    else:
        parts = np.split(fused, [heads * dim, (heads + groups) * dim], axis=1)
    for part, expected in zip("qkv", parts, strict=True):
        np.testing.assert_array_equal(folder.read_atom(f"model.{layer}self_attn.{part}_proj.weight"), expected.T)
    mlp = f"{layer}mlp.experts.2." if cfg.is_moe else f"{layer}mlp."
    gate, up = np.split(folder.read_tensor(f"ernie.{mlp}up_gate_proj.weight"), 2, axis=1)
    np.testing.assert_array_equal(folder.read_atom(f"model.{mlp}gate_proj.weight"), gate.T)
    np.testing.assert_array_equal(folder.read_atom(f"model.{mlp}up_proj.weight"), up.T)
    assert folder.read_atom("model.embed_tokens.weight").dtype in (np.float32, ml_dtypes.bfloat16)

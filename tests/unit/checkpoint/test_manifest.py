"""The manifest sees every change to what it lists."""

from __future__ import annotations

import json

import pytest

from erniekit.base.files import sha256
from erniekit.checkpoint.manifest import MANIFEST_FILE, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"12345")
    (tmp_path / "training" / "state.json").write_text("{}")
    (tmp_path / ".hidden").write_text("left over")
    write_manifest(tmp_path)
    return tmp_path


def test_all_files_below_the_folder_are_listed_but_hidden_ones(folder):
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    assert files["weights.bin"] == {"sha256": sha256(folder / "weights.bin"), "bytes": 5}
    assert files.keys() == {"weights.bin", "training/state.json"}
    assert check_manifest(folder) == []


def test_a_file_added_later_is_no_damage(folder):
    (folder / "notes.txt").write_text("mine")
    assert check_manifest(folder) == []


def test_every_damage_is_named(folder):
    (folder / "weights.bin").write_bytes(b"12346")
    (folder / "training" / "state.json").write_text("{ }")
    changed, longer = check_manifest(folder)
    assert "weights.bin: its content is not what was written" in longer
    assert "state.json: 3 bytes; manifest.json says 2" in changed
    (folder / "weights.bin").unlink()
    assert "weights.bin: missing" in check_manifest(folder)[1]


def test_a_manifest_that_is_none(folder):
    for content in ("", "[]", '{"files": {"a": 1}}', '{"files": [1]}'):
        (folder / MANIFEST_FILE).write_text(content)
        assert "not a manifest" in check_manifest(folder)[0]
    (folder / MANIFEST_FILE).unlink()
    assert "missing" in check_manifest(folder)[0]


def test_only_some_files_and_digests_known_already(folder):
    write_manifest(folder, ["weights.bin"], known={"weights.bin": "0" * 64})
    assert "its content is not what was written" in check_manifest(folder)[0]

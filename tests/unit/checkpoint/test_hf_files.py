"""safetensors: bytes equal to the library's, damage found before data is read, writing that is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.hf_files import (
    INDEX_FILE,
    Entry,
    SafetensorsFile,
    format_tag,
    index_content,
    is_weight_file,
    open_shards,
    plan_shards,
    write_safetensors,
)

ARRAYS = {
    "z.bias": np.arange(3, dtype=np.float32),
    "a.weight": np.arange(12, dtype=np.uint16).reshape(3, 4),
    "ß.weight": np.arange(6, dtype=np.int64).reshape(1, 6),
    "flags": np.array([True, False, True]),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 4), np.float16),
}


def entries_of(arrays):
    return [Entry(name, format_tag(array.dtype), array.shape) for name, array in arrays.items()]


def write(path, arrays, metadata=None):
    def in_order(entries):
        return (arrays[entry.name] for entry in entries)

    return write_safetensors(path, entries_of(arrays), arrays=in_order, metadata=metadata or {"format": "np"})


def file_with(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# ---------------------------------------------------------------------- writing
def test_a_written_file_is_the_library_s_byte_for_byte(tmp_path):
    digest = write(tmp_path / "ours.safetensors", ARRAYS)
    assert (tmp_path / "ours.safetensors").read_bytes() == save(ARRAYS, metadata={"format": "np"})

    assert digest == hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest()


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path / "x.safetensors", ARRAYS, metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)
        file.release(name)


def test_arrays_that_are_not_contiguous_are_written_right(tmp_path):
    arrays = {"t": np.arange(12, dtype=np.float32).reshape(3, 4).T, "s": np.arange(10, dtype=np.float32)[::2]}
    write(tmp_path / "x.safetensors", arrays)
    read = load_file(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_bfloat16_under_both_tags(tmp_path):
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    for tag in ("BF16", "U16"):
        path = tmp_path / f"{tag}.safetensors"
        write_safetensors(path, [Entry("x", tag, (2,))], arrays=lambda _: iter([array]), metadata={})
        file = SafetensorsFile(path)
        assert file.tensors["x"].tag == tag
        assert file.read("x").tobytes() == array.tobytes()


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken(entries):
        yield ARRAYS[entries[0].name]
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_safetensors(tmp_path / "x.safetensors", entries_of(ARRAYS), arrays=broken, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(path, ARRAYS)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        write(path, {"other": np.zeros(4, np.float32)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------- shards and index
def test_shards_are_filled_in_order_and_never_above_the_limit():
    entries = [Entry(f"t{i}", "F32", (size,)) for i, size in enumerate([10, 10, 30, 5, 5])]
    shards = plan_shards(entries, max_shard_bytes=80)
    assert {file: [entry.name for entry in shard] for file, shard in shards.items()} == {
        "model-00001-of-00003.safetensors": ["t0", "t1"],
        "model-00002-of-00003.safetensors": ["t2"],  # alone above the limit
        "model-00003-of-00003.safetensors": ["t3", "t4"],
    }
    assert list(plan_shards(entries, max_shard_bytes=1000)) == ["model.safetensors"]
    assert index_content(shards)["metadata"] == {"total_size": 240}
    assert index_content(shards)["weight_map"]["t2"] == "model-00002-of-00003.safetensors"


def sharded(folder):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for i, name in enumerate(names):
        save_file({f"t{i}": np.full(3, i, np.float32)}, folder / name)
        weight_map[f"t{i}"] = name
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_opened_by_the_index(tmp_path):
    weight_map = sharded(tmp_path)
    save_file({"optimizer": np.zeros(2)}, tmp_path / "optimizer.safetensors")  # none of ours
    opened = open_shards(tmp_path)
    assert {name: file for file, shard in opened.items() for name in shard.tensors} == weight_map


def test_every_disagreement_of_index_and_shards_is_named_at_once(tmp_path):
    weight_map = sharded(tmp_path)
    save_file(
        {"extra": np.zeros(2, np.float32), "t1": np.zeros(3, np.float32)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    weight_map["absent"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as error:
        open_shards(tmp_path)
    assert len(error.value.problems) == 2
    assert "'absent'" in str(error.value)
    assert "'extra'" in str(error.value)


def test_a_shard_missing_and_a_shard_too_many(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_shards(tmp_path)
    assert "model-00002-of-00002.safetensors is named in model.safetensors.index.json and missing" in str(error.value)
    assert "model-00002-of-00003.safetensors is not named" in str(error.value)


def test_shards_without_an_index_and_an_index_that_is_none(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": ["a"]}')
    with pytest.raises(CheckpointError, match="not an index"):
        open_shards(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE} is missing"):
        open_shards(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file(
        {"t0": np.zeros(3, np.float32), "t1": np.zeros(3, np.float32)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(CheckpointError, match="'t0' lies in several shards"):
        open_shards(tmp_path)


def test_weight_file_names():
    assert is_weight_file("model.safetensors")
    assert is_weight_file("model-00001-of-00121.safetensors")
    for other in ("optimizer.safetensors", "../model.safetensors", "model-1-of-2.safetensors", "model_state.pdparams"):
        assert not is_weight_file(other)


# ---------------------------------------------------------------------- damage
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DAMAGED = {
    "shorter than a header": (b"", "too short"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "its header claims"),
    "header that is no JSON": (b"\x04\0\0\0\0\0\0\0{{{{", "not valid JSON"),
    "header that is no text": (b"\x04\0\0\0\0\0\0\0\xff\xfe\xfd\xfc", "not valid JSON"),
    "header that is a list": ([1, 2], "not a table"),
    "metadata that is a list": ({"__metadata__": [1]}, "not a table"),
    "entry that is no object": ({"x": 5}, "not understood"),
    "negative size": ({"x": ENTRY | {"shape": [-2, -2]}}, "not understood"),
    "size that is no number": ({"x": ENTRY | {"shape": [2, True]}}, "not understood"),
    "one offset": ({"x": ENTRY | {"data_offsets": [0]}}, "not understood"),
    "unknown format": ({"x": ENTRY | {"dtype": "F31"}}, "format 'F31'"),
    "bytes that do not make the shape": ({"x": ENTRY | {"shape": [3, 2]}}, "do not make shape"),
    "shape beyond all bounds": ({"x": ENTRY | {"shape": [1 << 40, 1 << 40]}}, "do not make shape"),
    "offsets backwards": ({"x": ENTRY | {"data_offsets": [16, 0]}}, "do not make shape"),
    "overlap": ({"x": ENTRY, "y": ENTRY | {"data_offsets": [8, 24]}}, "overlaps"),
    "hole": ({"x": ENTRY | {"data_offsets": [4, 20]}}, "hole"),
    "name twice": (b'{"x": 1, "x": 2}', "more than once"),
    "truncated": ({"x": ENTRY, "y": ENTRY | {"data_offsets": [16, 32]}}, "truncated"),
    "too long": ({"x": ENTRY | {"shape": [2, 1], "data_offsets": [0, 8]}}, "bytes after its last tensor"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_its_name(name, tmp_path):
    header, words = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    if isinstance(header, bytes) and not header.startswith(b"{"):
        path.write_bytes(header)
    else:
        file_with(path, header, data=bytes(16))
    with pytest.raises(CheckpointError, match=words) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
    with pytest.raises(SafetensorError):  # the library agrees that it is damaged
        load_file(path)


def test_every_truncation_of_a_file_is_found(tmp_path):
    write(tmp_path / "whole.safetensors", {"a": np.arange(5, dtype=np.float32), "b": np.zeros((2, 3), np.uint16)})
    content = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(cut)


def test_data_is_read_without_copying_and_may_be_released(tmp_path):
    write(tmp_path / "x.safetensors", {"a": np.arange(3000, dtype=np.float32), "b": np.ones(3, np.float32)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    array = file.read("a")
    assert not array.flags.writeable
    file.release("a")
    np.testing.assert_array_equal(array, np.arange(3000))  # released pages come back from the file

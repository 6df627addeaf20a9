"""Reading .pdparams: what paddle.save writes is read; what could execute code is refused before it runs."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.pdparams import read_pdparams


@pytest.fixture(scope="module")
def state():
    paddle.seed(0)
    return {
        "ernie.weight": paddle.randn([3, 5]),
        "ernie.half": paddle.randn([4]).astype("bfloat16"),
        "ernie.parameter": paddle.create_parameter([2, 2, 2], "float32"),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_state_dict_of_every_pickle_protocol(state, tmp_path, protocol):
    path = str(tmp_path / "model_state.pdparams")
    paddle.save(state, path, protocol=protocol)
    read = read_pdparams(path)
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name], tensor.numpy())  # bfloat16 as its uint16 bits, as Paddle gives it


def test_a_layer_and_arrays_of_any_order(tmp_path):
    layer = paddle.nn.Linear(3, 2)
    paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
    np.testing.assert_array_equal(read_pdparams(tmp_path / "layer.pdparams")["weight"], layer.weight.numpy())
    arrays = {"f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)), "c": np.ones((2, 1), np.uint16)}
    for protocol in (2, 3, 4):
        (tmp_path / "arrays.pdparams").write_bytes(pickle.dumps(arrays, protocol=protocol))
        for name, array in read_pdparams(tmp_path / "arrays.pdparams").items():
            np.testing.assert_array_equal(array, arrays[name])


class _Executes:
    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("call", "argument", "named"),
    [
        (os.system, "touch {marker}", "posix.system"),
        (eval, "open({marker!r}, 'w')", "builtins.eval"),
        (exec, "open({marker!r}, 'w')", "builtins.exec"),
        (os.mkdir, "{marker}", "posix.mkdir"),
    ],
)
def test_a_pickle_that_would_execute_code_is_refused_and_not_run(tmp_path, call, argument, named):
    marker, path = tmp_path / "marker", tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"weight": _Executes(call, argument.format(marker=str(marker)))}, protocol=4))
    with pytest.raises(CheckpointError, match=named) as error:
        read_pdparams(path)
    assert "nothing in the file was executed" in str(error.value)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the file is a real attack: Python's own loader runs it
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "holds a list"),
        ({"a": 5}, "entry 'a' is not a tensor"),
        ({"a": np.zeros(2, np.float64)}, "format 'f8'"),
        ({"a": np.array([{}, []], object)}, "format 'O8'"),
        ({"a": np.array([1.0], ">f4")}, "big-endian"),
        ({"a": np.zeros(2, "f4,f4")}, "refused"),
    ],
)
def test_other_contents_are_refused(tmp_path, value, words):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match=words):
        read_pdparams(path)


def test_damaged_files_give_an_error_for_users_never_a_crash(state, tmp_path):
    path, damaged = tmp_path / "whole.pdparams", tmp_path / "damaged.pdparams"
    paddle.save(state, str(path))
    content, rng = path.read_bytes(), random.Random(0)
    for length in range(0, len(content) - 1, 11):
        damaged.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_pdparams(damaged)
    refused = 0
    for _ in range(400):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] = rng.randrange(256)
        damaged.write_bytes(changed)
        try:
            read_pdparams(damaged)  # a changed number or name is still a state dict
        except CheckpointError:
            refused += 1
    assert refused > 40

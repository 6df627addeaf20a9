"""Building, choosing and calling the compiled kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

from erniekit.base import runtime
from erniekit.ops.cpu import library as built
from erniekit.ops.dispatch import backend

ROOT = Path(__file__).parents[3]

USE = """
from erniekit.base import runtime
runtime.prepare()
import paddle
from erniekit.ops.cpu.library import tier
from erniekit.ops.mlp import swiglu
x = paddle.to_tensor([[1.0, 2.0]])
for _ in range(2):
    print(tier(), [round(y, 3) for y in swiglu(x, x)[0].tolist()])
"""
VALUES = "[0.731, 3.523]"


OLD_PROCESSOR = """
from erniekit.base import runtime
runtime.prepare()
from erniekit.ops.cpu import library as built
built.FLAGS = tuple("-march=x86-64" if flag == "-march=native" else flag for flag in built.FLAGS)
from tests.unit.ops import test_attention, test_cross_entropy, test_dense, test_float8, test_hadamard
for sizes in test_attention.SIZES[2:5]:
    test_attention.test_attention(sizes, "packed")
test_cross_entropy.test_loss((1100, 16, 50), True, True)
test_dense.test_swiglu((130, 64))
for kind in test_float8.KINDS:
    test_float8.test_random_numbers(kind)
    test_float8.test_schemes_are_equal_bit_for_bit_everywhere(kind, [64, 65, 1])
test_hadamard.test_rows((5, 96))
print(built.compiled_path())
"""


@pytest.fixture(autouse=True)
def tier() -> None:
    """Each test here chooses by itself, once."""


def use_elsewhere(script: str = USE, **environment: str) -> tuple[list[str], str]:
    """Standard output and error of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines(), done.stderr


def test_fp32_on_a_cpu_is_fast_and_all_else_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    x = paddle.ones([2])
    assert backend(x) == backend(x, paddle.ones([2], "int64")) == "cpu"
    assert backend(x.astype("float64")) == backend(x, x.astype("bfloat16")) == "plain"
    monkeypatch.setenv("ERNIEKIT_PLAIN_OPS", "1")
    assert backend(x) == "plain"


def test_numpy_instead_of_a_compiler_on_request(tmp_path: Path) -> None:
    assert use_elsewhere(XDG_CACHE_HOME=str(tmp_path), ERNIEKIT_NUMPY_OPS="1") == ([f"numpy {VALUES}"] * 2, "")
    assert list(tmp_path.iterdir()) == []


def test_the_library_is_built_once_into_the_cache_folder(tmp_path: Path) -> None:
    for _ in range(2):
        assert use_elsewhere(XDG_CACHE_HOME=str(tmp_path)) == ([f"cpp {VALUES}"] * 2, "")
        (made,) = (tmp_path / "erniekit").iterdir()
        stamp = made.stat().st_mtime_ns
    assert made.stat().st_mtime_ns == stamp and made.suffix == ".so"


def test_without_a_compiler_one_notice_and_the_kernels_in_numpy(tmp_path: Path) -> None:
    out, err = use_elsewhere(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert out == [f"numpy {VALUES}"] * 2
    assert err.count("note: ") == 1 and "g++" in err and "apt install" in err


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'unknown processor' >&2\nexit 1\n", encoding="ascii")
    compiler.chmod(0o755)
    out, err = use_elsewhere(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert out == [f"numpy {VALUES}"] * 2
    assert "unknown processor" in err
    assert list((tmp_path / "cache" / "erniekit").iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "erniekit").write_text("a file where the folder should be", encoding="ascii")
    out, err = use_elsewhere(XDG_CACHE_HOME=str(tmp_path))
    assert out == [f"numpy {VALUES}"] * 2
    assert str(tmp_path / "erniekit") in err


def test_other_sources_flags_or_processors_make_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    here = built.compiled_path()
    monkeypatch.setattr(runtime, "cpu_flags", lambda: "flags: another processor")
    assert built.compiled_path() != here
    monkeypatch.undo()
    monkeypatch.setattr(built, "FLAGS", (*built.FLAGS, "-g"))
    assert built.compiled_path() != here


def test_a_processor_without_avx_gets_the_same_results(tmp_path: Path) -> None:
    out, _ = use_elsewhere(OLD_PROCESSOR, XDG_CACHE_HOME=str(tmp_path))
    assert out == [str(next((tmp_path / "erniekit").iterdir()))]


def test_every_compiled_kernel_has_its_twin_in_numpy() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in built.SOURCES.glob("*.cpp"))
    names = set(re.findall(r"^EXPORT \w+ (\w+)\(", sources, re.MULTILINE)) - {"set_up"}
    assert {"linear_forward", "attention_backward", "adamw"} <= names
    assert {built.numpy_kernel(name).__name__ for name in names} == names


@pytest.mark.parametrize("numpy_ops", ["0", "1"])
def test_kernels_refuse_strided_tensors(numpy_ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIEKIT_NUMPY_OPS", numpy_ops)
    with pytest.raises(AssertionError, match="strided"):
        built.call("permute", paddle.ones([4, 4]).t())

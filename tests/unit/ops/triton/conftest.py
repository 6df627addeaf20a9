"""Triton's interpreter, which runs kernels program by program in numpy, on Paddle's CPU tensors.

Triton decides when it is imported whether it interprets, so this happens here, before any test module of this folder is
loaded. Without Triton they are skipped.
"""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton

        triton.knobs.runtime.interpret = True
        from erniekit.ops.triton.interpreter import put_right

        put_right()


@pytest.fixture(autouse=True)
def tier() -> str:
    """In place of the folder above's: these kernels have no second kind."""
    return "triton"

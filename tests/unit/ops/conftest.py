"""The tests of this folder compare compiled kernels with their plain twins: without a compiler there are none."""

from __future__ import annotations

import pytest

from erniekit.ops.cpu.library import library


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if library() is None:
        pytest.skip("the CPU kernels need g++")

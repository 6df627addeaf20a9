"""What every test shares: Paddle's environment, the skipping markers, and the command line in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erniekit.base import runtime

ROOT = Path(__file__).resolve().parents[1]

runtime.prepare()  # before any test imports paddle


def _has_gpu() -> bool:
    import paddle  # only when a test asks: the import takes seconds

    return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


def _has_oracle() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


_NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (_has_gpu, "needs a GPU"),
    "parity": (_has_oracle, "needs torch and transformers: bash scripts/run_tests.sh --parity"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for marker, (available, reason) in _NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def erniekit() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own: erniekit("check", path, code=2).stderr."""

    def run(*args: str | Path, code: int = 0, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "erniekit", *map(str, args)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return run

"""The verb `env`: what a bug report needs. Reads package records only; imports none of the packages."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from erniekit.base import runtime
from erniekit.cli.arguments import Arguments
from erniekit.version import __version__

_PACKAGES = (
    "paddlepaddle", "paddlepaddle-gpu", "numpy", "ml_dtypes", "safetensors", "sentencepiece", "pyyaml", "jinja2",
)  # fmt: skip


def env(_: Arguments) -> None:
    """Print versions, machine and settings, one a line."""
    rows = {
        "erniekit": __version__ + _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": f"{runtime.num_cores()} of {os.cpu_count()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "settings": " ".join(f"{name}={value}" for name, value in runtime.settings().items()) or "none",
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of a source tree; an installed package has none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return f" (commit {done.stdout.strip()})" if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

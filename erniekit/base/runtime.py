"""The process environment: the only file that reads or writes os.environ.

Paddle's CPU speed depends on settings that must exist before the library is loaded (threads, MKL) or before the process
starts (malloc). `prepare` sets each of them unless the user already did. The measurements behind every value are in
docs/performance.md.
"""

from __future__ import annotations

import os
import sys
import warnings

_PREPARED = "ERNIEKIT_PREPARED"
_PLAIN_OPS = "ERNIEKIT_PLAIN_OPS"

_MALLOC = {
    # One arena, no mmap for large blocks, no trimming: training reuses the same large buffers every step.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "KMP_BLOCKTIME", *_MALLOC)


def num_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


def _wanted() -> dict[str, str]:
    wanted = {
        # Two OpenMP runtimes meet in Paddle's process: with more than one OMP thread an optimizer step makes every
        # later matmul 3-5 times slower. MKL keeps its own threads.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": str(num_cores()),
        "KMP_BLOCKTIME": "1",
    }
    if _is_amd():
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"  # the bundled MKL picks its slowest kernels on AMD otherwise
    return wanted


def prepare(*, reexec: bool = False) -> None:
    """Set what Paddle needs to be fast, unless the user has set it.

    With `reexec` (the command line) the process starts itself again once, because malloc reads its settings only at
    process start. A library user (`import erniekit`) gets everything else.
    """
    for name, value in _wanted().items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="No ccache found")
    if not reexec or _PREPARED in os.environ or not sys.platform.startswith("linux") or "paddle" in sys.modules:
        return
    os.environ[_PREPARED] = "1"
    missing = {name: value for name, value in _MALLOC.items() if name not in os.environ}
    if missing:
        os.environ.update(missing)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def num_threads() -> int:
    """Threads of our own CPU kernels: as many as MKL's, whose pool they share."""
    return int(os.environ.get("MKL_NUM_THREADS") or num_cores())


def cpu_flags() -> str:
    """The instruction sets of this processor ("" where unknown): compiled kernels are not moved between unlike machines."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def plain_ops() -> bool:
    """True if the user asked for the plain twins of all fast kernels (ERNIEKIT_PLAIN_OPS=1), to look for a bug."""
    return os.environ.get(_PLAIN_OPS, "") not in ("", "0")


def settings() -> dict[str, str]:
    """The environment settings that matter for speed, as they are now (for `erniekit env`)."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def cache_folder() -> str:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/erniekit or ~/.cache/erniekit."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "erniekit")

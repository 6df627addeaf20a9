"""What this machine offers: memory, cores, disk, the GPU and its driver. Reads the system's own files only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
_MEMORY_INFO = Path("/proc/meminfo")
_DRIVER = Path("/proc/driver/nvidia/version")
_GROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")


def memory() -> tuple[int, int]:
    """Bytes that this process may use, and those that are free now; a container's limit counts."""
    try:
        lines = _MEMORY_INFO.read_text(encoding="ascii").splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    rows = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = rows["MemTotal"], rows.get("MemAvailable", rows["MemTotal"])
    limit, used = _group_number("memory.max"), _group_number("memory.current")
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return total, free


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    return _of_process("VmRSS")


def peak_resident() -> int:
    """The most that they were since the start of the process or the last `forget_peak`."""
    return _of_process("VmHWM")


def forget_peak() -> None:
    """Let `peak_resident` begin anew, where the system lets us."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def _of_process(name: str) -> int:
    try:
        lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def quota() -> float | None:
    """Cores that a container may keep busy, None without a limit."""
    try:
        share, period = (_GROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if share == "max" else int(share) / int(period)


def _group_number(name: str) -> int | None:
    try:
        text = (_GROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def free_disk(path: str | Path) -> tuple[int, bool]:
    """Free bytes where `path` is or would be, and whether it can be written there."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free, os.access(place, os.W_OK)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver tells of it."""

    name: str
    num_bytes: int


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; empty where there is none."""
    rows = _ask_driver("name,memory.total")
    return [Gpu(row[0], int(row[1]) * 2**20) for row in rows if len(row) == 2 and row[1].isdecimal()]


def capabilities() -> list[tuple[int, int]]:
    """The compute capability of every GPU: (9, 0) is Hopper."""
    found = [re.fullmatch(r"(\d+)\.(\d+)", row[0]) for row in _ask_driver("compute_cap")]
    return [(int(match[1]), int(match[2])) for match in found if match]


def _ask_driver(fields: str) -> list[list[str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = fields.count(",")
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in line.rsplit(",", count)] for line in lines]


def driver() -> tuple[int, ...] | None:
    """The version of the NVIDIA driver, None where none is loaded."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return tuple(map(int, found[1].split("."))) if found else None

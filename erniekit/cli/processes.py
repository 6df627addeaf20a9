"""What the system tells of processes: whether they work, how much memory they hold, how many it has killed for memory.

Linux says it in /proc and /sys; elsewhere nothing is known, and nothing is claimed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_KILLS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def is_stopped(process: int) -> bool:
    """Whether somebody has stopped a process (SIGSTOP)."""
    fields = _stat(process)
    return bool(fields) and fields[0] == "T"


def work_of(process: int) -> tuple[float, int]:
    """Seconds of computing, and bytes read and written, of a process and all that it has started."""
    seconds, moved = 0.0, 0
    for number in _family(process):
        if fields := _stat(number):
            seconds += sum(map(int, fields[11:15])) / _TICKS  # in user and system mode, with children that are gone
        rows = _rows(f"/proc/{number}/io")
        moved += rows.get("rchar:", 0) + rows.get("wchar:", 0)
    return seconds, moved


def memory_of(process: int) -> int:
    """The bytes that a process holds."""
    return _rows(f"/proc/{process}/status").get("VmRSS:", 0) * 1024


def kills_for_memory() -> int:
    """How many processes the system has killed because memory ran out: of this container, or of the machine."""
    return sum(_rows(path).get("oom_kill", 0) for path in _KILLS)


def _family(process: int) -> Iterator[int]:
    yield process
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for word in _read(path).split():
            yield from _family(int(word))


def _stat(process: int) -> list[str]:
    """The fields of /proc/N/stat behind the name, beginning with the state."""
    return _read(f"/proc/{process}/stat").rpartition(")")[2].split()


def _rows(path: str) -> dict[str, int]:
    """Rows that begin with a name and a number."""
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # the process is gone, or the system tells no such thing
        return ""

"""The process environment: the only file that reads or writes os.environ.

Paddle's CPU speed depends on settings that must exist before the library is loaded. `prepare` sets each of them unless
the user already did. The measurements behind every value are in docs/performance.md.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from erniekit.base.errors import MeshError

PULSE = "ERNIEKIT_PULSE"  # the folder in which ranks note what they are doing
_PLAIN_OPS, _NUMPY_OPS, _TRITON = "ERNIEKIT_PLAIN_OPS", "ERNIEKIT_NUMPY_OPS", "ERNIEKIT_TRITON"
_JOB = "ERNIEKIT_JOB_FOLDER"
_LOGS = "ERNIEKIT_DIST_LOG"  # ERNIEKit's name for it
_TORCHS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
JOB_VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

# Environment name -> (the parameter's number in glibc's malloc.h, value): large blocks come from the heap and freed
# memory stays there, because training asks for the same blocks in every step.
_MALLOC = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}

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
        # For Paddle's own loops, which gain nothing from more; matrix products and our kernels take MKL's number.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": str(max(num_cores() // _ranks_here(), 1)),
        "KMP_BLOCKTIME": "1",  # ms for which an idle thread waits busily: long enough between two kernels of a step
    }
    if _is_amd():
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"  # the bundled MKL picks its slowest kernels on AMD otherwise
    return wanted


def _ranks_here() -> int:
    """How many processes of this run share the machine."""
    said = os.environ.get("PADDLE_LOCAL_SIZE", "")
    return max(int(said), 1) if said.isdecimal() else 1


def prepare() -> None:
    """Set what Paddle needs to be fast, unless the user has set it. Call before Paddle is loaded."""
    for name, value in _wanted().items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("GLOG_minloglevel", "1")  # Paddle tells of every connection between ranks otherwise
    warnings.filterwarnings("ignore", message="No ccache found")
    if sys.platform.startswith("linux"):
        _tell_malloc()


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Load Paddle in here: SIGTERM stays with whom it belonged. Paddle answers it with a page of C++ frames."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():  # others may not
        signal.signal(signal.SIGTERM, before)


def _tell_malloc() -> None:
    """malloc reads its variables only when a process starts; glibc's mallopt changes the same while it runs."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    for name, (parameter, value) in _MALLOC.items():
        if mallopt is not None and name not in os.environ:
            mallopt(parameter, value)


def num_threads() -> int:
    """Threads of our own CPU kernels: as many as MKL's, whose pool they share."""
    asked = os.environ.get("MKL_NUM_THREADS", "")
    return max(int(asked), 1) if asked.isdecimal() else num_cores()


def cpu_flags() -> str:
    """The instruction sets of this processor, "" where unknown: compiled kernels do not move to another kind."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


@dataclass(frozen=True)
class Place:
    """Where a process stands: its number among all ranks, where rank 0 listens, under which name others reach it."""

    rank: int = 0
    world: int = 1
    master: str = ""  # host:port
    host: str = "127.0.0.1"
    pulse: str = ""  # a folder in which it notes what it is doing (parallel/pulse.py)


def rank_place() -> Place:
    """The place that a launcher gave this process, by the variables of `paddle.distributed.launch`; alone without them.
    Those of torchrun are taken, too.

    Raises MeshError if they do not say all of it, or what cannot be.
    """
    _translate_torchs()
    names = ("PADDLE_TRAINERS_NUM", "PADDLE_TRAINER_ID", "PADDLE_MASTER")
    told = {name: os.environ.get(name, "") for name in names}
    if told["PADDLE_TRAINERS_NUM"] in ("", "1"):
        return Place()
    world, rank, master = told.values()
    master = master or os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").partition(",")[0]
    is_placed = world.isdecimal() and rank.isdecimal() and int(rank) < int(world)
    if not (is_placed and master.rpartition(":")[2].isdecimal()):
        said = ", ".join(f"{name}={value or '(nothing)'}" for name, value in told.items())
        raise MeshError(
            f"{said}: these variables give this process no place among others. PADDLE_TRAINER_ID counts from 0 to "
            "PADDLE_TRAINERS_NUM - 1, PADDLE_MASTER is the host:port of rank 0. `erniekit train ... --nproc N` sets "
            "them; a process by itself needs none of them."
        )
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0] or os.environ.get("POD_IP", "")
    return Place(int(rank), int(world), master, host or Place.host, os.environ.get(PULSE, ""))


def _translate_torchs() -> None:
    """Say in Paddle's variables what torchrun's say, unless a launcher has set those, or NNODES asks for ours."""
    said = {name: os.environ.get(name, "") for name in _TORCHS}
    if not said["RANK"] or said["WORLD_SIZE"] in ("", "1"):
        return
    if any(os.environ.get(name) for name in ("PADDLE_TRAINERS_NUM", "NNODES")):
        return
    port = said["MASTER_PORT"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and port.isdecimal():
        port = str(int(port) + 1)  # at that one torchrun itself listens
    os.environ.update(
        PADDLE_TRAINERS_NUM=said["WORLD_SIZE"], PADDLE_TRAINER_ID=said["RANK"],
        PADDLE_MASTER=f"{said['MASTER_ADDR']}:{port}", PADDLE_LOCAL_SIZE=said["LOCAL_WORLD_SIZE"],
    )  # fmt: skip
    if said["LOCAL_RANK"]:
        os.environ.setdefault("FLAGS_selected_gpus", said["LOCAL_RANK"])
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Paddle would open a store of its own there
        os.environ.pop(name, None)


def tell_paddle_rank(rank: int, world: int) -> None:
    """Paddle's process groups ask the environment which rank they are in."""
    os.environ.update(PADDLE_TRAINER_ID=str(rank), PADDLE_TRAINERS_NUM=str(world))


def no_color() -> bool:
    """True if the user wants no colours in the terminal (https://no-color.org: NO_COLOR is set and not empty)."""
    return bool(os.environ.get("NO_COLOR"))


def plain_ops() -> bool:
    """True if the user asked for the plain twins of all fast kernels (ERNIEKIT_PLAIN_OPS=1), to look for a bug."""
    return _is_on(_PLAIN_OPS)


def numpy_ops() -> bool:
    """True if the user asked for the CPU kernels in numpy even where C++ can be compiled (ERNIEKIT_NUMPY_OPS=1)."""
    return _is_on(_NUMPY_OPS)


def triton_ops() -> bool:
    """True if the user asked for Triton's kernels where Paddle has none of its own (ERNIEKIT_TRITON=1)."""
    return _is_on(_TRITON)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def settings() -> dict[str, str]:
    """The environment settings that matter for speed, as they are now (for `erniekit env`)."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def cache_folder() -> str:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/erniekit or ~/.cache/erniekit."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "erniekit")


def job_folder() -> Path | None:
    """Where the ranks of a job leave notes for the one who watches them (cli/launch.py); None if nobody does."""
    found = os.environ.get(_JOB)
    return Path(found) if found else None


def job_variables() -> dict[str, str]:
    """What the user says of a job on several machines; a variable that is not set is absent."""
    return {name: os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)}


def visible_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; None if it is not set: all are visible then."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if asked is None else [word for word in asked.split(",") if word.strip() not in ("", "-1")]


def log_folder() -> Path | None:
    """Where the user wants the logs of ranks; None if nothing is said."""
    said = os.environ.get(_LOGS)
    return Path(said) if said else None


def environment_of_rank(further: dict[str, str], *, folder: Path) -> dict[str, str]:
    """The whole environment of a rank: this process's own and `further`. Paddle would take MASTER_ADDR for its own
    store, so what was said of the job stays here."""
    mine = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    return mine | further | {_JOB: str(folder), PULSE: str(folder)}

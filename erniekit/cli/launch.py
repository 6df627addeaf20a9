"""Starts the ranks of `erniekit train|eval|export|reproduce FILE --nproc N`: how many, which environment, which logs.

Each rank is `python -m erniekit VERB ...` again, with the variables that `paddle.distributed.launch` sets, so that
either may start a job. One rank needs no starting: the process itself is it. On several machines every one runs the
same command with NNODES, MASTER_ADDR, MASTER_PORT and NODE_RANK. Loads no Paddle.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from erniekit.base import runtime
from erniekit.base.errors import ConfigError, MeshError
from erniekit.cli.arguments import Arguments
from erniekit.cli.machines import Machines, find
from erniekit.cli.supervisor import Rank, supervise
from erniekit.cli.verbs import RANKS
from erniekit.cli.watchdog import PATIENCE, Watchdog, answer_watchdog

_PORT = 29500  # where ranks of several machines meet unless MASTER_PORT says otherwise
LOGS = "ranks"  # in output_dir


class Job:
    """What is started on this machine, out of how much. Raises MeshError for what cannot be."""

    def __init__(self, variables: dict[str, str], *, nproc: int | None, gpus: Sequence[str]) -> None:
        self.gpus = gpus
        self.nproc = nproc if nproc is not None else max(len(gpus), 1)
        self.nodes = _number(variables, "NNODES", 1)
        self.node = _number(variables, "NODE_RANK", 0) if "NODE_RANK" in variables or self.nodes == 1 else None
        self.port = _number(variables, "MASTER_PORT", 0)
        self.address = variables.get("MASTER_ADDR", "")
        problems = []
        if self.nproc < 1:
            problems.append(f"--nproc {self.nproc}: a machine takes part with 1 rank or more.")
        if gpus and self.nproc > len(gpus):
            problems.append(
                f"--nproc {self.nproc}: this machine shows {len(gpus)} GPUs, and every rank needs its own. Start "
                "fewer; CUDA_VISIBLE_DEVICES= (empty) computes on the CPU."
            )
        if self.port >= 2**16:
            problems.append(f"MASTER_PORT={self.port}: ports end at {2**16 - 1}.")
        if self.node is not None and not 0 <= self.node < self.nodes:
            problems.append(f"NODE_RANK={self.node}: with NNODES={self.nodes} it is one of 0 to {self.nodes - 1}.")
        if self.nodes > 1 and not self.address:
            problems.append("MASTER_ADDR is missing: the name of the machine with NODE_RANK=0, as the others reach it.")
        if problems:
            raise MeshError(problems)

    @property
    def world(self) -> int:
        """All ranks of all machines, each of which starts as many."""
        return self.nproc * self.nodes

    def rank(self, local: int) -> int:
        """The number among all of the one that is `local` here; of a machine that knows its number."""
        assert self.node is not None
        return self.node * self.nproc + local


def _number(variables: dict[str, str], name: str, default: int) -> int:
    text = variables.get(name, str(default))
    if not text.isdecimal():
        raise MeshError(f"{name}={text}: a whole number is wanted.")
    return int(text)


def launch(verb: str, arguments: Arguments, words: Sequence[str]) -> int | None:
    """Start `verb` on several ranks and return the job's exit code; None if this process is to do it by itself."""
    place, folder_of_job = runtime.rank_place(), runtime.job_folder()
    if place.world > 1:
        if folder_of_job:
            answer_watchdog(folder_of_job, place.rank)
        if given := [option.name for option in RANKS if arguments.text(option.name)]:
            raise ConfigError(
                f"--{given[0]}: this process is one rank of several already, {place.rank} of {place.world} by its "
                "environment (PADDLE_TRAINERS_NUM or WORLD_SIZE); the launcher that set it says how many there are."
            )
        return None
    job = Job(runtime.job_variables(), nproc=arguments.number("nproc"), gpus=_gpus())
    if job.world == 1 and not job.gpus:
        return None
    logs = _log_folder(verb, arguments, job)
    if job.world == 1:
        return None
    patience = arguments.number("patience")
    with tempfile.TemporaryDirectory(prefix="erniekit-job-") as folder:
        machines = _find_others(job)
        logs = logs or Path(tempfile.mkdtemp(prefix="erniekit-ranks-"))  # stays: a message may name a log in it
        ranks = [
            Rank(
                job.rank(local), [sys.executable, "-m", "erniekit", verb, *_for_ranks(words)],
                environment=runtime.environment_of_rank(_variables(job, local, machines=machines), folder=Path(folder)),
                log=logs / f"rank-{job.rank(local)}.log" if job.rank(local) else None,
            )
            for local in range(job.nproc)
        ]  # fmt: skip
        watch = Watchdog(Path(folder), seconds=PATIENCE if patience is None else patience)
        return supervise(ranks, folder=Path(folder), world=job.world, watch=watch, machines=machines)


def _for_ranks(words: Sequence[str]) -> list[str]:
    """The user's words without what is meant for the launcher."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_ours = name in [f"--{option.name}" for option in RANKS]
        if not skip and not is_ours:
            kept.append(word)
        skip = is_ours and not equals
    return kept


def _gpus() -> list[str]:
    """The GPUs, one for each rank, by their number among the visible ones; none without a GPU build of Paddle."""
    from erniekit.base.packages import version
    from erniekit.base.resources import gpus

    if version("paddlepaddle-gpu") is None:
        return []
    named = runtime.visible_gpus()
    return [str(number) for number in range(len(gpus() if named is None else named))]


def _log_folder(verb: str, arguments: Arguments, job: Job) -> Path | None:
    """Where the ranks write their logs: where the user says, or in output_dir; None if the config has none. Raises
    ConfigError for a config that every rank would refuse."""
    if verb == "reproduce":
        from erniekit.training.lock import place_of_repetition, read_lock

        lock = read_lock(Path(arguments.places[0]))
        return runtime.log_folder() or place_of_repetition(lock, arguments.text("out")) / LOGS
    from erniekit.cli.runs import config_to_ask, config_to_export
    from erniekit.config.load import load_config
    from erniekit.config.readiness import require_ready

    place = arguments.places[0]
    given = {"export": config_to_export, "eval": config_to_ask}.get(verb)
    config = given(arguments) if given else load_config(place, arguments.overrides)
    if verb != "export" or not Path(place).is_dir():  # of a folder nothing else is wanted
        require_ready(config, verb, world=job.world, cards=len(job.gpus))
    if folder := runtime.log_folder():
        return folder
    return Path(config.train.output_dir) / LOGS if config.train.output_dir else None


def _find_others(job: Job) -> Machines:
    """The machines of the job, when all are there. Raises MeshError."""
    if job.nodes == 1:
        return Machines.alone(job.port)
    machines = find(job.address, job.port or _PORT, node=job.node, nodes=job.nodes, nproc=job.nproc)
    job.node = machines.number
    return machines


def _variables(job: Job, local: int, *, machines: Machines) -> dict[str, str]:
    """What `paddle.distributed.launch` tells a rank of its place."""
    rank, first_port = job.rank(local), int(machines.master.rpartition(":")[2]) + 1
    endpoints = [f"{machines.hosts[other // job.nproc]}:{first_port + other}" for other in range(job.world)]
    device = {"FLAGS_selected_gpus": job.gpus[local]} if job.gpus else {"PADDLE_DISTRI_BACKEND": "gloo"}
    return device | {
        "PADDLE_MASTER": machines.master,
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(job.world),
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_GLOBAL_SIZE": str(job.world),
        "PADDLE_LOCAL_RANK": str(local),
        "PADDLE_RANK_IN_NODE": str(local),
        "PADDLE_LOCAL_SIZE": str(job.nproc),
        "PADDLE_NNODES": str(job.nodes),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
    }

"""`reproduce`: a run once more from its run.lock.yaml, and whether the same came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from erniekit.base import runtime
from erniekit.base.console import warn
from erniekit.base.errors import ConfigError, DataError, ErnieKitError, MeshError, listed
from erniekit.training.lock import changed_files, changed_surroundings, compare, place_of_repetition, read_lock

BOUND = 1e-3  # largest difference of a loss, as a share, that other packages or machines may make

# What a repetition does not take over: it has a place of its own and tells nobody.
_OWN = {
    "overwrite_output_dir": False, "resume_from_checkpoint": None, "resume_anyway": False, "logging_dir": None,
    "report_to": None, "metrics_output_path": None,
}  # fmt: skip


def reproduce(
    lock_file: str | Path, *, train: Callable[..., Any], out: str | None = None, bound: float = BOUND
) -> float:
    """Repeat the run by `train(mapping of keys)` into `out` (None: beside the old one) and compare the losses.

    Returns the largest difference, 0.0 for a bit-equal run. Raises DataError if data or model are other ones, MeshError
    for another number of ranks, and ErnieKitError if the losses differ by more than `bound`.
    """
    lock = read_lock(Path(lock_file))
    if not lock["losses"]:
        raise ConfigError(f"{lock_file}: holds no losses: its run did not finish, there is nothing to compare with.")
    ranks, world = lock.get("ranks", 1), runtime.rank_place().world
    if ranks != world:
        raise MeshError(
            f"{lock_file}: its run was one of {ranks} ranks, this would be one of {world}, with other rows in a step. "
            f"Start as many: --nproc {ranks} (or as many on several machines)."
        )
    if problems := changed_files(lock):
        raise DataError(["the run cannot be repeated, its data or model are not the same:", *listed(problems)])
    for line in changed_surroundings(lock):
        warn(f"not as it was, {line}")
    result = train({**lock["config"], **_OWN, "output_dir": str(place_of_repetition(lock, out))})
    losses = [row["loss"] for row in result.history if "loss" in row]
    count, worst = compare(lock["losses"], losses)
    if len(losses) != len(lock["losses"]):
        raise ErnieKitError(f"not reproduced: {len(losses)} steps were taken, {len(lock['losses'])} then.")
    if worst == 0:
        print(f"reproduced: the losses of all {count} steps are bit-equal.", flush=True)
    elif worst <= bound:
        print(f"reproduced: {count} losses differ by at most {worst:.2e} of their value (bound {bound:g}).", flush=True)
    else:
        raise ErnieKitError(
            f"not reproduced: a loss differs by {worst:.2e} of its value, more than the bound {bound:g}. "
            "Packages and machine that are not as they were are named above."
        )
    return worst

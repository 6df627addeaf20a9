"""Runs of several ranks without a launcher: forked processes that are told their places as a launcher tells them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from erniekit.base.errors import ErnieKitError
from erniekit.base.runtime import Place
from erniekit.recipes import train
from tests.parallel.ranks import Started


def run_ranked(
    config: Path, world: int, overrides: Mapping[str, Any], *, prepare: Callable[[int], Any] = lambda _: None,
    recipe: Callable[..., Any] = train, seconds: float = 60,
) -> list[str]:  # fmt: skip
    """What the run ended with on each rank: nothing, or the name of an error and what it says. `prepare` is called with
    each rank's number, in its process; overrides that it returns are of this rank only."""
    return start_ranked(config, world, overrides, prepare=prepare, recipe=recipe).results(seconds)


def start_ranked(
    config: Path, world: int, overrides: Mapping[str, Any], *, prepare: Callable[[int], Any] = lambda _: None,
    recipe: Callable[..., Any] = train,
) -> Started:  # fmt: skip
    """The same, in the background."""
    return Started(_run, world, config, dict(overrides), prepare, recipe)


def _run(
    place: Place, config: Path, overrides: dict[str, Any], prepare: Callable[[int], Any], recipe: Callable[..., Any]
) -> str:
    variables = {"PADDLE_TRAINERS_NUM": place.world, "PADDLE_TRAINER_ID": place.rank, "PADDLE_MASTER": place.master}
    os.environ.update({name: str(value) for name, value in variables.items()})
    overrides |= prepare(place.rank) or {}
    try:
        recipe(config, **overrides)
    except (ErnieKitError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def log_of(out: Path) -> list[dict[str, Any]]:
    """The rows that a run has logged."""
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]

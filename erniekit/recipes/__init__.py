"""Composition roots: one per verb or stage. They do not know each other; `train` picks one by the config's stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erniekit.base.runtime import keeping_sigterm, rank_place
from erniekit.config.load import load_config
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.readiness import require_ready
from erniekit.config.run import RunConfig

if TYPE_CHECKING:
    from erniekit.training.session import TrainResult


def train(config: RunConfig | Mapping[str, Any] | str | Path, **overrides: Any) -> TrainResult:
    """Run the training that a config (a file, a mapping of keys, or a resolved one) describes.

    `overrides` are keys of the config. Raises ErnieKitError for anything that the user can mend.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    require_ready(config, "train", world=rank_place().world)
    with keeping_sigterm():  # Paddle loads here, after the config was judged
        if config.model.stage in PREFERENCE_STAGES:
            from erniekit.recipes.preference import train_on_preferences as run
        else:
            from erniekit.recipes.sft import train_language_model as run
    return run(config)

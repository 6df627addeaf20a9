"""The verbs that run a model: `train`, `eval`, `export`, `chat`. They read the config, judge whether it is ready, and
hand it to a recipe, which says its notices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from erniekit.base import runtime
from erniekit.base.errors import ConfigError
from erniekit.cli.arguments import LAYOUTS, Arguments
from erniekit.config.hubs import is_repository
from erniekit.config.load import load_config
from erniekit.config.readiness import require_built

if TYPE_CHECKING:
    from erniekit.config.run import RunConfig
    from erniekit.recipes.export import Several
    from erniekit.recipes.quantise import Settings


def train(arguments: Arguments) -> None:
    """Train as the config says."""
    config = load_config(arguments.places[0], arguments.overrides)
    from erniekit import recipes

    recipes.train(config)


def config_to_ask(arguments: Arguments) -> RunConfig:
    """The config of a verb that asks a model something; a folder or a repository stands for the model in it."""
    place = arguments.places[0]
    return load_config({"model_name_or_path": place} if _is_model(place) else place, arguments.overrides)


def config_to_export(arguments: Arguments) -> RunConfig:
    """The config of an export; with --quantize a folder stands for the model in it. Raises ConfigError."""
    place = arguments.places[0]
    if not os.path.isdir(place):
        return load_config(place, arguments.overrides)
    if "quantize" not in arguments.values:
        raise ConfigError(
            f"{place}: is a folder; `export` takes the YAML file of a run. Of a model folder, `erniekit convert` "
            "changes the layout and --quantize KIND makes one in few bits."
        )
    if arguments.number("checkpoint") is not None:
        raise ConfigError(f"--checkpoint takes one of a run; {place} is a folder: name {place}/checkpoint-N itself.")
    return load_config({"model_name_or_path": place}, arguments.overrides)


def _is_model(place: str) -> bool:
    return os.path.isdir(place) or is_repository(place)


def evaluate(arguments: Arguments) -> None:
    """Evaluate the model of the config, or of a folder."""
    config = config_to_ask(arguments)
    with runtime.keeping_sigterm():
        from erniekit.recipes.evaluate import evaluate

    evaluate(config, reference=arguments.text("reference"))


def export(arguments: Arguments) -> None:
    """Write the trained model as a folder to deploy; files stream into files, which one of several ranks does."""
    config, place = config_to_export(arguments), Path(arguments.places[0])
    if runtime.rank_place().rank:
        return
    if settings := _quantised(arguments):
        with runtime.keeping_sigterm():
            from erniekit.recipes.quantise import quantise

        out, folder = arguments.text("out"), place if place.is_dir() else None
        quantise(config, settings, folder=folder, out=Path(out) if out else None, step=arguments.number("checkpoint"))
        return
    with runtime.keeping_sigterm():
        from erniekit.recipes.export import export

    export(
        config,
        to=arguments.one_of("to", LAYOUTS),
        out=arguments.text("out"),
        step=arguments.number("checkpoint"),
        adapter_only="adapter" in arguments.flags,
        several=_several(arguments),
    )


def _quantised(arguments: Arguments) -> Settings | None:
    """What follows --quantize; raises ConfigError for options that do not go together."""
    kind, given = arguments.text("quantize"), {*arguments.values, *arguments.flags}
    if kind is None:
        alone = sorted(given & {"group-size", "int4-layers", "search", "calibration", "calibration-tokens"})
        if alone:
            raise ConfigError(f"--{alone[0]} is about --quantize KIND; name the format, or leave it out.")
        return None
    problems = [
        f"--quantize and --{name} exclude each other: {why}"
        for name, why in (
            ("adapter", "an adapter stays as it is; without --adapter it is merged on the way."),
            ("merge", "merge first (erniekit export CFG --merge ...), then quantise that folder."),
        )
        if name in given
    ]
    if arguments.text("to") not in (None, "paddle"):
        problems.append("--quantize writes the -Paddle form only; leave --to out.")
    if problems:
        raise ConfigError(problems)
    from erniekit.recipes.quantise import CALIBRATION_TOKENS, Settings

    tokens = arguments.number("calibration-tokens")
    return Settings(
        kind, arguments.number("group-size"), arguments.number("int4-layers"),
        tuple(arguments.values.get("calibration", ())), CALIBRATION_TOKENS if tokens is None else tokens,
        arguments.text("search"),
    )  # fmt: skip


def _several(arguments: Arguments) -> Several | None:
    """The adapters behind --merge; raises ConfigError."""
    from erniekit.checkpoint.merge import METHODS
    from erniekit.recipes.export import Several

    words = arguments.values.get("merge", [])
    alone = [name for name in ("method", "density") if name in arguments.values and not words]
    if alone or (words and ("adapter" in arguments.flags or "checkpoint" in arguments.values)):
        raise ConfigError(
            f"--{alone[0]} says how --merge does it; name the adapters: --merge DIR=0.7 DIR=0.3" if alone
            else "--merge takes the adapters that it names into one model; leave --adapter and --checkpoint out."
        )  # fmt: skip
    if not words:
        return None
    parts = [word.rpartition("=") for word in words]
    adapters = tuple((Path(path), _number(f"--merge {path}", weight)) for path, _, weight in parts)
    density = _number("--density", arguments.text("density") or "0.5")
    return Several(adapters, arguments.one_of("method", METHODS), density)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: '{text}' is not a number; --merge takes DIR=0.7 DIR=0.3") from None


def chat(arguments: Arguments) -> None:
    """Talk to a model folder, or to the model of a config."""
    place = arguments.places[0]
    config = config_to_ask(arguments)
    require_built(config, "chat")
    from erniekit.checkpoint.download import locate_model
    from erniekit.recipes.chat import chat

    chat(config, folder=locate_model(place, config.model.download_hub) if _is_model(place) else None)

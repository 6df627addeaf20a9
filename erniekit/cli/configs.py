"""The verbs `check` and `show`: what a config file says, without acting on it."""

from __future__ import annotations

from erniekit.base.errors import ConfigError
from erniekit.cli.arguments import Arguments
from erniekit.config import readiness
from erniekit.config.load import load_config
from erniekit.config.run import KEYS, RunConfig
from erniekit.config.values import text_of


def check(arguments: Arguments) -> None:
    """Print what is wrong, what is not built and what cannot be judged on this machine."""
    config = load_config(arguments.places[0], arguments.overrides)
    if "files" in arguments.flags and (absent := readiness.absent_files(config)):
        raise ConfigError(absent)
    if problems := readiness.layout_problems(config):
        raise ConfigError(problems)
    for text in config.notices:
        print(f"note: {text}")
    _print_list("not built yet in this version; `train` refuses it:", readiness.not_built(config))
    _print_list("not checked here:", readiness.not_checked_here(config))
    print(f"{arguments.places[0]}: fine")


def _print_list(title: str, lines: list[str]) -> None:
    if lines:
        print("\n  ".join([title, *lines]))


def show(arguments: Arguments) -> None:
    """Print every key with its value and where the value stands."""
    config = load_config(arguments.places[0], arguments.overrides)
    rows = [
        (name, _shown(config, name), config.origins[name])
        for name in KEYS
        if "changed" not in arguments.flags or config.given(name)
    ]
    widths = [min(max((len(row[column]) for row in rows), default=0), 48) for column in (0, 1)]
    for name, value, origin in rows:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}")


def _shown(config: RunConfig, name: str) -> str:
    value = config.value(name)
    return "(secret)" if KEYS[name].secret and value else text_of(value)

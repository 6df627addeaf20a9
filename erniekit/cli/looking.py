"""The verbs that look at what a run trains on and at a run that was: `preview`, `replay` and `reproduce`."""

from __future__ import annotations

import sys

from erniekit.base import runtime
from erniekit.base.errors import ConfigError
from erniekit.cli.arguments import Arguments
from erniekit.config.load import load_config


def preview(arguments: Arguments) -> None:
    """Show training samples."""
    config = load_config(arguments.places[0], arguments.overrides)
    from erniekit.recipes.preview import preview

    rows, ranks = arguments.number("rows"), arguments.number("nproc")
    preview(
        config, step=arguments.number("step"), rows=3 if rows is None else rows, html=arguments.text("html"),
        ranks=1 if ranks is None else ranks, color=sys.stdout.isatty() and not runtime.no_color(),
    )  # fmt: skip


def replay(arguments: Arguments) -> None:
    """Look into a kept step."""
    from erniekit.recipes.replay import replay

    replay(arguments.places[0])


def reproduce(arguments: Arguments) -> None:
    """Repeat a run."""
    from erniekit import recipes
    from erniekit.recipes.reproduce import BOUND, reproduce

    text = arguments.text("bound")
    try:
        bound = BOUND if text is None else float(text)
    except ValueError:
        raise ConfigError(f"--bound: '{text}' is not a number") from None
    reproduce(arguments.places[0], train=recipes.train, out=arguments.text("out"), bound=bound)

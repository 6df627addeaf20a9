"""The verbs `help` and `version`. They must answer at once: nothing is loaded here."""

from __future__ import annotations

from erniekit.base.errors import ConfigError, did_you_mean
from erniekit.cli.arguments import Arguments
from erniekit.cli.verbs import VERBS
from erniekit.version import __version__


def version(_: Arguments) -> None:
    """Print the version."""
    print(f"erniekit {__version__}")


def help(arguments: Arguments) -> None:  # noqa: A001 - the verb's name
    """Print what the command or one verb can do."""
    if arguments.places:
        name = arguments.places[0]
        if name not in VERBS:
            raise ConfigError(f"unknown verb '{name}'.{did_you_mean(name, VERBS)}")
        print(VERBS[name].help())
        return
    print(f"erniekit {__version__}: train ERNIE 4.5 models with PaddlePaddle\n\nusage: erniekit VERB ...\n")
    for verb in VERBS.values():
        print(f"  {' '.join((verb.name, *verb.places)):18} {verb.summary}")
    print("\nerniekit VERB -h says more about one of them. Keys of a config file: docs/keys.md")

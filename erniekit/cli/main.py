"""The command `erniekit`: finds the verb, runs it, and turns what happens into an exit code.

0 done, 1 our own failure (with a traceback), 2 something that the user can correct (without one), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from erniekit.base.errors import ConfigError, ErnieKitError, did_you_mean
from erniekit.cli.arguments import Arguments, split
from erniekit.cli.verbs import LATER, VERBS, Verb

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Without `argv`, the process's own words are taken."""
    try:
        _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # so that a closed pipe shows here
    except ErnieKitError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
    except Exception:  # noqa: BLE001 - the one place where a mistake of ours ends: told in full, with a way on
        import traceback

        traceback.print_exc()
        print("This is a mistake in erniekit. Please report it with the output of `erniekit env`.", file=sys.stderr)
        return FAILED
    return DONE


def _run(words: Sequence[str]) -> None:
    name, rest = (words[0], words[1:]) if words else ("help", [])
    name = {"-h": "help", "--help": "help", "--version": "version"}.get(name, name)
    if name in LATER:
        raise ConfigError(f"the verb '{name}' is not built in this version of erniekit")
    if name not in VERBS:
        raise ConfigError(f"unknown verb '{name}'.{did_you_mean(name, [*VERBS, *LATER])} `erniekit help` lists them.")
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        print(verb.help())
        return
    arguments = split(verb, rest)
    if verb.needs_paddle:
        _prepare_paddle()
    _function(verb)(arguments)


def _function(verb: Verb) -> Callable[[Arguments], None]:
    from importlib import import_module

    module, function = verb.home.split(":")
    return getattr(import_module(f"erniekit.cli.{module}"), function)


def _prepare_paddle() -> None:
    """Refuse early where there is no Paddle, and give it the environment that it is fast in."""
    from importlib.util import find_spec

    from erniekit.base import runtime

    if find_spec("paddle") is None:
        raise ErnieKitError(
            "PaddlePaddle is not installed. For a CPU: pip install 'erniekit-paddle[cpu]'; for a GPU see README.md."
        )
    runtime.prepare()

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
_OUR_MISTAKE = "This is a mistake in erniekit. Please report it with the output of `erniekit env`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Without `argv`, the process's own words are taken."""
    words, code = sys.argv[1:] if argv is None else argv, DONE
    try:
        code = _run(words)
        sys.stdout.flush()  # so that a closed pipe shows here
    except ErnieKitError as error:
        _last_words(words, "".join(f"error: {problem}\n" for problem in error.problems))
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
    except Exception:  # noqa: BLE001 - the one place where a mistake of ours ends: told in full, with a way on
        import traceback

        _last_words(words, f"{traceback.format_exc()}{_OUR_MISTAKE}\n")
        return FAILED
    return code


def _last_words(words: Sequence[str], text: str) -> None:
    """Say why the process ends. A rank of several leaves that to the supervisor, who knows which rank was first; all
    but rank 0, which has the terminal, say it in their logs as well."""
    folder = None
    if words and words[0] in VERBS and VERBS[words[0]].takes_ranks:
        from erniekit.base import runtime

        folder = runtime.job_folder()
    if folder:
        from erniekit.cli.supervisor import words_file

        words_file(folder, runtime.rank_place().rank).write_text(text, encoding="utf-8")
    if not folder or runtime.rank_place().rank:
        print(text, end="", file=sys.stderr)


def _run(words: Sequence[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("help", [])
    name = {"-h": "help", "--help": "help", "--version": "version"}.get(name, name)
    if name in LATER:
        raise ConfigError(f"the verb '{name}' is not built in this version of erniekit")
    if name not in VERBS:
        raise ConfigError(f"unknown verb '{name}'.{did_you_mean(name, [*VERBS, *LATER])} `erniekit help` lists them.")
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        print(verb.help())
        return DONE
    arguments = split(verb, rest)
    if verb.needs_paddle:
        _require_paddle()
    if verb.takes_ranks:
        from erniekit.cli.launch import launch

        code = launch(name, arguments, rest)
        if code is not None:
            return code
    if verb.needs_paddle:
        from erniekit.base import runtime

        runtime.prepare()
    _function(verb)(arguments)
    return DONE


def _function(verb: Verb) -> Callable[[Arguments], None]:
    from importlib import import_module

    module, function = verb.home.split(":")
    return getattr(import_module(f"erniekit.cli.{module}"), function)


def _require_paddle() -> None:
    """Refuse early where there is no Paddle."""
    from importlib.util import find_spec

    if find_spec("paddle") is None:
        raise ErnieKitError(
            "PaddlePaddle is not installed. For a CPU: pip install 'erniekit-paddle[cpu]'; for a GPU see README.md."
        )

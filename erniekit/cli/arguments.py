"""The words behind a verb, sorted into places, overrides and options. Knows how to split them, not what they mean."""

from __future__ import annotations

from collections.abc import Sequence

from erniekit.base.errors import ConfigError, did_you_mean
from erniekit.cli.verbs import Option, Verb

LAYOUTS = ("pt", "paddle")


class Arguments:
    """What the user wrote behind a verb."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.overrides: list[str] = []
        self.flags: set[str] = set()
        self.values: dict[str, list[str]] = {}

    def text(self, name: str) -> str | None:
        """The value of an option."""
        return self.values[name][-1] if name in self.values else None

    def number(self, name: str) -> int | None:
        """The value of an option as a whole number."""
        text = self.text(name)
        try:
            return None if text is None else int(text)
        except ValueError:
            raise ConfigError(f"--{name}: '{text}' is not a whole number") from None

    def one_of(self, name: str, known: Sequence[str]) -> str:
        """The value of an option that takes one of a few words, the first by default."""
        text = self.text(name) or known[0]
        if text not in known:
            raise ConfigError(f"--{name}: '{text}' is not known. Known: {', '.join(known)}.")
        return text


def split(verb: Verb, words: Sequence[str]) -> Arguments:
    """Sort the words behind `verb`; raises ConfigError naming every one that does not fit."""
    found, problems, rest = Arguments(), [], list(words)
    options = {option.name: option for option in verb.options}
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and len(word) > 1:
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or name not in options:
                problems.append(_unknown(verb, word, name))
            elif problem := _take(options[name], [value] if equals else None, rest, found):
                problems.append(problem)
        elif verb.overrides and "=" in word:
            found.overrides.append(word)
        else:
            found.places.append(word)
    wanted = [place for place in verb.places if not place.startswith("[")]
    missing = wanted[len(found.places) :]
    missing += [option.usage for option in verb.options if option.required and option.name not in found.values]
    problems += [f"{word} is missing" for word in missing]
    problems += [f"'{word}' is one word too many" for word in found.places[len(verb.places) :]]
    if problems:
        problems[-1] += f"\nusage: erniekit {verb.usage}"
        raise ConfigError(problems)
    return found


def _take(option: Option, values: list[str] | None, rest: list[str], found: Arguments) -> str:
    """Move an option and its values into `found`; returns what is wrong, if anything."""
    if not option.metavar:
        found.flags.add(option.name)
        return f"--{option.name} takes no value" if values else ""
    if values is None:
        values = []
        while rest and not rest[0].startswith("--") and (option.many or not values):
            values.append(rest.pop(0))
    if not values:
        return f"--{option.name} wants {option.metavar}"
    if option.name in found.values and not option.many:
        return f"--{option.name} is given twice"
    found.values.setdefault(option.name, []).extend(values)
    return ""


def _unknown(verb: Verb, word: str, name: str) -> str:
    hint = did_you_mean(name, [option.name for option in verb.options])
    if not hint and verb.overrides:
        hint = " Settings are written key=value, without dashes."
    return f"unknown option '{word.partition('=')[0]}'.{hint}"

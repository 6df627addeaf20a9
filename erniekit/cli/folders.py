"""The verbs on checkpoint folders: `convert`, `verify`, `init`. They never load paddle."""

from __future__ import annotations

from pathlib import Path

from erniekit.base.errors import CheckpointError
from erniekit.cli.arguments import LAYOUTS, Arguments


def convert(arguments: Arguments) -> None:
    """Write a checkpoint in the other layout."""
    from erniekit.checkpoint.convert import convert

    source, target = (Path(place) for place in arguments.places)
    convert(source, target, to=arguments.one_of("to", LAYOUTS))
    print(f"{target}: written")


def verify(arguments: Arguments) -> None:
    """Judge a checkpoint folder."""
    from erniekit.checkpoint.verify import verify

    folder = Path(arguments.places[0])
    if problems := verify(folder):
        raise CheckpointError(problems)
    print(f"{folder}: fine")


def init(arguments: Arguments) -> None:
    """Write a model with random weights."""
    from erniekit.checkpoint.create import create

    out = Path(arguments.values["out"][-1])
    create(
        arguments.values["family"][-1],
        out,
        seed=arguments.number("seed") or 0,
        layout=arguments.one_of("layout", LAYOUTS),
        dtype=arguments.one_of("dtype", ("bfloat16", "float32")),
        vocab_size=arguments.number("vocab-size"),
        tokenizer=arguments.text("tokenizer"),
        tokenizer_texts=arguments.values.get("train-tokenizer", ()),
    )
    print(f"{out}: written")

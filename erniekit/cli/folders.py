"""The verbs on checkpoint folders: `convert`, `split`, `resize-vocab`, `verify`, `init`. They never load paddle."""

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


def split(arguments: Arguments) -> None:
    """Write a checkpoint in files of another size."""
    from erniekit.checkpoint.chosen import trained_model
    from erniekit.checkpoint.save import GB
    from erniekit.checkpoint.split import parse_size, split
    from erniekit.config.load import load_config

    place, size = arguments.places[0], arguments.text("max-shard-size")
    is_folder = Path(place).is_dir()
    config = load_config({} if is_folder else place, arguments.overrides)
    source = Path(place) if is_folder else trained_model(config)
    target = Path(arguments.text("out") or source / "split_export")
    most = parse_size(size) if size else config.export.max_shard_size * GB
    print(f"{target}: {split(source, target, max_shard_bytes=most)} file(s) written")


def resize_vocab(arguments: Arguments) -> None:
    """Add tokens to a model and its tokenizer."""
    from erniekit.checkpoint.resize import resize_vocab
    from erniekit.data.added_tokens import read_words

    source = Path(arguments.places[0])
    target = Path(arguments.text("out") or f"{source}-resized")
    words = read_words(arguments.values["add-tokens"])
    done = resize_vocab(source, target, words=words, pad_to_multiple=arguments.number("pad-to-multiple"))
    for word, index in done.ids.items():
        print(f"{index:8} {word}")
    print(f"{target}: written; vocab_size {done.old_size} -> {done.new_size}")


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

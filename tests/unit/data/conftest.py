"""Tokenizers that are trained on the spot, real text, and files to read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import chatterbot_corpus
import pytest
import sentencepiece
import yaml

from erniekit.data.tokenizer import Tokenizer
from erniekit.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """A few thousand real lines, English and Chinese."""
    folder = Path(chatterbot_corpus.__file__).parent / "data"
    files = [*sorted((folder / "english").glob("*.yml"))[:4], *sorted((folder / "chinese").glob("*.yml"))[:4]]
    talks = [talk for file in files for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]]
    return [line for talk in talks for text in talk for line in str(text).splitlines() if line.strip()]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 2,000 pieces."""
    return train_tokenizer(corpus, tmp_path_factory.mktemp("tokenizer"), vocab_size=2000)


@pytest.fixture(scope="session")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that knows the letter ~ only and spells everything else in bytes, so that ids can be told by hand."""
    return train_tokenizer(["~"], tmp_path_factory.mktemp("bytewise"), vocab_size=290)


@pytest.fixture(scope="session")
def train_model(corpus: list[str]) -> Callable[..., bytes]:
    """Make the bytes of a tokenizer.model with other options than ours."""

    def train(**options: object) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            **{
                "model_type": "bpe",
                "vocab_size": 2000,
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "add_dummy_prefix": False,
                "minloglevel": 2,
                **options,
            },
        )
        return model.getvalue()

    return train


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a .jsonl file and return its path; a `str` is written as it is."""

    def write(name: str, rows: list[object]) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write

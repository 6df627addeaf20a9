"""Make the quickstart's data from conversations that come with two PyPI packages: chatterbot-corpus (questions and
answers, English and Chinese) and chitchat-dataset (dialogues between people, English).

Writes into the folder named on the command line: train.jsonl and eval.jsonl (erniekit SFT rows) and
pretrain-train.jsonl and pretrain-eval.jsonl (the same conversations as plain text). A conversation belongs to the eval
set if a hash of its first question says so: the same question never stands on both sides, and a second run writes the
same bytes. Knows nothing of tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

import chitchat_dataset
import yaml
from chatterbot_corpus.corpus import DATA_DIRECTORY

PACKAGES = ("chatterbot-corpus", "chitchat-dataset")
LANGUAGES = ("english", "chinese")
SIDES = ("train", "eval")
EVAL_SHARE = 0.03
MAX_TURNS, MAX_CHARACTERS = 6, 160  # of a dialogue, counted from its beginning; a small model learns short turns first


def conversations() -> Iterator[list[str]]:
    """All conversations that hold at least one question and its answer: pairs of turns, blanks tidied."""
    for turns in (*questions(), *dialogues()):
        said = [" ".join(turn.split()) for turn in turns]
        said = said[: len(said) // 2 * 2]  # a last question without an answer teaches nothing
        if said and all(said):
            yield said


def questions() -> Iterator[list[str]]:
    """The conversations of chatterbot-corpus, in file order."""
    for language in LANGUAGES:
        for path in sorted((Path(DATA_DIRECTORY) / language).glob("*.yml")):
            for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                if not isinstance(turns, list):  # one entry of trivia.yml is a bare string
                    continue
                yield [str(turn) for turn in turns]


def dialogues() -> Iterator[list[str]]:
    """The beginnings of the dialogues of chitchat-dataset: what one person says in a row is one turn."""
    for dialogue in chitchat_dataset.Dataset().values():
        turns = (" ".join(message["text"] for message in turn) for turn in dialogue["messages"])
        yield list(takewhile(lambda turn: 0 < len(turn) <= MAX_CHARACTERS, turns))[:MAX_TURNS]


def lot(text: str) -> float:
    """A number in [0, 1) that the letters of `text` draw: the lot of the first question decides the side."""
    letters = "".join(char for char in text.casefold() if char.isalnum())
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:4], "big") / 2**32


def write_rows(path: Path, rows: list[dict]) -> bool:
    """Write jsonl; returns False if the file already holds exactly these rows."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.is_file() and path.read_bytes() == content:
        return False
    path.write_bytes(content)
    return True


def main(folder: Path) -> None:
    """Write the four files and say what was written or reused."""
    folder.mkdir(parents=True, exist_ok=True)
    distinct = sorted(dict.fromkeys(tuple(said) for said in conversations()), key=lambda said: lot("".join(said)))
    sides = {side: [said for said in distinct if (lot(said[0]) < EVAL_SHARE) == (side == "eval")] for side in SIDES}
    new = []
    for side, chosen in sides.items():
        dialogues = [{"src": said[0::2], "tgt": said[1::2]} for said in chosen]
        texts = [{"text": "\n".join(said)} for said in chosen]
        new += [write_rows(folder / f"{side}.jsonl", dialogues), write_rows(folder / f"pretrain-{side}.jsonl", texts)]
    counts = ", ".join(f"{len(chosen)} {side}" for side, chosen in sides.items())
    print(f"{'wrote' if any(new) else 'reusing'} {folder}: {counts} conversations", end=" of ")
    print(*(f"{package} {version(package)}" for package in PACKAGES), sep=" and ")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: quickstart_data.py FOLDER")
    main(Path(sys.argv[1]))

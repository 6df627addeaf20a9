"""Training a tokenizer: fixed ids, no unknowns, the same bytes every time, nothing said without need."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erniekit.base.errors import DataError
from erniekit.data.tokenizer import Tokenizer
from erniekit.data.tokenizer_training import SPECIAL, train_tokenizer

FILES = ["special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_fixed_ids(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(index) for index in range(285)]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:13] == list("0123456789")
    assert pieces[13:15] == ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    assert pieces[13:29] == list(SPECIAL)
    assert (pieces[29], pieces[39], pieces[284]) == ("<0x00>", "<0x0A>", "<0xFF>")  # "\n" is <0x0A> as in ERNIE
    assert tokenizer.vocab_size == 2000


def test_text_never_becomes_unknown_and_line_ends_stand_alone(tokenizer: Tokenizer, corpus: list[str]) -> None:
    text = "\n".join(corpus) + "\n\t𝔘nseen: ж ☃ 罕"
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id not in ids
    assert ids.count(39) == text.count("\n")
    assert not any("\n" in tokenizer.piece(index) for index in range(tokenizer.vocab_size))
    assert len(ids) < len(text.encode()) / 2  # it has learnt something


def test_the_same_text_gives_the_same_bytes_in_any_process(corpus: list[str], root: Path, tmp_path: Path) -> None:
    train_tokenizer(corpus, tmp_path / "here", vocab_size=1000)
    (tmp_path / "text.json").write_text(json.dumps(corpus), encoding="utf-8")
    program = (
        "import json, pathlib\nfrom erniekit.data.tokenizer_training import train_tokenizer\n"
        "folder = pathlib.Path('.')\ntexts = json.loads((folder / 'text.json').read_text(encoding='utf-8'))\n"
        "train_tokenizer(texts, folder / 'there', vocab_size=1000)"
    )
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert list(digests(tmp_path / "here")) == FILES


def test_files_give_the_same_as_their_texts(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    rows = [{"src": ["how are you", "and now"], "tgt": ["fine thanks", "fine\ntoo"], "label": [1, 0]}, {"text": "end"}]
    (tmp_path / "plain.txt").write_bytes("\ufeffone two\r\n\r\nthree".encode())
    train_tokenizer([Path(write_jsonl("a.jsonl", rows)), tmp_path / "plain.txt"], tmp_path / "files", vocab_size=340)
    texts = ["how are you", "and now", "fine thanks", "fine", "too", "end", "one two", "three"]
    train_tokenizer(texts, tmp_path / "texts", vocab_size=340)
    assert digests(tmp_path / "files") == digests(tmp_path / "texts")


def test_nothing_is_printed_unless_the_text_is_too_short(root: Path, tmp_path: Path) -> None:
    program = (  # a process of its own: sentencepiece's log level is set once for all
        "import sys\nfrom erniekit.data.tokenizer_training import train_tokenizer\n"
        f"train_tokenizer(['some words and others'] * 9, {str(tmp_path)!r}, vocab_size=int(sys.argv[1]))"
    )

    def said(vocab_size: int) -> str:
        command = [sys.executable, "-c", program, str(vocab_size)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    assert said(300) == ""
    notice = said(8192)
    size = Tokenizer.from_folder(tmp_path).vocab_size
    assert notice == f"note: {tmp_path}: the text is enough for {size} pieces, not for vocab_size 8192.\n"
    assert 300 < size < 340


def test_rare_characters_give_way_when_the_vocabulary_is_small(corpus: list[str], tmp_path: Path) -> None:
    assert len({char for line in corpus for char in line}) > 400
    tokenizer = train_tokenizer(corpus, tmp_path, vocab_size=400)
    assert tokenizer.vocab_size == 400
    text = "".join(corpus)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_and_reserved_characters_are_learnt_from(tmp_path: Path) -> None:
    for text in ("zebra " * 2000, "zebra▅zebra", "zebra\tzebra\0zebra", "zebra▁▁zebra"):
        tokenizer = train_tokenizer([text], tmp_path, vocab_size=400)
        pieces = {tokenizer.piece(index) for index in range(285, tokenizer.vocab_size)}
        assert {"zebra", "▁zebra"} & pieces
        assert "▁▁" not in pieces


def test_what_cannot_be_trained_on(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", "\n"], tmp_path / "t")
    with pytest.raises(DataError, match=r"vocab_size 286 is too small.*285 pieces"):
        train_tokenizer(["text"], tmp_path / "t", vocab_size=286)
    with pytest.raises(DataError, match=r"absent\.txt: there is no such file"):
        train_tokenizer([tmp_path / "absent.txt"], tmp_path / "t")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON"):
        train_tokenizer([Path(write_jsonl("bad.jsonl", [{"text": "a"}, "{"]))], tmp_path / "t")
    assert not (tmp_path / "t").exists()

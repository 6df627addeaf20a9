"""The tokenizer: sentencepiece's ids exactly, special tokens only where they are allowed, text back without loss."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from erniekit.base.errors import DataError
from erniekit.data.tokenizer import StreamDecoder, Tokenizer
from erniekit.data.tokenizer_training import SPECIAL

TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\ta\r\n",
    "你好，世界！ 1+1=2",
    "emoji 😀👩‍👩‍👧 and ünïcödé",
    "0123456789",
    "a\0b",
    "|<im_start>|",
]


def spell(text: str) -> list[int]:
    """What `bytewise` makes of text: digits are 3-12, the 16 special tokens 13-28, byte n is 29+n."""
    marked = text.replace(" ", "▁")
    return [n for c in marked for n in ([3 + int(c)] if c in "0123456789" else [29 + byte for byte in c.encode()])]


def plain_sp(tokenizer: Tokenizer, tmp_path: Path) -> sentencepiece.SentencePieceProcessor:
    tokenizer.save(tmp_path)
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))


def folder_of(tmp_path: Path, model: bytes, **tables: object) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model)
    for name, table in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    return tmp_path


def test_ids_by_hand(bytewise: Tokenizer) -> None:
    assert bytewise.encode("A 1\n") == [29 + 0x41, 29 + 0xE2, 29 + 0x96, 29 + 0x81, 4, 29 + 0x0A]
    assert bytewise.encode("é7") == spell("é7") == [29 + 0xC3, 29 + 0xA9, 10]
    assert bytewise.encode("~~")[0] > 284  # the one letter that has a piece
    ids = [bytewise.bos_id, bytewise.eos_id, bytewise.pad_id, bytewise.unk_id, bytewise.cls_id, bytewise.sep_id]
    assert ids == [1, 2, 0, 0, 13, 14]


def test_ids_are_sentencepiece_s_own(tokenizer: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    sp = plain_sp(tokenizer, tmp_path)
    for text in [*corpus, *TRICKY, "\n".join(corpus[:50])]:
        assert tokenizer.encode(text) == sp.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(sp.encode(text)) == sp.decode(sp.encode(text))


def test_long_text_is_encoded_in_parts_with_the_same_ids(
    tokenizer: Tokenizer, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sp = plain_sp(tokenizer, tmp_path)
    text = "An old silent pond.\nA frog jumps into the pond.\n\n" * 3000 + "x" * 70000 + "\nend"
    assert tokenizer.encode(text) == sp.encode(text)
    monkeypatch.setattr("erniekit.data.tokenizer._CHUNK_CHARS", 5)
    for text in ["\n".join(corpus[:100]), "no line end", "\n\n\n", "one line only, with a line end\n"]:
        assert tokenizer.encode(text) == sp.encode(text)


def test_lines_are_not_taken_apart_if_a_piece_joins_them(train_model: Callable[..., bytes], tmp_path: Path) -> None:
    model = train_model(user_defined_symbols=[*SPECIAL, "\n\n", "\na"])
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, model))
    text = "a\n\na" * 30000
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)


@pytest.mark.parametrize("kind", ["user_defined_symbols", "control_symbols"])
def test_special_names_in_text_stay_text(kind: str, train_model: Callable[..., bytes], tmp_path: Path) -> None:
    model = train_model(**{kind: list(SPECIAL)})
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, model))
    as_text = sentencepiece.SentencePieceProcessor(model_proto=train_model(control_symbols=list(SPECIAL)))
    text = "say<|im_start|>now </s> <unk> <s><|end_of_sentence|>"
    ids = tokenizer.encode(text)
    special = {tokenizer.token_id(name) for name in [*SPECIAL, "<s>", "</s>", "<unk>"]}
    assert not special & set(ids)
    assert [tokenizer.piece(index) for index in ids] == as_text.encode(text, out_type=str)  # as if they had no meaning
    assert tokenizer.decode(ids) == text


def test_special_names_become_tokens_where_allowed(bytewise: Tokenizer) -> None:
    text = "a<|im_start|>b</s>"
    im_start = bytewise.token_id("<|im_start|>")
    ids = bytewise.encode(text, allow_special=True)
    assert ids == [*spell("a"), im_start, *spell("b"), 2]
    assert bytewise.decode(ids) == "ab"
    assert bytewise.decode(ids, skip_special=False) == text
    assert bytewise.encode(text) == spell(text)


def test_a_tokenizer_that_puts_a_space_first(train_model: Callable[..., bytes], tmp_path: Path) -> None:
    model = train_model(add_dummy_prefix=True, user_defined_symbols=list(SPECIAL))
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, model))
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ["Hello there", " Hello", "你好", "a\n" * 40000]:
        assert tokenizer.encode(text) == sp.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    both = tokenizer.encode("one<|im_end|>two", allow_special=True)
    assert both == [*sp.encode("one"), tokenizer.token_id("<|im_end|>"), *sp.encode("two")]
    assert tokenizer.decode(both, skip_special=False) == "one<|im_end|>two"


def test_streaming_gives_the_same_text_and_never_half_a_character(tokenizer: Tokenizer, corpus: list[str]) -> None:
    for text in [*corpus[:200], *TRICKY]:
        stream = StreamDecoder(tokenizer)
        parts = [*map(stream.push, tokenizer.encode(text)), stream.finish()]
        assert "".join(parts) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_streaming_holds_a_character_back_until_it_is_whole(bytewise: Tokenizer) -> None:
    stream = StreamDecoder(bytewise)
    assert [stream.push(index) for index in bytewise.encode("é!")] == ["", "é", "!"]
    stream.push(29 + 0xC3)
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_ids_that_no_token_has_are_shown_as_such(bytewise: Tokenizer) -> None:
    assert bytewise.decode([*spell("a"), 5000, *spell("b")]) == "a\N{REPLACEMENT CHARACTER}b"


def test_any_ids_can_be_decoded(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size + 50) for _ in range(20)]
        stream = StreamDecoder(tokenizer, skip_special=False)
        text = "".join([*map(stream.push, ids), stream.finish()])
        assert text == tokenizer.decode(ids, skip_special=False)


def test_tokenizer_model_alone_is_enough_without_protobuf(tokenizer: Tokenizer, root: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    program = (
        "import sys; sys.modules['google.protobuf'] = sys.modules['google'] = None\n"
        "from erniekit.data.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_folder({str(tmp_path)!r})\n"
        "print(t.cls_id, t.sep_id, t.chat_template, t.encode('Hello'), 'paddle' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"13 14 None {tokenizer.encode('Hello')} False"
    assert Tokenizer.from_folder(tmp_path).encode("a</s>b") == tokenizer.encode("a</s>b")


def test_the_files_beside_the_model_name_tokens(train_model: Callable[..., bytes], tmp_path: Path) -> None:
    model = train_model(user_defined_symbols=["<cls>", "<sep>", "<tag>", "[own]"])
    tokenizer = Tokenizer.from_folder(
        folder_of(
            tmp_path,
            model,
            tokenizer_config={
                "cls_token": "<cls>",
                "add_bos_token": False,
                "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
                "added_tokens_decoder": {
                    "2001": {"content": "<more>", "special": False},
                    "2003": {"content": "<more><tag>", "special": False},
                    "2002": {"content": "<hidden>", "special": True},
                },
            },
            special_tokens_map={"sep_token": {"content": "<sep>"}, "additional_special_tokens": ["[own]", "<absent>"]},
            added_tokens={"<|LOC_0|>": 2000},
        )
    )
    assert (tokenizer.cls_id, tokenizer.sep_id) == (tokenizer.token_id("<cls>"), tokenizer.token_id("<sep>"))
    assert tokenizer.chat_template == "d"
    assert tokenizer.vocab_size == 2004
    assert tokenizer.encode("<more><tag>") == [2003]  # the longest name wins
    text = "<cls>[own]<|LOC_0|><hidden><more>.<tag>"
    found = [tokenizer.piece(index) for index in tokenizer.encode(text)]
    assert found[-3:] == ["<more>", ".", "<tag>"]  # tokens, but not special ones: always found
    assert not {"<cls>", "[own]", "<|LOC_0|>", "<hidden>"} & set(found)
    allowed = tokenizer.encode(text, allow_special=True)
    assert [tokenizer.piece(index) for index in allowed] == re.findall(r"<.*?>|\[own\]|\.", text)
    assert allowed[2:5] == [2000, 2002, 2001]
    assert tokenizer.decode(allowed) == "<more>.<tag>"
    assert tokenizer.decode(allowed, skip_special=False) == text


def test_a_template_file_comes_before_the_one_in_the_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template == tokenizer.chat_template
    (tmp_path / "chat_template.jinja").write_text("own", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).chat_template == "own"


def test_save_copies_the_files_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    tokenizer.save(first)
    (first / "tokenization_ernie4_5.py").write_text("# code of the model's makers\n", encoding="utf-8")
    Tokenizer.from_folder(first).save(second)
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in second.iterdir()
    }
    assert len(list(second.iterdir())) == 4


def test_a_piece_that_is_not_there_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no piece '<think>'"):
        tokenizer.token_id("<think>")


def test_a_vocabulary_that_is_too_small_is_refused_with_both_numbers(tokenizer: Tokenizer) -> None:
    tokenizer.check_vocab(2000)
    with pytest.raises(DataError, match=r"ids up to 1999 \(.*vocab_size 1999"):
        tokenizer.check_vocab(1999)


def test_what_is_wrong_with_a_folder(tokenizer: Tokenizer, train_model: Callable[..., bytes], tmp_path: Path) -> None:
    def refused(pattern: str) -> None:
        with pytest.raises(DataError, match=pattern):
            Tokenizer.from_folder(tmp_path / "t")

    refused("no such folder")
    tokenizer.save(tmp_path / "t")
    model = tmp_path / "t" / "tokenizer.model"
    content = model.read_bytes()
    model.unlink()
    refused(r"tokenizer.model \(required\) is not there; found tokenizer_config.json.*added_tokens.json")
    for damaged in (b"", content[:1000], b"<html>not here</html>"):
        model.write_bytes(damaged)
        refused("no sentencepiece model, or damaged")
    model.write_bytes(train_model())
    (tmp_path / "t" / "special_tokens_map.json").unlink()
    refused(r"lacks special tokens.*cls_token '<\|begin_of_sentence\|>', sep_token '<\|end_of_sentence\|>'")
    (tmp_path / "t" / "tokenizer_config.json").write_text("[1]")
    refused("tokenizer_config.json: holds list, not a JSON object")
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    refused("tokenizer_config.json: not JSON")

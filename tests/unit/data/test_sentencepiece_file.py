"""The wire format of tokenizer.model, read and written without protobuf."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sentencepiece

from erniekit.data.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    as_control,
    read_pieces,
)
from erniekit.data.tokenizer_training import SPECIAL

LONG = b"<|" + b"x" * 140 + b"|>"
# Two pieces by hand: field 1 (text), 2 (score, 4 bytes), 3 (kind); then the trainer's settings as field 2.
SHORT_PIECE = b"\x0a\x0a" + b"\x0a\x01a" + b"\x15\x00\x00\x80\x3f" + b"\x18\x06"
LONG_PIECE = b"\x0a\x93\x01" + b"\x0a\x90\x01" + LONG
MODEL = SHORT_PIECE + LONG_PIECE + b"\x12\x02\x18\x02"


def test_by_hand() -> None:
    assert read_pieces(MODEL) == [Piece("a", BYTE), Piece(LONG.decode(), NORMAL)]
    changed = as_control(MODEL, {LONG.decode()})
    assert changed == SHORT_PIECE + b"\x0a\x95\x01" + LONG_PIECE[3:] + b"\x18\x03" + MODEL[-4:]
    assert as_control(MODEL, set()) == MODEL
    with pytest.raises(ValueError, match="wire type 3"):
        read_pieces(b"\x0b")


def test_pieces_are_those_that_sentencepiece_tells(train_model: Callable[..., bytes]) -> None:
    model = train_model(user_defined_symbols=list(SPECIAL), control_symbols=["<|control|>"])
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = read_pieces(model)
    assert [piece.text for piece in pieces] == [sp.id_to_piece(index) for index in range(sp.vocab_size())]
    for kind, told in ((CONTROL, sp.is_control), (UNKNOWN, sp.is_unknown), (BYTE, sp.is_byte)):
        assert [piece.kind == kind for piece in pieces] == [told(index) for index in range(sp.vocab_size())]
    assert [piece.text for piece in pieces if piece.kind == USER_DEFINED] == list(SPECIAL)
    changed = sentencepiece.SentencePieceProcessor(model_proto=as_control(model, set(SPECIAL)))
    assert all(changed.is_control(changed.piece_to_id(name)) for name in SPECIAL)

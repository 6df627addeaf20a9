"""Training a small tokenizer with ERNIE's special tokens, for tiny models, tests and the quickstart.

Knows nothing of models and of how tokens are used afterwards.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from erniekit.base.console import notice
from erniekit.base.errors import DataError, listed
from erniekit.base.files import atomic_write, write_json
from erniekit.data.lines import BadRow, decode_json, decode_utf8, read_lines
from erniekit.data.tokenizer import CONFIG_FILE, MODEL_FILE, ROLES, SPECIAL_FILE, Tokenizer

DIGITS = tuple("0123456789")  # ids 3 to 12, as in the published vocabulary
SPECIAL = (  # the ids after them
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<mask:1>",
    "<mask:4>",
    "<mask:5>",
    "<mask:6>",
    "<mask:7>",
    "<|im_start|>",
    "<|im_end|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|AUDIO_PLACEHOLDER|>",
    "<|VIDEO_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
)
_RESERVED = "▁▅"  # the trainer takes the first for a space and leaves out lines with the second
_NUM_FIXED = 3 + len(DIGITS) + len(SPECIAL) + 256  # <unk> <s> </s>, ..., one piece per byte


def train_tokenizer(texts_or_files: Iterable[str | Path], out_dir: str | Path, *, vocab_size: int = 8192) -> Tokenizer:
    """Train a small ERNIE tokenizer and write its folder: BPE, byte fallback, text kept exactly as it is.

    A `str` is a text, a `Path` a file: of a .jsonl file every string in every row is used, of another file every line.
    The same text gives the same bytes. "\n" is always the byte token <0x0A>, as in the published vocabulary.
    """
    sources = list(texts_or_files)
    room = vocab_size - _NUM_FIXED
    if room < 2:
        raise DataError(
            f"vocab_size {vocab_size} is too small: special tokens, digits and bytes are {_NUM_FIXED} pieces."
        )
    characters = Counter(char for line in _training_lines(sources) for char in line)
    for reserved in _RESERVED:
        del characters[reserved]
    if not characters:
        raise DataError("There is no text to train a tokenizer on.")
    # At most half of the free pieces may be single characters; rarer ones are spelt in bytes.
    alphabet = "".join(char for char, _ in characters.most_common(room // 2))
    rare = re.compile(f"[^{re.escape(alphabet)}]+")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(part for line in _training_lines(sources) for part in rare.split(line)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        user_defined_symbols=[*DIGITS, *SPECIAL],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 30,  # the default leaves out lines beyond 4 kB
        num_threads=1,  # the number is written into the file
        minloglevel=2,
    )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / MODEL_FILE, model.getvalue())
    _write_settings(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size < vocab_size:
        notice(f"{folder}: the text is enough for {tokenizer.vocab_size} pieces, not for vocab_size {vocab_size}.")
    return tokenizer


def _training_lines(sources: Iterable[str | Path]) -> Iterator[str]:
    """Lines, so that no piece ever holds a line end."""
    for source in sources:
        if isinstance(source, str):
            yield from source.splitlines()
            continue
        if not source.is_file():
            raise DataError(f"{source}: there is no such file to train a tokenizer on.")
        read = _strings_of_row if source.suffix in (".jsonl", ".json") else lambda raw: [decode_utf8(raw)]
        bad = []
        for number, raw in read_lines(source):
            try:
                for text in read(raw):
                    yield from text.splitlines()
            except BadRow as error:
                bad.append(f"{source}:{number}: {error}")
        if bad:
            raise DataError(listed(bad))


def _strings_of_row(raw: bytes) -> list[str]:
    found: list[str] = []
    pending = [decode_json(raw)]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list | dict):
            pending += value.values() if isinstance(value, dict) else value
    return found


def _write_settings(folder: Path) -> None:
    """The files beside tokenizer.model that transformers and ERNIEKit read."""
    roles = {**ROLES, "mask_token": "<mask:1>"}
    named = {
        **roles,
        "sys_start_token": "<mask:4>",
        "sys_end_token": "<mask:5>",
        "header_start_token": "<mask:6>",
        "header_end_token": "<mask:7>",
        "additional_special_tokens": [name for name in SPECIAL if name not in roles.values()],
    }
    write_json(folder / SPECIAL_FILE, named)
    write_json(
        folder / CONFIG_FILE,
        {
            **named,
            "tokenizer_class": "Ernie4_5_Tokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": (Path(__file__).parent / "templates" / "base.jinja").read_text(encoding="utf-8"),
        },
    )

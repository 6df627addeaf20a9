"""What a model will see: rows of the training data as readable tokens, each with its part in the loss.

`sample_views` looks at the rows of a step; `text_samples` writes them for a terminal, `html_samples` as a piece of a
web page that needs nothing from elsewhere. Knows neither configs nor how rows were chosen.
"""

from __future__ import annotations

import codecs
import html
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from erniekit.data.batch import CHOSEN, MISMATCHED, REJECTED, Document
from erniekit.data.build import TrainData
from erniekit.data.chat import UNTRAINED
from erniekit.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them
_LINE_END = "↵\n"
_MOST_BYTES = 4  # of a character in UTF-8
_RESET, _DIM, _TRAINED, _TARGET = "\x1b[0m", "\x1b[2m", "\x1b[1;32m", "\x1b[1;35m"


@dataclass(frozen=True)
class TokenView:
    """One token. `trained`: what is taught in its place counts in the loss. `target`: id and text of what is taught, if
    it is another token. `is_input` is False for what is asked for after the last input token."""

    id: int
    text: str
    trained: bool
    target: tuple[int, str] | None = None
    is_input: bool = True


@dataclass(frozen=True)
class PartView:
    """A sample, or a part of a tree: its prompt, or one of its branches, which see the prompt and not each other."""

    title: str  # empty where there is only one
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True)
class DocumentView:
    """One sample of a row."""

    name: str
    parts: tuple[PartView, ...]

    @property
    def tokens(self) -> tuple[TokenView, ...]:
        """Those of all parts."""
        return tuple(token for part in self.parts for token in part.tokens)

    @property
    def num_tokens(self) -> int:
        """Positions that it takes."""
        return sum(token.is_input for token in self.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens that count in the loss."""
        return sum(token.trained for token in self.tokens)


@dataclass(frozen=True)
class RowView:
    """One row of a step; its documents don't see each other."""

    step: int
    number: int
    row_length: int
    documents: tuple[DocumentView, ...]

    @property
    def num_tokens(self) -> int:
        """Positions that are filled."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_trained(self) -> int:
        """Tokens that count in the loss."""
        return sum(document.num_trained for document in self.documents)

    @property
    def title(self) -> str:
        """Where the row stands and how full it is."""
        count = len(self.documents)
        return (
            f"step {self.step}, row {self.number}: {count} sample{'s' * (count > 1)}, {self.num_tokens:,} of "
            f"{self.row_length:,} tokens ({self.num_tokens / self.row_length:.1%}), {self.num_trained:,} trained"
        )


def sample_views(train_data: TrainData, tokenizer: Tokenizer, *, step: int = 0, rows: int = 3) -> list[RowView]:
    """The first `rows` rows from a step on, over as many steps as that takes."""
    steps = ((number, row) for number in itertools.count(step) for row in enumerate(train_data.rows(number)))
    return [
        RowView(at, number, train_data.row_length, tuple(_document_view(doc, tokenizer) for doc in row.documents))
        for at, (number, row) in itertools.islice(steps, rows)
    ]


def _document_view(document: Document, tokenizer: Tokenizer) -> DocumentView:
    ids, labels, spans = document.input_ids.tolist(), document.labels.tolist(), document.spans()
    shared = ids[: spans[0][1]]
    parts = [
        PartView(title, _token_views(ids[start:end], labels[start:end], tokenizer, before=shared if start else []))
        for title, (start, end) in zip(_titles(document), spans, strict=True)
        if end > start
    ]
    return DocumentView(document.name, tuple(parts))


def _titles(document: Document) -> list[str]:
    """What the parts of a document are."""
    if document.preference is None:
        return [""]
    branches, better = document.preference.branches, f"chosen, better by {document.preference.score_delta:g}"
    names = {CHOSEN: "desirable", REJECTED: "undesirable", MISMATCHED: "another sample's answer"}
    if {CHOSEN, REJECTED} <= set(branches):
        names = {CHOSEN: better, REJECTED: "rejected"}
    return ["prompt", *(names[kind] for kind in branches)]


def _token_views(
    ids: list[int], labels: list[int], tokenizer: Tokenizer, *, before: list[int]
) -> tuple[TokenView, ...]:
    """The tokens of a part; what comes `before` it may spell the beginning of its first character."""
    tokens = []
    texts = _texts([*before[-_MOST_BYTES:], *ids], tokenizer)[-len(ids) :]
    for index, text, asked in zip(ids, texts, [UNTRAINED, *labels[:-1]], strict=True):
        target = None if asked in (UNTRAINED, index) else (asked, _texts([asked], tokenizer)[0])
        tokens.append(TokenView(index, text, asked != UNTRAINED, target))
    if labels[-1] != UNTRAINED:
        tokens.append(TokenView(labels[-1], _texts(labels[-1:], tokenizer)[0], True, is_input=False))
    return tuple(tokens)


def _texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token says, line ends and control characters made visible. Of the bytes that spell a character, the
    last one shows it."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for index in ids:
        piece = tokenizer.piece(index)
        if found := _BYTE.fullmatch(piece):
            piece = utf8.decode(bytes([int(found[1], 16)])) or "·"
        else:
            utf8.reset()
        shown = _CONTROL.sub(lambda char: f"⟨{ord(char[0]):02X}⟩", piece.replace("▁", " "))
        texts.append(shown.replace("\n", _LINE_END))
    return texts


def text_samples(views: Sequence[RowView], *, color: bool) -> str:
    """The rows for a terminal. Without colour, brackets stand around what is trained."""
    lines = [_legend_line(color=color)]
    for row in views:
        lines += ["", row.title]
        for document in row.documents:
            lines.append(_paint(f"── {document.name} · {_counts(document)} ──", _DIM, color=color))
            for part in document.parts:
                title = _paint(f"[{part.title}] ", _DIM, color=color) if part.title else ""
                lines.append(title + "".join(_runs(part, color=color)))
    return "\n".join(lines)


def _legend_line(*, color: bool) -> str:
    trained, read, target = "⟦trained⟧", "read only", "⟪input→target⟫"
    if color:
        trained = _paint("trained", _TRAINED, color=True)
        read, target = _paint(read, _DIM, color=True), _paint("input→target", _TARGET, color=True)
    return f"{trained}: counts in the loss; {read}: does not; {target}: here the model is taught another token"


def _runs(part: PartView, *, color: bool) -> Iterator[str]:
    """The text of a part, painted run by run."""
    for style, run in itertools.groupby(part.tokens, key=_style):
        tokens = list(run)
        if style == _TARGET:
            text = "".join(f"{token.text}→{token.target[1]}" if token.target else f"→{token.text}" for token in tokens)
            yield _paint(text, style, color=True) if color else f"⟪{text}⟫"
        else:
            text = "".join(token.text for token in tokens)
            yield _paint(text, style, color=True) if color else text if style == _DIM else f"⟦{text}⟧"


def _style(token: TokenView) -> str:
    if token.target or not token.is_input:
        return _TARGET
    return _TRAINED if token.trained else _DIM


def _paint(text: str, style: str, *, color: bool) -> str:
    return f"{style}{text}{_RESET}" if color else text


def _counts(document: DocumentView) -> str:
    return f"{document.num_tokens:,} tokens, {document.num_trained:,} trained"


def html_samples(views: Sequence[RowView]) -> str:
    """The rows as a piece of a web page with its own style: light or dark as the reader's system is."""
    rows = "".join(_html_row(row, is_open=position == 0) for position, row in enumerate(views))
    legend = (
        '<p class="ek-legend ek-text"><span><b>trained</b> counts in the loss</span><span><i>read only</i> does not'
        "</span><span><u>→ target</u> here the model is taught another token than the input shows</span>"
        "<span>Point at a token to see its id.</span></p>"
    )
    return f'<style>{_css()}</style><div class="ek">{legend}{rows}</div>'


@cache
def _css() -> str:
    return (Path(__file__).parent / "pages" / "samples.css").read_text(encoding="utf-8")


def _html_row(row: RowView, *, is_open: bool) -> str:
    shares = (100 * document.num_tokens / row.row_length for document in row.documents)
    fill = "".join(f'<i style="width:{share:.3f}%"></i>' for share in shares)
    where, _, figures = row.title.partition(": ")
    documents = "".join(
        f'<section class="ek-doc"><header><span>{html.escape(document.name)}</span><span>{_counts(document)}</span>'
        f"</header>{''.join(map(_html_part, document.parts))}</section>"
        for document in row.documents
    )
    return (
        f'<details class="ek-row"{" open" * is_open}><summary><strong>{where}</strong><span>{figures}</span>'
        f'<span class="ek-fill">{fill}</span></summary>{documents}</details>'
    )


def _html_part(part: PartView) -> str:
    title = f'<p class="ek-part">{html.escape(part.title)}</p>' if part.title else ""
    return f'{title}<div class="ek-text">{"".join(map(_html_token, part.tokens))}</div>'


def _html_token(token: TokenView) -> str:
    """One-letter elements, because a row has thousands: i is read only, b is trained, u is another target."""
    text, hint = html.escape(token.text), _hint(token.id, token.text)
    if not token.is_input:
        return f'<u data-t="only asked for: {hint}">→{text}</u>'
    if token.target:
        goal = _hint(*token.target)
        return f'<i data-t="{hint}">{text}</i><u data-t="asked for: {goal}">→{html.escape(token.target[1])}</u>'
    tag = "b" if token.trained else "i"
    return f'<{tag} data-t="{hint}">{text}</{tag}>'


def _hint(index: int, text: str) -> str:
    return html.escape(f"{index} {ascii(text) if text.isspace() or _LINE_END in text else text}")

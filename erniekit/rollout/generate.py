"""Greedy generation with a key/value cache: a stream of token ids, and on top of it the answer to a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import paddle

from erniekit.data.chat import Message, encode_prompt
from erniekit.data.tokenizer import StreamDecoder, Tokenizer
from erniekit.models.attention import KVCache
from erniekit.models.decoder import ErnieForCausalLM

_PREFILL_TOKENS = 512  # bounds the scores held while a long prompt is read


@paddle.no_grad()
def _next_token(model: ErnieForCausalLM, ids: Sequence[int], caches: list[KVCache]) -> int:
    for start in range(0, len(ids), _PREFILL_TOKENS):
        piece = paddle.to_tensor([list(ids[start : start + _PREFILL_TOKENS])], dtype="int64")
        logits_1V = model.step(piece, caches)
    return logits_1V.argmax(-1).item()


def stream_ids(
    model: ErnieForCausalLM, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> Iterator[int]:
    """Yield the most likely next ids until one of `stop_ids` (not yielded) or `max_new_tokens`."""
    if not prompt:
        raise ValueError("the prompt is empty")
    caches = model.new_caches()
    token = _next_token(model, prompt, caches)
    for count in range(max_new_tokens):
        if token in stop_ids:
            return
        yield token
        if count + 1 < max_new_tokens:
            token = _next_token(model, [token], caches)


def stream_answer(
    model: ErnieForCausalLM, tokenizer: Tokenizer, messages: Sequence[Message], *,
    max_new_tokens: int, template: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """The assistant's answer to a conversation, in pieces of text as they come.

    `template` is jinja source (None: the tokenizer's own). The answer ends at </s>, the token that training puts there,
    or at <|end_of_sentence|>.
    """
    was_training = model.training
    model.eval()
    try:
        decoder = StreamDecoder(tokenizer)
        prompt = encode_prompt(tokenizer, messages, template=template)
        stops = (tokenizer.eos_id, tokenizer.sep_id)
        for token in stream_ids(model, prompt, max_new_tokens=max_new_tokens, stop_ids=stops):
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.finish():
            yield rest
    finally:
        if was_training:
            model.train()


def generate(
    model: ErnieForCausalLM, tokenizer: Tokenizer, messages: Sequence[Message], *,
    max_new_tokens: int = 1024, template: str | None = None,
) -> str:  # fmt: skip
    """The whole greedy answer; see `stream_answer`."""
    return "".join(stream_answer(model, tokenizer, messages, max_new_tokens=max_new_tokens, template=template))

"""Answers to conversations as text: streamed, whole, or many at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from erniekit.data.chat import encode_prompt
from erniekit.data.rendering import Message, choose_template, fitted, render
from erniekit.data.tokenizer import StreamDecoder, Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.rollout.decode import BATCH_SIZE, GREEDY, stream_ids, stream_tokens
from erniekit.rollout.sampling import Sampling

_TURN_ENDS = ("<|im_end|>",)  # of chat formats other than the base format


class Prompt(Protocol):
    """What is to be answered (data/build.py makes such prompts from evaluation files)."""

    @property
    def messages(self) -> Sequence[Message]:
        """The conversation so far."""

    @property
    def tools(self) -> Sequence[Any]:
        """JSON schemas of the functions that the answer may call."""


def stop_ids(tokenizer: Tokenizer, template: str, further: Collection[int] = ()) -> frozenset[int]:
    """The ids at which an answer ends: </s>, the token that training puts there, <|end_of_sentence|>, the end of a turn
    in the template, and `further` ones (generation_config.json's)."""
    ends = {tokenizer.token_id(name) for name in _TURN_ENDS if name in template}
    return frozenset({tokenizer.eos_id, tokenizer.sep_id, *ends, *further})


def prompt_text(
    tokenizer: Tokenizer, messages: Sequence[Message], *,
    template: str, tools: Sequence[Any] | None = None, variables: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The text that the model continues; `encode_prompt` has its tokens."""
    names = {**tokenizer.role_names, **(variables or {})}
    return render(fitted(messages, tools, template), template, tools=tools or None, variables=names)


@contextmanager
def _answering(model: ErnieForCausalLM) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def stream_answer(
    model: ErnieForCausalLM, tokenizer: Tokenizer, messages: Sequence[Message], *,
    max_new_tokens: int, template: str | None = None, tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None, sampling: Sampling | None = None,
    further_stops: Collection[int] = (), number: int = 0, mesh: Mesh = Mesh.single(),
) -> Iterator[str]:  # fmt: skip
    """The assistant's answer to a conversation, in pieces of text as they come.

    `template` is jinja source (None: the tokenizer's own), `variables` are further names that it may ask for.
    `sampling` None is greedy; `number` tells apart the answers that one seed gives. All ranks of the `mesh` answer at
    once.
    """
    template = choose_template(tokenizer) if template is None else template
    with _answering(model):
        decoder = StreamDecoder(tokenizer)
        prompt = encode_prompt(tokenizer, messages, template=template, tools=tools or None, variables=variables)
        stops = stop_ids(tokenizer, template, further_stops)
        for token in stream_ids(
            model, prompt, max_new_tokens=max_new_tokens, stop_ids=stops, sampling=sampling or GREEDY, number=number,
            mesh=mesh,
        ):  # fmt: skip
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.finish():
            yield rest


def generate(
    model: ErnieForCausalLM, tokenizer: Tokenizer, messages: Sequence[Message], *,
    max_new_tokens: int = 1024, template: str | None = None, tools: Sequence[Any] | None = None,
    sampling: Sampling | None = None,
) -> str:  # fmt: skip
    """The whole answer, greedy unless `sampling` says otherwise; see `stream_answer`."""
    return "".join(
        stream_answer(
            model, tokenizer, messages, max_new_tokens=max_new_tokens, template=template, tools=tools, sampling=sampling
        )
    )


def generate_batch(
    model: ErnieForCausalLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], *,
    max_new_tokens: int = 1024, template: str | None = None, variables: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None, further_stops: Collection[int] = (), batch_size: int = BATCH_SIZE,
    mesh: Mesh = Mesh.single(),
) -> list[str]:  # fmt: skip
    """The answers to many prompts, `batch_size` in the making at a time; each is what it would be alone. All ranks of
    the `mesh` make them at once."""
    template = choose_template(tokenizer) if template is None else template
    encoded = [
        encode_prompt(tokenizer, prompt.messages, template=template, tools=prompt.tools or None, variables=variables)
        for prompt in prompts
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    with _answering(model):
        for index, token in stream_tokens(
            model, encoded, max_new_tokens=max_new_tokens, stop_ids=stop_ids(tokenizer, template, further_stops),
            sampling=sampling or GREEDY, batch_size=batch_size, mesh=mesh,
        ):  # fmt: skip
            answers[index].append(token)
    return [tokenizer.decode(answer) for answer in answers]

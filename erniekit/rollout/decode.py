"""Generation of token ids with a key/value cache, for one prompt or for many.

Up to `batch_size` answers are made side by side; each prompt is read alone, a finished answer leaves and the next
prompt joins. No padding enters the model, and a row's random numbers come from the seed and its own number, so an
answer does not depend on what is made beside it. Several ranks make the same answers at once, each with its part of the
model: what rank 0 chooses is what all go on with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import paddle

from erniekit.base.errors import DataError
from erniekit.models.cache import KVCache
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.rollout.logits import drawn, processed
from erniekit.rollout.sampling import Sampling

_PREFILL_TOKENS = 512  # bounds the scores held while a long prompt is read
BATCH_SIZE = 8
GREEDY = Sampling()


class _Row:
    """An answer in the making."""

    def __init__(
        self, number: int, prompt: Sequence[int], *, room: int, sampling: Sampling, stop_ids: Collection[int]
    ) -> None:
        self.number, self.prompt, self.sampling, self.stop_ids = number, list(prompt), sampling, stop_ids
        self.made: list[int] = []
        self.room = room
        self._random = np.random.Generator(np.random.PCG64([sampling.seed, number]))

    def choose(self, logits_V: np.ndarray) -> int:
        """The next token by these scores."""
        scores = processed(logits_V, self.sampling, prompt=self.prompt, made=self.made, stop_ids=self.stop_ids)
        return int(scores.argmax()) if self.sampling.greedy else drawn(scores, self._random.random())

    def take(self, token: int) -> bool:
        """Add a token unless it ends the answer; whether it was added."""
        if token in self.stop_ids:
            self.room = 0
            return False
        self.made.append(token)
        self.room -= 1
        return True


def first_says(mesh: Mesh, numbers: list[int]) -> list[int]:
    """What rank 0 has there: numbers that come out of the last bits of sums need not be the same everywhere."""
    world = mesh.axis("world")
    return numbers if world.size == 1 else world.broadcast(paddle.to_tensor(numbers, "int64")).tolist()


@paddle.no_grad()
def _step(
    model: ErnieForCausalLM, ids: list[list[int]], cache: KVCache, rows: Sequence[_Row], mesh: Mesh
) -> list[int]:
    """The token that follows, for each row."""
    logits_BV = model.step(paddle.to_tensor(ids, dtype="int64"), cache)
    if rows[0].sampling.plain:
        return first_says(mesh, logits_BV.argmax(-1).tolist())
    chosen = [row.choose(logits_V) for row, logits_V in zip(rows, logits_BV.numpy(), strict=True)]
    return first_says(mesh, chosen)


@paddle.no_grad()
def _read(model: ErnieForCausalLM, row: _Row, mesh: Mesh) -> tuple[KVCache, int]:
    """Read a row's prompt: its cache, and its first token."""
    cache = model.new_cache()
    starts = range(0, len(row.prompt), _PREFILL_TOKENS)
    *pieces, last = [row.prompt[start : start + _PREFILL_TOKENS] for start in starts]
    for piece in pieces:
        model.step(paddle.to_tensor([piece], dtype="int64"), cache)
    return cache, _step(model, [last], cache, [row], mesh)[0]


def stream_tokens(
    model: ErnieForCausalLM, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    stop_ids: Collection[int] = (), sampling: Sampling = GREEDY, batch_size: int = BATCH_SIZE, first_number: int = 0,
    mesh: Mesh = Mesh.single(),
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield (number of the prompt, its next id) as they are made, until every answer met a stop id (not yielded) or
    `max_new_tokens`. Raises DataError for a prompt that leaves the model no room.

    `first_number` is what the first prompt is called in the seeding of the random numbers.
    """
    rooms = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    waiting = [
        _Row(first_number + index, prompt, room=room, sampling=sampling, stop_ids=stop_ids)
        for index, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
    ][::-1]
    rows: list[_Row] = []
    cache: KVCache | None = None
    while waiting or rows:
        while waiting and len(rows) < batch_size:
            row = waiting.pop()
            read, token = _read(model, row, mesh)
            if row.take(token):
                yield row.number - first_number, token
            if row.room:
                rows.append(row)
                cache = read if cache is None else cache
                if cache is not read:
                    cache.join(read)
        if not rows:
            continue
        assert cache is not None
        for row, token in zip(rows, _step(model, [row.made[-1:] for row in rows], cache, rows, mesh), strict=True):
            if row.take(token):
                yield row.number - first_number, token
        going = [index for index, row in enumerate(rows) if row.room]
        if len(going) < len(rows):
            rows = [rows[index] for index in going]
            if rows:
                cache.keep(going)
            else:
                cache = None


def _room(model: ErnieForCausalLM, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens the answer to a prompt may have."""
    if not prompt:
        raise ValueError("the prompt is empty")
    longest = model.config.max_position_embeddings
    if len(prompt) >= longest:
        raise DataError(
            f"the conversation has {len(prompt)} tokens; the model takes {longest} (max_position_embeddings), its "
            "answer included. Shorten it."
        )
    return min(max_new_tokens, longest - len(prompt))


def stream_ids(
    model: ErnieForCausalLM, prompt: Sequence[int], *, max_new_tokens: int,
    stop_ids: Collection[int] = (), sampling: Sampling = GREEDY, number: int = 0, mesh: Mesh = Mesh.single(),
) -> Iterator[int]:  # fmt: skip
    """Yield the ids of one answer; see `stream_tokens`."""
    tokens = stream_tokens(
        model, [prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling, first_number=number,
        mesh=mesh,
    )  # fmt: skip
    return (token for _, token in tokens)

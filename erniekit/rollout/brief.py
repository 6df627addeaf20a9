"""Short answers to a few prompts, for a look at a model: greedy, and bounded in tokens and in time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from erniekit.data.build import Prompt
from erniekit.data.tokenizer import Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.rollout.decode import first_says
from erniekit.rollout.generate import stream_answer

TOKENS = 48
_SECONDS = 20.0  # for all prompts together


def brief_answers(
    model: ErnieForCausalLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, template: str | None = None,
    mesh: Mesh = Mesh.single(),
) -> list[str]:  # fmt: skip
    """As many answers as there is time for; the last one may be cut. All ranks answer the same at once."""
    end, found = time.perf_counter() + _SECONDS, list[str]()
    for prompt in prompts:
        found.append("")
        for piece in stream_answer(
            model, tokenizer, prompt.messages, max_new_tokens=TOKENS, template=template, tools=prompt.tools, mesh=mesh
        ):
            found[-1] += piece
            if first_says(mesh, [int(time.perf_counter() > end)])[0]:
                return found
    return found

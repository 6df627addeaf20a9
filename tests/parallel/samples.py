"""Small models and rows for tests of layouts: sizes that two and four ranks can share, no number of them zero."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.model_io import save_model
from erniekit.config.architecture import ErnieConfig
from erniekit.data.batch import CHOSEN, REJECTED, Document, Preference, Row
from erniekit.data.chat import UNTRAINED
from erniekit.models.decoder import ErnieForCausalLM
from tests.parallel.equal import Step

VOCABULARY = 64
_EXPERTS: dict[str, Any] = {
    "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
}  # fmt: skip


def write_model(
    out: Path, *, sparse: bool, head_bias: bool = False, idle: Sequence[int] = (), seed: int = 3, spread: float = 0.2,
    **changes: Any,
) -> Path:  # fmt: skip
    """A model of a dense layer and, if `sparse`, two of experts (else one more dense), with 2 key heads for 4 query
    heads. No token ever chooses one of the experts `idle`."""
    cfg = ErnieConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "dtype": "float32", "num_hidden_layers": 3 if sparse else 2,
        **(_EXPERTS if sparse else {}), **changes,
    })  # fmt: skip
    model, rng = ErnieForCausalLM(cfg, lm_head_bias=head_bias), np.random.default_rng(seed)
    for name, p in model.named_parameters():
        own = 0.05 if name.endswith("bias") else spread
        drawn = rng.normal(0, own, p.shape).astype("float32") + float("norm" in name)
        if name.endswith("e_score_correction_bias"):
            drawn[:, list(idle)] = -10.0
        p.set_value(drawn)
    save_model(model, out)
    return out


def steps_of(make: Any, *, steps: int = 3, micro_batches: int = 2, rows: int = 4) -> list[Step]:
    """`make(rng)` draws a row."""
    rng = np.random.default_rng(7)
    return [[[make(rng) for _ in range(rows)] for _ in range(micro_batches)] for _ in range(steps)]


def packed_row(rng: np.random.Generator) -> Row:
    """One to three documents, of which some tokens are trained: rows differ in length, so that there is padding."""
    return Row(tuple(_document(rng) for _ in range(rng.integers(1, 4))))


def _document(rng: np.random.Generator) -> Document:
    length = int(rng.integers(5, 12))
    ids, labels = rng.integers(3, VOCABULARY, (2, length))
    labels[: length // 3] = UNTRAINED
    return Document("text", ids, labels)


def pair_row(rng: np.random.Generator) -> Row:
    """Two prompts, each with a chosen and a rejected answer that share it."""
    return Row(tuple(_pair(rng) for _ in range(2)))


def _pair(rng: np.random.Generator) -> Document:
    prompt, *answers = (rng.integers(3, VOCABULARY, rng.integers(3, 7)) for _ in range(3))
    parts = [prompt[:-1], *(np.concatenate([prompt[-1:], answer[:-1]]) for answer in answers)]
    labels = np.concatenate([np.full(len(prompt) - 1, UNTRAINED), *answers])
    preference = Preference(int(rng.integers(1 << 30)), (CHOSEN, REJECTED), 1.0)
    return Document("pair", np.concatenate(parts), labels, tuple(map(len, parts)), preference)

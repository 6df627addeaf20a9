"""The micro model and the data of the end-to-end tests, for runs of several ranks."""

from __future__ import annotations

import shutil

import pytest

from erniekit.checkpoint.create import create
from erniekit.config.families import FAMILIES
from tests.end_to_end.conftest import Bench
from tests.end_to_end.conftest import bench as bench

_WIDE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="session")
def wide(bench: Bench) -> Bench:
    """The micro model with sizes of which blocks of 128 divide even the half, and the same data."""
    made = Bench(bench.folder / "for-ranks")
    made.folder.mkdir()
    shutil.copy(bench.folder / "train.jsonl", made.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "micro-moe", {**FAMILIES["micro-moe"], **_WIDE})
        create("micro-moe", made.model, tokenizer_texts=[made.folder / "train.jsonl"])
    return made

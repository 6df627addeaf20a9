"""Parallel equals single for runs that nobody thought of (chance.py draws them): a few here, any number by hand.

python -c 'from tests.parallel.test_chance import *; hunt(range(1000, 1100))'
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.parallel.chance import draw
from tests.parallel.equal import assert_parallel_equals_single

# Three tensor ranks in parts; two replicas of experts under stage 2; experts over tensor under stage 2; everything at
# once, with an adapter.
KEPT = (309, 329, 335, 352)


@pytest.mark.parametrize("seed", KEPT)
def test_a_run_drawn_at_random(seed: int, tmp_path: Path) -> None:
    case, layout = draw(seed, tmp_path / "model")
    assert_parallel_equals_single(case, layout)


def hunt(seeds: Iterable[int]) -> None:
    """Look for a run that differs; what is found is printed."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            case, layout = draw(seed, Path(folder) / "model")
            try:
                assert_parallel_equals_single(case, layout)
                print(f"{seed} is right: {layout}", flush=True)
            except AssertionError as error:
                print(f"{seed} IS WRONG: {case.arch}\n{error}", flush=True)

"""The comparison of a merged model with base and adapter."""

from __future__ import annotations

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.rollout.merge_proof import MAX_ROWS, MAX_TOKENS, Difference, difference, require_close, token_rows


def test_logits_and_distributions_are_compared_row_by_row():
    one = [np.log(np.float32([[0.5, 0.5], [0.25, 0.75]])), np.zeros((1, 2), np.float32)]
    other = [one[0] + np.float32([[3.0], [0.0]]), np.log(np.float32([[0.9, 0.1]]))]
    found = difference(one, other)
    kl = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert found.tokens == 3 and found.max_logit == pytest.approx(3.0)  # a shift of all logits is no other distribution
    assert (found.mean_kl, found.max_kl) == (pytest.approx(kl / 3, rel=1e-6), pytest.approx(kl, rel=1e-6))


@pytest.mark.parametrize("kl", [2e-3, float("nan")])
def test_too_far_and_not_a_number_are_errors(kl):
    require_close(Difference(8, 0.1, 9e-4, 1.0), tolerance=1e-3, dtype="bfloat16")
    with pytest.raises(CheckpointError, match="merge_tolerance"):
        require_close(Difference(8, 0.1, kl, 1.0), tolerance=1e-3, dtype="bfloat16")


def test_rows_are_few_and_short():
    rows = token_rows([range(500), [1], *([[1, 2, 3]] * 20)])
    assert len(rows) == MAX_ROWS and len(rows[0]) == MAX_TOKENS and [len(row) for row in rows[1:]] == [3] * 7

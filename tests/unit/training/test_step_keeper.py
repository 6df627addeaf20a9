"""What counts as a spike, and which steps find room on the disk."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.config.load import load_config
from erniekit.data.batch import Batch, Document, PreferenceBatch, Row
from erniekit.training.replay import StepKeeper, read_kept
from tests.unit.training.pairs import pair_batch, tree

IDS = np.arange(8, dtype=np.int64).reshape(2, 4)
BATCHES = [Batch(IDS + n, IDS, IDS * 0, IDS * 0 + 1) for n in range(2)]
ROWS = [Row(tuple(Document(f"a:{n}{k}", IDS[0], IDS[0]) for k in range(1 + n % 2))) for n in range(4)]
MODEL = SimpleNamespace(parameters=lambda: [SimpleNamespace(shape=[2, 3])])


@pytest.fixture
def keeper(tmp_path):
    def make(losses=(), **keys):
        return StepKeeper(
            tmp_path, load_config({"seed": 5, **keys}), losses=losses,
            save_model=lambda _, folder: (folder / "model.safetensors").write_text("weights"),
        )  # fmt: skip

    return make


def keep(keeper, step, loss):
    return keeper.keep(MODEL, step=step, reason="because", loss=loss, batches=BATCHES, rows=ROWS)


def test_a_spike_is_a_multiple_of_the_median_of_enough_steps(keeper):
    assert keeper([1.0] * 9).spike(99.0) == ""
    made = keeper([1.0] * 6 + [3.0] * 5, spike_factor=4)
    assert made.spike(4.0) == "" and "more than 4 times the median 1 of" in made.spike(4.1)
    assert keeper([1.0] * 20, spike_factor=0).spike(1e9) == ""
    assert keeper([1.0] * 20).spike(10.1) and not keeper([1.0] * 20).spike(9.9)


def test_only_the_last_steps_count_and_a_resumed_run_judges_alike(keeper):
    old, made = [9.0] * 60, keeper([], spike_factor=2)
    for loss in [*old, *[1.0] * 50]:
        made.add(loss)
    assert made.spike(2.5) == keeper([*old, *[1.0] * 50], spike_factor=2).spike(2.5) != ""


def test_a_loss_of_preferences_is_no_spike_below_where_it_began(keeper):
    """It falls towards 0, and one hard pair is then many times the median."""
    made = keeper([0.69, *[0.01] * 20], stage="DPO")
    assert made.spike(6.8) == "" and "the median" in made.spike(7.0)
    assert keeper([0.69, *[0.01] * 20]).spike(0.2) != ""


def test_a_step_of_preferences_is_kept_with_its_reference(keeper):
    batches = [pair_batch([0, 1], [2]), pair_batch([3, 4])]
    rows = [Row((tree(0), tree(1))), Row((tree(2),)), Row((tree(3), tree(4)))]
    folder = keeper(stage="DPO").keep(
        MODEL, step=0, reason="because", loss=math.nan, batches=batches, rows=rows,
        reference=lambda _, batch: paddle.arange(batch.num_answers),
    )  # fmt: skip
    kept = read_kept(folder)
    assert [type(batch) for batch in kept.batches] == [PreferenceBatch] * 2 and kept.samples[0][1] == ["pairs.jsonl:3"]
    assert [logps.tolist() for logps in kept.reference] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    for batch, again in zip(batches, kept.batches, strict=True):
        assert batch.names == again.names
        for name in ("labels", "end_rows", "answer_ids", "chosen", "rejected", "mismatched", "samples"):
            assert np.array_equal(getattr(batch, name), getattr(again, name))


def test_a_step_is_kept_whole_and_read_back(keeper, tmp_path, capsys):
    folder = keep(keeper(), 6, 3.5)
    assert folder == tmp_path / "replay" / "step-7" and f"erniekit replay {folder}" in capsys.readouterr().err
    kept = read_kept(folder)
    assert (kept.step, kept.loss, kept.seed, kept.reason) == (6, 3.5, 5, "because")
    assert kept.samples == [[["a:00"], ["a:10", "a:11"]], [["a:20"], ["a:30", "a:31"]]]
    assert kept.reference == []
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(kept.batches, BATCHES, strict=True))
    (folder / "training" / "batches.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"batches\.npz"):
        read_kept(folder)


def test_two_spikes_are_kept_and_what_is_not_finite_always(keeper, tmp_path, capsys):
    made = keeper()
    for step in range(4):
        keep(made, step, 9.0)
    assert "is not kept" in capsys.readouterr().err
    assert keep(made, 9, math.nan) is not None and keep(made, 0, 9.0) == tmp_path / "replay" / "step-1"
    assert sorted(path.name for path in (tmp_path / "replay").iterdir()) == ["step-1", "step-10", "step-2"]


def test_a_disk_without_room_is_told_and_costs_nothing_else(keeper, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=40))
    assert keep(keeper(), 0, math.nan) is None
    assert "could not be kept" in capsys.readouterr().err and not (tmp_path / "replay").exists()

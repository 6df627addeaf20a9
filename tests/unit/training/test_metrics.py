"""What is shown of a run, and when."""

import json
import re

import pytest

from erniekit.training.metrics import LOG_NAME, Display, Reporter, Volume, last_figures, read_log


class Recording:
    """A logger that remembers."""

    def __init__(self):
        self.scalar_steps, self.pictures, self.closed = {}, [], 0

    def scalars(self, values, step):
        self.scalar_steps.setdefault(step, {}).update(values)

    def picture(self, name, _, step):
        self.pictures.append((name, step))

    def close(self):
        self.closed += 1


def row(step, **more):
    figures = {"loss": 4.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 50.0, "tokens": 100}
    return {"step": step, **figures, "trained_tokens": 40, **more}


@pytest.fixture
def logger():
    return Recording()


@pytest.fixture
def reporter(tmp_path, logger):
    def make(start_step=0, **display):
        return Reporter(tmp_path, total_steps=7, start_step=start_step, loggers=[logger], display=Display(**display))

    return make


def lines(capsys):
    return re.findall(r"^step (\d+)/7", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("display", "told"),
    [({}, "1234567"), ({"every": 3}, "367"), ({"every": 3, "first": True}, "1367"), ({"every": 0, "first": True}, "")],
)
def test_the_steps_that_are_told(reporter, logger, capsys, display, told):
    made = reporter(bar=False, **display)
    for step in range(1, 8):
        made.step(row(step))
    made.close()
    assert lines(capsys) == list(told) and [str(step) for step in logger.scalar_steps] == list(told)
    assert len(made.history) == 7 and logger.closed == 1


def test_groups_and_what_is_not_a_figure(reporter, logger, tmp_path):
    made = reporter(bar=False)
    health = {"moe_dead_experts": 0, "moe_imbalance": 1.0, "moe_entropy": 0.9, "moe_bias_drift": 0.0}
    made.step(row(1, **health, moe_orthogonality=0.1, moe_tokens=[[1, 2]], aux_loss=float("nan")))
    made.evaluation({"step": 1, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_accuracy": 0.5, "eval_loss/a": 1.0})
    made.canary({"step": 1, "canary_loss": 3.0})
    figures = logger.scalar_steps[1]
    assert {"train/loss", "eval/eval_loss", "eval/eval_loss/a", "canary/canary_loss", "moe/moe_entropy"} <= {*figures}
    assert not {"train/step", "train/aux_loss", "moe/moe_tokens"} & {*figures}
    assert logger.pictures == [("moe/tokens_per_expert", 1)]


def test_the_bar_shows_instead_of_lines(reporter, capsys):
    made = reporter(bar=True)
    made.step(row(1))
    made.close()
    out, err = capsys.readouterr()
    assert "step 1/7" not in out and "loss 4.0000, 50 tok/s" in err


def test_rows_of_steps_that_are_taken_again_are_dropped_and_a_broken_last_line_too(reporter, tmp_path):
    (tmp_path / LOG_NAME).write_text("".join(json.dumps(row(s)) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    made = reporter(start_step=2, bar=False)
    made.step(row(3, note=1))
    made.close()
    found = read_log(tmp_path / LOG_NAME)
    assert [r["step"] for r in found] == [1, 2, 3] and found == made.history and "note" in found[2]


def test_a_canary_row_of_an_earlier_life_is_not_written_twice(reporter, tmp_path):
    made = reporter(bar=False)
    for _ in range(2):
        made.canary({"step": 7, "canary_loss": 3.0})
    made.canary({"step": 9, "canary_loss": 3.0})
    assert [r["step"] for r in made.history] == [7, 9]


def test_volume_counts_tokens_and_the_seconds_of_steps():
    volume = Volume.of([row(1), {"step": 1, "eval_loss": 1.0}, row(2, tokens_per_s=25.0)])
    assert volume == Volume(2, 200, 80, 2.0 + 4.0)
    assert volume.text == "2 steps, 80 trained tokens of 200 in 6.0 s: 13 trained tokens/s"
    assert Volume.of([]).text.startswith("0 steps")


def test_last_figures_come_from_all_kinds_of_rows():
    assert last_figures([row(1), {"step": 1, "eval_loss": 2.0, "name": "x"}])["eval_loss"] == 2.0


def test_a_step_of_preferences_tells_accuracy_and_margin(reporter, capsys):
    made = reporter(bar=False)
    made.step(row(1, accuracy=0.75, margin=0.0312))
    made.step(row(2, accuracy=0.5))  # judged answers of one kind only
    made.evaluation({"step": 2, "eval_loss": 0.6, "eval_accuracy": 0.8, "eval_margin": -0.1, "eval_loss/a": 0.7,
                     "eval_accuracy/a": 1.0})  # fmt: skip
    made.evaluation({"step": 2, "eval_loss": 2.0, "eval_accuracy": 0.4, "eval_perplexity": 7.4})
    made.close()
    shown = capsys.readouterr().out.splitlines()
    assert "loss 4.000000 accuracy 0.750 margin +0.0312 lr" in shown[0]
    assert "accuracy 0.500 lr" in shown[1]
    assert shown[2] == "eval at step 2: loss 0.600000 accuracy 0.8000 margin -0.1000"
    assert shown[3] == "  a: loss 0.700000 accuracy 1.0000"
    assert shown[4] == "eval at step 2: loss 2.000000 perplexity 7.400 accuracy 0.4000"

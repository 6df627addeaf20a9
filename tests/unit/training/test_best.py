"""Which evaluation is the best, and when there were enough that were not."""

import math

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config
from erniekit.training.best import BestModel
from erniekit.training.evaluate import figure_names


def best_of(sources=("a.jsonl",), **keys):
    cfg = load_config({"evaluation_strategy": "steps", **keys})
    return BestModel.of(cfg, figures=figure_names(sources or ()), measured=sources is not None)


def judged(best, values):
    return [best.judge(step, {best.metric: value}) for step, value in enumerate(values, start=1)]


def test_less_loss_is_better_and_the_best_step_is_remembered():
    best = best_of()
    assert judged(best, [3.0, 2.0, 2.5, 2.0]) == [True, True, False, False]
    assert (best.step, best.value) == (2, 2.0)


def test_more_accuracy_is_better_and_the_key_beats_the_name():
    assert judged(best_of(metric_for_best_model="accuracy"), [0.1, 0.3, 0.2]) == [True, True, False]
    opposite = best_of(metric_for_best_model="eval_accuracy", greater_is_better=False)
    assert judged(opposite, [0.1, 0.3, 0.05]) == [True, False, True]


def test_patience_counts_evaluations_that_gain_less_than_the_threshold():
    best = best_of(early_stopping_patience=2, early_stopping_threshold=0.5)
    waited = []
    for step, value in enumerate([3.0, 2.8, 2.2, 2.1, 2.0], start=1):
        best.judge(step, {"eval_loss": value})
        waited.append(best.waited_enough)
    assert waited == [False, False, False, False, True]  # 2.2 gains 0.6 on 2.8; then 0.1 and 0.1
    assert best.step == 5, "small gains still make the best model"


def test_what_is_not_a_number_is_never_the_best():
    best = best_of(early_stopping_patience=2)
    assert judged(best, [math.nan, 4.0, math.nan, math.inf]) == [False, True, False, False]
    assert best.step == 2 and best.waited_enough


def test_without_patience_it_never_ends():
    best = best_of()
    judged(best, [1.0] * 50)
    assert not best.waited_enough


def test_the_state_goes_on_and_belongs_to_its_figure():
    one, other, accuracy = best_of(), best_of(), best_of(metric_for_best_model="accuracy")
    judged(one, [3.0, 2.0, 4.0])
    other.load_state(one.state())
    accuracy.load_state(one.state())
    assert (other.step, other.value, other.waited) == (2, 2.0, 1)
    assert accuracy.value is None


def test_a_figure_of_one_of_several_sources():
    assert best_of(sources=["x/a.jsonl", "b.jsonl"], metric_for_best_model="eval_loss/a").metric == "eval_loss/a"


def test_a_figure_that_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match=r"'acuracy' is no figure.*Did you mean 'eval_accuracy'"):
        best_of(metric_for_best_model="acuracy")


@pytest.mark.parametrize("keys", [{"load_best_model_at_end": True}, {"early_stopping_patience": 1}])
def test_choosing_needs_something_to_choose_from(keys):
    with pytest.raises(ConfigError, match="eval_dataset_path"):
        best_of(sources=None, **keys)
    with pytest.raises(ConfigError, match="evaluation_strategy: no"):
        load_config(keys)

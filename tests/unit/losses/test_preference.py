"""Preference losses beside TRL's own code and closed formulas (tests/data/golden/dpo), and what must hold of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from erniekit.config.align import ON_THE_MARGIN, REFERENCE_FREE, SMOOTHED
from erniekit.config.run import KEYS
from erniekit.losses.preference import (
    ACROSS,
    LOSSES,
    Across,
    PairLogps,
    PreferenceSettings,
    kl_estimate,
    kto_kl,
    kto_loss,
    look_across,
    preference_loss,
    reward_loss,
    rewards,
    scaled,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "golden" / "dpo" / "dpo.json").read_text())
NEAR = 1e-6
LAST_DIGIT = 0.51e-9  # the file has nine decimals
FREE = ("simpo", "or", "orpo")

# Case of the file -> (our loss, what else: on means per token, weights of the loss and of the likelihood)
TRL = {
    "sigmoid": ("sigmoid", {}), "sigmoid_beta0.5": ("sigmoid", {}), "hinge": ("hinge", {}), "ipo": ("ipo", {}),
    "ipo_beta0.5": ("ipo", {}), "robust_ls0.2": ("robust", {}), "exo_pair_ls0.1": ("exo", {}),
    "nca_pair": ("nca_pair", {}), "bco_pair": ("bco", {}), "sppo_hard": ("sppo_hard", {}),
    "apo_zero": ("apo_zero", {}), "apo_down": ("apo_down", {}), "aot": ("aot", {}), "aot_ls0.1": ("aot", {}),
    "sigmoid_norm": ("sigmoid", {"means": True}), "sft": ("sigmoid", {"pref": 0.0, "sft": 1.0}),
    "sigmoid+0.5*sft": ("sigmoid", {"sft": 0.5}),
}  # fmt: skip
SIMPO = [name for name in GOLDEN["trl"] if name.startswith("simpo")]
FORMULAS = {
    "sigmoid_beta0.1_ls0.0": ("sigmoid", {}), "sigmoid_beta0.1_ls0.1": ("sigmoid", {"label_smoothing": 0.1}),
    "sigmoid_beta0.1_ls0.3": ("sigmoid", {"label_smoothing": 0.3}), "ipo_sum_beta0.1": ("ipo", {"lengths": 1.0}),
    "ipo_avg_beta0.1": ("ipo", {}), "kto_pair_beta0.1": ("kto_pair", {}),
    "dpop_beta0.1_lambda50": ("dpop", {"dpop_lambda": 50.0}),
    "simpo_with_reference_beta0.1_gamma0.5": ("simpo", {"simpo_gamma": 0.5}), "orpo_log_odds_avg": ("or", {}),
}  # fmt: skip


def double(values):
    return paddle.to_tensor(np.array(values, np.float64))


def settings(**changes):
    return PreferenceSettings(**{"normalize_logps": False, **changes})


def golden_logps(lengths=None):
    """The file's own sums of log-probabilities."""
    sides = [double(GOLDEN[kind][side]) for kind in ("policy_logps", "ref_logps") for side in ("chosen", "rejected")]
    spans = [double(GOLDEN["completion_lengths"][side]) for side in ("chosen", "rejected")]
    return PairLogps(*sides, *(paddle.full_like(span, lengths) if lengths else span for span in spans))


def from_logits():
    """(policy logits to differentiate, the log-probabilities made of them and of the reference's) in fp64."""
    given = GOLDEN["inputs"]
    policy, ref = (double(given[name]).reshape(given["logits_shape"]) for name in ("policy_logits", "ref_logits"))
    policy.stop_gradient = False
    ids, mask = np.array(given["input_ids"]), double(given["completion_mask"])[:, 1:]
    label = paddle.to_tensor(ids[:, 1:, None])

    def summed(logits):
        picked = paddle.take_along_axis(F.log_softmax(logits[:, :-1], axis=-1), label, 2).squeeze(-1)
        return (picked * mask).sum(1).split(2)

    return policy, PairLogps(*summed(policy), *summed(ref), *mask.sum(1).split(2))


def assert_near(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=NEAR, atol=LAST_DIGIT)


@pytest.mark.parametrize("case", TRL)
def test_what_trl_computes(case):
    """Loss, gradient and rewards. TRL computes in fp32: it is off by up to 1e-6 of a tensor's largest number."""
    want, (name, facts) = GOLDEN["trl"][case], TRL[case]
    logits, logps = from_logits()
    facts = {"pref": 1.0, "sft": 0.0, "means": False} | facts
    keys = settings(beta=want.get("beta", 0.1), label_smoothing=want.get("label_smoothing", 0.0))
    seen = logps
    if facts["means"]:
        lengths = logps[4:] * 2
        seen = PairLogps(*(sums / length for sums, length in zip(logps[:4], lengths, strict=True)), *logps[4:])
    loss = facts["pref"] * preference_loss(name, seen, keys).mean()
    loss = loss - facts["sft"] * logps.policy_chosen.sum() / logps.chosen_lengths.sum()
    loss.backward()
    gradient = logits.grad.numpy()
    assert_near(float(loss), want["loss"])
    assert_near(np.sqrt((gradient**2).sum()), want["grad_l2"])
    largest = np.abs(gradient[0, 3]).max()
    np.testing.assert_allclose(gradient[0, 3, :6], want["grad_probe"], rtol=NEAR, atol=NEAR * largest + LAST_DIGIT)
    chosen, rejected = rewards("sigmoid", logps, keys)
    assert_near(float(chosen.mean()), want["rewards_chosen"])
    assert_near(float(rejected.mean()), want["rewards_rejected"])
    assert float((chosen > rejected).astype("float64").mean()) == want["reward_accuracy"]


@pytest.mark.parametrize("case", SIMPO)
def test_simpo_as_trl_computes_it(case):
    beta, gamma, e = (float(part.lstrip("betagmls")) for part in case.split("_")[1:])
    none = paddle.zeros([3], "float64")
    logps = golden_logps()._replace(ref_chosen=none, ref_rejected=none)
    found = preference_loss("simpo", logps, settings(beta=beta, simpo_gamma=gamma, label_smoothing=e))
    assert_near(found.numpy(), GOLDEN["trl"][case]["per_pair"])
    assert_near(float(found.mean()), GOLDEN["trl"][case]["loss"])


@pytest.mark.parametrize("case", FORMULAS)
def test_closed_formulas(case):
    want, (name, facts) = GOLDEN["formula"][case], FORMULAS[case]
    logps = golden_logps(facts.get("lengths"))
    keys = settings(**{key: value for key, value in facts.items() if key != "lengths"})
    found = preference_loss(name, logps, keys)
    assert_near(float(found.mean()), want["loss"])
    if name == "kto_pair":  # the file has both answers of the pairs, ours the mean of the two
        assert_near(found.numpy(), np.reshape(want["per_item"], [2, -1]).mean(0))
    else:
        assert_near(found.numpy(), want["per_item"])


def test_every_case_of_the_file_is_asked_for():
    assert {*TRL, *SIMPO} == {*GOLDEN["trl"]}
    assert {*FORMULAS} == {*GOLDEN["formula"]}


def test_the_names_are_those_of_the_key():
    assert {*LOSSES} == {*KEYS["loss_type"].choices}
    assert {*ACROSS, *ON_THE_MARGIN, *SMOOTHED, *FREE} <= {*LOSSES}
    assert REFERENCE_FREE == FREE


# ---------------------------------------------------------------------- what must hold
def drawn(num=5, seed=0):
    rng = np.random.default_rng(seed)
    sides = [double(-rng.uniform(5, 20, num)) for _ in range(4)]
    return PairLogps(*sides, *(double(rng.integers(3, 9, num)) for _ in range(2)))


def with_lengths(logps, chosen, rejected):
    return logps._replace(
        chosen_lengths=paddle.full_like(logps.chosen_lengths, chosen),
        rejected_lengths=paddle.full_like(logps.rejected_lengths, rejected),
    )


AT_REFERENCE = {
    "sigmoid": math.log(2), "robust": math.log(2), "aot": math.log(2), "dpop": math.log(2), "hinge": 1.0, "ipo": 25.0,
    "kto_pair": 0.5, "sppo_hard": 50.0, "nca_pair": 2 * math.log(2), "bco": 2 * math.log(2), "apo_zero": 1.0,
    "apo_down": 1.0, "exo": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_REFERENCE)
@pytest.mark.parametrize("normalize", [False, True])
def test_where_policy_and_reference_agree(name, normalize):
    """ln 2 for those on DPO's ratio, whatever the answers are; what the formulas say for the others."""
    logps = drawn()
    logps = logps._replace(ref_chosen=logps.policy_chosen, ref_rejected=logps.policy_rejected)
    keys = settings(normalize_logps=normalize, label_smoothing=0.1 if name in ("exo", "sigmoid", "aot") else 0.0)
    np.testing.assert_allclose(preference_loss(name, logps, keys).numpy(), AT_REFERENCE[name], rtol=1e-12)


def test_the_gradient_at_the_reference_is_half_of_beta():
    logps = drawn()
    policy = [logps.ref_chosen.clone(), logps.ref_rejected.clone()]
    for side in policy:
        side.stop_gradient = False
    preference_loss(
        "sigmoid", logps._replace(policy_chosen=policy[0], policy_rejected=policy[1]), settings(beta=0.3)
    ).sum().backward()
    np.testing.assert_allclose(policy[0].grad.numpy(), -0.15, rtol=1e-12)
    np.testing.assert_allclose(policy[1].grad.numpy(), 0.15, rtol=1e-12)


def test_equal_lengths_need_no_normalisation():
    logps = with_lengths(drawn(), 7, 7)
    for name in LOSSES.keys() - {"exo"}:
        plain, normal = (preference_loss(name, logps, settings(normalize_logps=on)) for on in (False, True))
        np.testing.assert_allclose(plain.numpy(), normal.numpy(), rtol=1e-12)


def test_normalisation_scales_to_the_mean_length_of_the_pair():
    logps = with_lengths(drawn(), 4, 12)
    seen = scaled("sigmoid", logps, settings(normalize_logps=True))
    np.testing.assert_allclose(seen.policy_chosen.numpy(), 2 * logps.policy_chosen.numpy())
    np.testing.assert_allclose(seen.ref_rejected.numpy(), logps.ref_rejected.numpy() * 8 / 12)
    for name in ("ipo", "simpo", "or"):  # means per token, normalised or not
        seen = scaled(name, logps, settings(normalize_logps=True))
        np.testing.assert_allclose(seen.ref_chosen.numpy(), logps.ref_chosen.numpy() / 4)


def test_half_smoothing_of_equal_answers_pulls_nowhere():
    logps = drawn()
    policy = [logps.ref_chosen.clone(), logps.ref_rejected.clone()]
    for side in policy:
        side.stop_gradient = False
    seen = logps._replace(policy_chosen=policy[0], policy_rejected=policy[1])
    for name in ("sigmoid", "aot"):
        preference_loss(name, seen, settings(label_smoothing=0.5)).sum().backward()
        assert not policy[0].grad.numpy().any()
        assert not policy[1].grad.numpy().any()


def test_the_offset_is_a_margin_to_exceed():
    logps, beta, alpha = drawn(), 0.5, 0.7
    keys = settings(beta=beta, offset_alpha=alpha)
    found = preference_loss("sigmoid", logps, keys, score_delta=double([3.0] * 5))
    further = logps.policy_chosen - alpha / beta * math.log(3.0 + 1e-6)
    expected = preference_loss("sigmoid", logps._replace(policy_chosen=further), settings(beta=beta))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12)
    even = preference_loss("sigmoid", logps, keys, score_delta=double([1.0] * 5))
    np.testing.assert_allclose(even.numpy(), preference_loss("sigmoid", logps, settings(beta=beta)).numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_by_finite_differences(name, normalize):
    """In fp64, with what is looked at across the pairs held still, as the formulas say; the reference gets none."""
    keys = settings(beta=0.3, label_smoothing=0.2 if name in SMOOTHED else 0.0, normalize_logps=normalize)
    start = drawn(seed=3)
    across = look_across(name, start, keys)

    def value(chosen, rejected):
        moved = start._replace(policy_chosen=chosen, policy_rejected=rejected)
        return (preference_loss(name, moved, keys, across=across) * double([1.0, 2.0, -1.0, 0.5, 3.0])).sum()

    sides = [start.policy_chosen.clone(), start.policy_rejected.clone()]
    for side in sides:
        side.stop_gradient = False
    value(*sides).backward()
    step = 1e-5
    for which in (0, 1):
        for i in range(5):
            ahead, behind = ([x.detach().clone() for x in sides] for _ in range(2))
            ahead[which][i] += step
            behind[which][i] -= step
            slope = (float(value(*ahead)) - float(value(*behind))) / (2 * step)
            assert slope == pytest.approx(float(sides[which].grad[i]), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_may_be_cut_anywhere(name):
    """What is looked at is the whole step's; then every pair's loss is its own."""
    keys = settings(label_smoothing=0.1 if name in SMOOTHED else 0.0)
    logps = drawn(6)
    across = look_across(name, logps, keys)
    whole = preference_loss(name, logps, keys)
    parts = [
        preference_loss(name, PairLogps(*(x[a:b] for x in logps)), keys, across=across.part(a, b))
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    np.testing.assert_allclose(paddle.concat(parts).numpy(), whole.numpy(), rtol=1e-14)


def test_optimal_transport_pairs_ranks():
    logps = drawn(6, seed=5)
    ratio = np.sort((logps.policy_chosen - logps.policy_rejected).numpy())
    ref = np.sort((logps.ref_chosen - logps.ref_rejected).numpy())
    assert not np.array_equal(
        np.argsort((logps.policy_chosen - logps.policy_rejected).numpy()),
        np.argsort((logps.ref_chosen - logps.ref_rejected).numpy()),
    )
    expected = np.log1p(np.exp(-0.1 * (ratio - ref)))
    found = preference_loss("aot", logps, settings()).numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-12)


def test_the_shift_of_bco_moves_both_rewards():
    logps, beta = drawn(), 0.1
    found = preference_loss("bco", logps, settings(beta=beta), across=Across(shift=0.4))
    chosen, rejected = (x.numpy() for x in rewards("bco", logps, settings(beta=beta)))
    expected = np.log1p(np.exp(-(chosen - 0.4))) + np.log1p(np.exp(rejected - 0.4))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_extreme_margins_stay_finite():
    logps = drawn()
    far = logps._replace(policy_chosen=logps.policy_chosen - 1e6)
    for name in LOSSES.keys() - {"or", "orpo"}:
        keys = settings(label_smoothing=0.1 if name in SMOOTHED else 0.0)
        assert np.isfinite(preference_loss(name, far, keys).numpy()).all(), name


# ---------------------------------------------------------------------- judged answers and rewards
def sigma(x):
    return 1 / (1 + np.exp(-x))


def test_kto_weighs_good_and_bad_answers_against_the_kl():
    ratios, desirable = double([2.0, -1.0, 0.5, 3.0]), paddle.to_tensor([True, False, True, False])
    found = kto_loss(ratios, desirable, beta=0.2, kl=0.7, desirable_weight=1.5, undesirable_weight=0.5).numpy()
    good = 1.5 * (1 - sigma(0.2 * (np.array([2.0, 0.5]) - 0.7)))
    bad = 0.5 * (1 - sigma(0.2 * (0.7 - np.array([-1.0, 3.0]))))
    np.testing.assert_allclose(found, [good[0], bad[0], good[1], bad[1]], rtol=1e-12)


def test_the_kl_of_kto_is_never_negative_and_has_no_gradient():
    ratios = double([1.0, 2.0])
    ratios.stop_gradient = False
    assert kto_kl(ratios) == 1.5
    assert kto_kl(-ratios) == 0.0


def test_gradient_of_kto_by_finite_differences():
    ratios, desirable, step = double([2.0, -1.0, 0.5]), paddle.to_tensor([True, False, True]), 1e-5
    ratios.stop_gradient = False
    facts = {"beta": 0.2, "kl": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    kto_loss(ratios, desirable, **facts).sum().backward()
    around = [kto_loss(ratios.detach() + move, desirable, **facts).numpy() for move in (step, -step)]
    np.testing.assert_allclose(ratios.grad.numpy(), (around[0] - around[1]) / (2 * step), rtol=1e-8)


def test_rewards_are_compared_by_bradley_and_terry():
    found = reward_loss(double([1.0, 0.0]), double([0.0, 2.0])).numpy()
    np.testing.assert_allclose(found, [np.log1p(np.exp(-1.0)), np.log1p(np.exp(2.0))], rtol=1e-12)


def test_the_kl_estimate_is_zero_at_the_reference_and_positive_elsewhere():
    found = kl_estimate(double([0.0, 4.0, -4.0]), double([8.0, 8.0, 8.0])).numpy()
    np.testing.assert_allclose(found, [0.0, np.exp(-0.5) - 0.5, np.exp(0.5) - 1.5], rtol=1e-12)

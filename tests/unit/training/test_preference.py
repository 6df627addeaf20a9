"""Objectives over preferences: beside each answer on its own, and the same however a step is packed, cut or shared."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from erniekit.base.errors import DataError
from erniekit.config.align import AlignConfig
from erniekit.losses.preference import ACROSS, LOSSES
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.reward import ErnieForReward
from erniekit.training.objective import LossWeights, run_trunk
from erniekit.training.preference import (
    JudgedObjective,
    PairObjective,
    RewardObjective,
    answer_lengths,
    answer_log_probs,
)
from erniekit.training.step import Totals
from tests.unit.data.trees import batch_of, judged, tree
from tests.unit.training.micro import make_model

NUM = 4
NEAR = 2e-5


def drawn_texts(seed=2):
    """(prompt, chosen, rejected) of NUM samples, of odd lengths."""
    rng = np.random.default_rng(seed)
    return [[list(rng.integers(3, 64, rng.integers(2, 8))) for _ in range(3)] for _ in range(NUM)]


def pairs(*, share=True):
    return [tree(p, [c, r], sample=i, score_delta=1.0 + i, share=share) for i, (p, c, r) in enumerate(drawn_texts())]


def judgements():
    texts = drawn_texts()
    return [judged(p, c, texts[(i + 1) % NUM][1], desirable=i != 2, sample=i) for i, (p, c, _) in enumerate(texts)]


def cuts(documents):
    """The same step as one row, as four, as two micro-batches, as four."""
    return [
        [batch_of(documents)], [batch_of(*([d] for d in documents))],
        [batch_of(documents[:3]), batch_of(documents[3:])], [batch_of([d]) for d in documents],
    ]  # fmt: skip


def moved(model):
    """A reference somewhat off the model, and less sure of every answer: no KL is clamped."""
    other = make_model()
    rng = np.random.default_rng(5)
    for name, p in model.named_parameters():
        if "norm" not in name:
            dict(other.named_parameters())[name].set_value(
                p.numpy() + rng.normal(0, 0.02, p.shape).astype("float32")
            )
    return lambda _, batch: answer_log_probs(other, batch) - 2.0


def reward_model():
    model = make_model()
    made = ErnieForReward(model.config.replace(is_reward=True))
    values = {name: p for name, p in model.named_parameters() if name.startswith("model.")}
    for name, p in made.named_parameters():
        shape = p.shape
        p.set_value(values[name] if name in values else np.random.default_rng(1).normal(size=shape).astype("float32"))
    return made


def run(objective, model, batches):
    """(loss, figures, gradients) of a step."""
    for p in model.parameters():
        p.clear_gradient(False)
    totals = Totals.of(batches, row_length=1024)
    objective.begin(model, batches)
    loss, figures = 0.0, {}
    for batch in batches:
        made = objective(model, batch, totals)
        made.total.backward()
        loss += float(made.total)
        for name, value in made.parts.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    return loss, figures, {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=NEAR)
    assert found[1] == pytest.approx(expected[1], rel=NEAR, abs=NEAR)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert np.abs(found[2][name] - gradient).max() <= 1e-4 * np.abs(gradient).max() + 1e-8, name


def keys(**changes):
    smoothed = changes.get("loss_type") == "exo"
    return AlignConfig(**{"label_smoothing": 0.1 if smoothed else 0.0, **changes})


# ---------------------------------------------------------------------- log-probabilities
def alone(model, prompt, answer):
    """The log-probability of an answer by the logits of an ordinary forward."""
    ids = paddle.to_tensor([[*prompt, *answer[:-1]]])
    logps = F.log_softmax(model(ids)[0, len(prompt) - 1 :].astype("float64"), axis=-1)
    return sum(float(logps[i, token]) for i, token in enumerate(answer))


def test_log_probs_are_those_of_each_answer_alone():
    model = make_model()
    model.eval()
    expected = [alone(model, p, answer) for p, *answers in drawn_texts() for answer in answers]
    lengths = [len(answer) for _, *answers in drawn_texts() for answer in answers]
    for documents in (pairs(), pairs(share=False)):
        batch = batch_of(documents[:2], documents[2:])
        assert answer_log_probs(model, batch).dtype == paddle.float64
        np.testing.assert_allclose(answer_log_probs(model, batch).numpy(), expected, rtol=1e-5)
        assert answer_lengths(batch).tolist() == lengths
    assert not model.training


def test_log_probs_leave_no_gradient_and_the_mode_as_it_was():
    model = make_model()
    model.train()
    assert answer_log_probs(model, batch_of(pairs())).stop_gradient
    assert model.training


# ---------------------------------------------------------------------- pairs
def test_a_loss_by_hand():
    """Sigmoid, normalised to the pair's mean length, with an offset and the likelihood of the chosen answers."""
    model = make_model()
    reference = moved(model)
    batch = batch_of(pairs())
    policy, ref, lengths = (x.reshape([NUM, 2]) for x in (
        answer_log_probs(model, batch).numpy(), reference(model, batch).numpy(), answer_lengths(batch).astype(float)
    ))  # fmt: skip
    scale = lengths.mean(1, keepdims=True) / lengths
    ratios = (policy - ref) * scale
    margin = ratios[:, 0] - ratios[:, 1] - 0.5 / 0.3 * np.log(np.arange(NUM) + 1.0 + 1e-6)
    likelihood = -policy[:, 0].sum() / lengths[:, 0].sum()
    expected = 2.0 * np.log1p(np.exp(-0.3 * margin)).mean() + 0.7 * likelihood
    objective = PairObjective(
        keys(beta=0.3, offset_alpha=0.5, pref_loss_ratio=2.0, sft_loss_ratio=0.7), LossWeights(), reference=reference
    )
    loss, figures, _ = run(objective, model, [batch])
    assert loss == pytest.approx(expected, rel=NEAR)
    rewards = 0.3 * ratios
    assert figures == pytest.approx({
        "rewards_chosen": rewards[:, 0].mean(), "rewards_rejected": rewards[:, 1].mean(),
        "margin": (rewards[:, 0] - rewards[:, 1]).mean(), "accuracy": (rewards[:, 0] > rewards[:, 1]).mean(),
        "logps_chosen": policy[:, 0].mean(), "logps_rejected": policy[:, 1].mean(), "sft_loss": likelihood,
        "kl": (np.exp(-(policy - ref) / lengths) - 1 + (policy - ref) / lengths).mean(),
    }, rel=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", ["sigmoid", *ACROSS, "or"])
def test_a_step_is_the_same_however_it_is_packed_cut_and_shared(name):
    model = make_model()
    reference = None if name == "or" else moved(model)

    def of(batches):
        settings = keys(loss_type=name, beta=0.3, sft_loss_ratio=0.4)
        return run(PairObjective(settings, LossWeights(), reference=reference), model, batches)

    expected = of([batch_of(pairs())])
    for share in (True, False):
        for batches in cuts(pairs(share=share)):
            assert_same(of(batches), expected)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"simpo", "or", "orpo"}))
def test_at_the_reference_nothing_is_told_apart(name):
    model = make_model()
    objective = PairObjective(keys(loss_type=name), LossWeights(), reference=answer_log_probs)
    loss, figures, _ = run(objective, model, [batch_of(pairs())])
    if name in ("sigmoid", "robust", "dpop", "aot"):
        assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert figures["margin"] == pytest.approx(0.0, abs=1e-5)
    assert figures["kl"] == pytest.approx(0.0, abs=1e-8)


def test_chance_is_half_right():
    """Equal answers are never ahead of each other."""
    texts = drawn_texts()
    batch = batch_of([tree(p, [c, c], sample=i) for i, (p, c, _) in enumerate(texts)])
    figures = run(PairObjective(keys(), LossWeights(), reference=answer_log_probs), make_model(), [batch])[1]
    assert figures["accuracy"] == 0.5


def test_the_shift_of_bco_is_the_mean_of_all_rewards_so_far_and_survives_a_checkpoint():
    model = make_model()
    settings, reference = keys(loss_type="bco", beta=0.3), moved(model)
    first, second = batch_of(pairs()[:3]), batch_of(pairs()[3:])

    def fresh():
        return PairObjective(settings, LossWeights(), reference=reference)

    objective = fresh()
    before = [run(objective, model, [batch])[:2] for batch in (first, second)]
    means = [(figures["rewards_chosen"] + figures["rewards_rejected"]) / 2 for _, figures in before]
    mean, count = objective.state()["bco.running"].numpy()
    assert (mean, count) == (pytest.approx((3 * means[0] + means[1]) / 4, rel=1e-5), 4.0)
    resumed = fresh()
    run(resumed, model, [first])
    other = fresh()
    other.load_state({name: x.numpy() for name, x in resumed.state().items()})
    assert run(other, model, [second])[0] == before[1][0]
    assert run(fresh(), model, [second])[0] != before[1][0]
    measured = objective.measure(model, [[first]])
    assert measured == objective.measure(model, [[first]])  # measuring teaches it nothing
    assert PairObjective(keys(), LossWeights()).state() == {}


def test_what_is_measured_does_not_depend_on_batches_and_is_what_a_step_finds():
    model = make_model()
    for name in ("sigmoid", *ACROSS):
        settings = keys(loss_type=name, sft_loss_ratio=0.5)
        found = [
            PairObjective(settings, LossWeights(), reference=moved(model)).measure(model, [batches])[0]
            for batches in cuts(pairs())
        ]
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=NEAR, abs=NEAR)
        assert found[0]["eval_samples"] == NUM
        if name != "bco":  # which has seen nothing yet when it is measured first
            loss, figures, _ = run(
                PairObjective(settings, LossWeights(), reference=moved(model)), model, [batch_of(pairs())]
            )
            assert found[0]["eval_loss"] == pytest.approx(loss, rel=NEAR)
            assert found[0]["eval_accuracy"] == pytest.approx(figures["accuracy"])


def test_nothing_to_measure_is_said():
    with pytest.raises(DataError, match="gives no sample"):
        PairObjective(keys(), LossWeights()).measure(make_model(), [[]])


def test_figures_of_each_source_and_of_all():
    model, objective = make_model(), PairObjective(keys(loss_type="simpo"), LossWeights())
    sources = [[batch_of(pairs()[:1])], [batch_of([d]) for d in pairs()[1:]]]
    whole, *each = objective.measure(model, sources)
    assert whole == pytest.approx(objective.measure(model, [[batch_of(pairs())]])[0], rel=NEAR)
    assert each == [objective.measure(model, [source])[0] for source in sources]


def test_gradients_are_those_of_the_formula_on_ordinary_logits():
    model = make_model()
    _, _, found = run(PairObjective(keys(loss_type="simpo", beta=2.0), LossWeights()), model, [batch_of(pairs())])
    model.clear_gradients()
    means = [
        F.log_softmax(model(paddle.to_tensor([[*p, *answer[:-1]]]))[0, len(p) - 1 :], axis=-1)[
            paddle.arange(len(answer)), paddle.to_tensor(answer)
        ].mean()
        for p, *answers in drawn_texts() for answer in answers
    ]  # fmt: skip
    chosen, rejected = paddle.stack(means[::2]), paddle.stack(means[1::2])
    F.softplus(0.5 - 2.0 * (chosen - rejected)).mean().backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(found[name] - gradient).max() <= 1e-5 * np.abs(gradient).max() + 1e-9, name


# ---------------------------------------------------------------------- what stands beside
def test_router_losses_pull_and_are_not_reported():
    model, batch = make_model(), batch_of(pairs())
    name = "model.layers.1.mlp.gate.weight"
    plain, pulled = (
        run(PairObjective(keys(), weights, reference=answer_log_probs), model, [batch])
        for weights in (LossWeights(), LossWeights(balance=5.0, orthogonal=5.0))
    )
    assert pulled[0] == pytest.approx(plain[0], rel=1e-6)
    assert np.abs(pulled[2][name] - plain[2][name]).max() > 0.01
    assert {"aux_loss", "orthogonal_loss"} <= pulled[1].keys() - plain[1].keys()


def test_multi_token_prediction_learns_from_chosen_answers_within_their_branch():
    cfg = make_model(sparse=False).config.replace(num_nextn_predict_layers=1)
    model = ErnieForCausalLM(cfg)
    paddle.seed(3)
    for name, p in model.named_parameters():
        p.set_value(paddle.ones(p.shape) if "norm" in name else paddle.randn(p.shape) * 0.2)
    weights = LossWeights(multi_token=0.3)
    losses = [
        run(PairObjective(keys(loss_type="simpo"), weights), model, batches)[1]["mtp_loss_1"]
        for share in (True, False) for batches in cuts(pairs(share=share))
    ]  # fmt: skip
    assert losses == pytest.approx([losses[0]] * len(losses), rel=NEAR)
    other = [tree(p, [c, [5, 6, 7]], sample=i) for i, (p, c, _) in enumerate(drawn_texts())]
    found = run(PairObjective(keys(loss_type="simpo"), weights), model, [batch_of(other)])[1]["mtp_loss_1"]
    assert found == pytest.approx(losses[0], rel=NEAR)


# ---------------------------------------------------------------------- judged answers
def test_kto_by_hand():
    model = make_model()
    reference, batch = moved(model), batch_of(judgements())
    ratios = (answer_log_probs(model, batch) - reference(model, batch)).numpy().reshape(NUM, 2)
    kl = ratios[:, 1].mean()
    assert kl > 0.5
    sign = np.array([1, 1, -1, 1])
    weight = np.where(sign > 0, 1.5, 0.5)
    expected = (weight * (1 - 1 / (1 + np.exp(-0.3 * sign * (ratios[:, 0] - kl))))).mean()
    settings = keys(beta=0.3, kto_desirable_weight=1.5, kto_undesirable_weight=0.5)
    loss, figures, _ = run(JudgedObjective(settings, LossWeights(), reference=reference), model, [batch])
    assert loss == pytest.approx(expected, rel=NEAR)
    good, bad = 0.3 * ratios[sign > 0, 0].mean(), 0.3 * ratios[2, 0]
    assert figures["rewards_chosen"] == pytest.approx(good, rel=1e-4)
    assert figures["rewards_rejected"] == pytest.approx(bad, rel=1e-4)
    assert figures["margin"] == pytest.approx(good - bad, rel=1e-4)
    assert figures["kl"] == pytest.approx(kl, rel=1e-4)
    assert figures["accuracy"] == pytest.approx((sign * (ratios[:, 0] - kl) > 0).mean())


def test_kto_is_the_same_however_it_is_cut():
    model = make_model()
    reference = moved(model)

    def of(batches):
        objective = JudgedObjective(keys(beta=0.3), LossWeights(), reference=reference)
        return *run(objective, model, batches), objective.measure(model, [batches])[0]

    expected = of([batch_of(judgements())])
    for batches in cuts(judgements()):
        found = of(batches)
        assert_same(found[:3], expected[:3])
        assert found[3] == pytest.approx(expected[3], rel=NEAR, abs=NEAR)
    assert expected[3]["eval_loss"] == pytest.approx(expected[0], rel=NEAR)
    assert expected[1]["kl"] > 0.5


def test_answers_of_other_samples_teach_nothing():
    """What they say makes no difference to the gradient where the KL is clamped."""
    model, texts = make_model(), drawn_texts()
    far = lambda _, batch: answer_log_probs(model, batch) + 100.0  # noqa: E731 - so that the KL is clamped at 0
    gradients = []
    for offset in (1, 2):
        documents = [
            judged(p, c, texts[(i + offset) % NUM][2], desirable=True, sample=i) for i, (p, c, _) in enumerate(texts)
        ]
        objective = JudgedObjective(keys(beta=0.01), LossWeights(), reference=far)
        _, figures, gradient = run(objective, model, [batch_of(documents)])
        assert figures["kl"] == 0.0
        assert "rewards_rejected" not in figures  # there is none
        gradients.append(gradient)
    for name, gradient in gradients[0].items():
        assert np.abs(gradients[1][name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


# ---------------------------------------------------------------------- reward models
def test_rewards_are_read_at_the_last_token_of_an_answer():
    model, texts = reward_model(), drawn_texts()
    found = []
    for p, *answers in texts:
        for answer in answers:
            batch = batch_of([tree(p, [answer, answer])])
            hidden = run_trunk(model, batch).hidden_BSD
            last = len(p) - 1 + len(answer) - 1
            found.append(float(model.rewards(hidden[0, last : last + 1])[0]))
    chosen, rejected = np.array(found).reshape(NUM, 2).T
    loss, figures, gradients = run(RewardObjective(keys(), LossWeights()), model, [batch_of(pairs())])
    assert loss == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), rel=NEAR)
    assert figures == pytest.approx({
        "rewards_chosen": chosen.mean(), "rewards_rejected": rejected.mean(), "margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).mean(),
    }, rel=1e-4)  # fmt: skip
    assert "score.weight" in gradients


def test_rewards_are_the_same_however_a_step_is_packed_cut_and_shared():
    model = reward_model()

    def of(batches):
        return run(RewardObjective(keys(), LossWeights()), model, batches)

    expected = of([batch_of(pairs())])
    for share in (True, False):
        for batches in cuts(pairs(share=share)):
            assert_same(of(batches), expected)
            measured = RewardObjective(keys(), LossWeights()).measure(model, [batches])[0]
            assert measured["eval_accuracy"] == expected[1]["accuracy"]

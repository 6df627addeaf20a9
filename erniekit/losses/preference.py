"""Losses over preferences: pairs of answers (DPO and its family), answers judged one by one (KTO), reward models.

Pure functions of log-probabilities that are already summed over each answer's tokens. Four words are used throughout:

    chosen ratio, rejected ratio   log pi(answer) - log ref(answer) of either answer
    margin h                       chosen ratio - rejected ratio, less `offset_alpha / beta * log(score_delta + 1e-6)`
    e                              label_smoothing

Lengths: ipo, simpo and `or` compare means per token. The others compare sums; with `normalize_logps` (ERNIEKit's
default; TRL has nothing like it) both answers of a pair are first scaled to the pair's mean length, policy and
reference alike, so that beta is not TRL's wherever the two lengths differ.

Where a loss looks at all pairs of a batch (kto_pair, bco, aot; KTO), what it sees comes as constants: `Across`. They
are those of the whole step, so that the sum over micro-batches is the loss of the step however it was cut.

Knows no model, batch or config. Shapes: N pairs, or N judged answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor


class PairLogps(NamedTuple):
    """Summed log-probabilities of N pairs and the answers' lengths in tokens, all [N] of one dtype."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


@dataclass(frozen=True)
class PreferenceSettings:
    """The numbers in the formulas; the keys of the same names explain them."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    offset_alpha: float = 0.0
    normalize_logps: bool = True


@dataclass(frozen=True)
class Across:
    """What a loss takes from all samples of a step together. No gradient flows through it."""

    kl_chosen: float = 0.0  # kto_pair: how far the chosen answers have moved from the reference
    kl_rejected: float = 0.0
    kl: float = 0.0  # KTO: how far answers to other prompts have
    shift: float = 0.0  # bco: the running mean of all rewards
    ref_ratios_N: Tensor | None = None  # aot: for each pair, the reference's log-ratio of the same rank

    def part(self, start: int, stop: int) -> Across:
        """The same for some of the pairs."""
        ratios = self.ref_ratios_N
        return self if ratios is None else dataclasses.replace(self, ref_ratios_N=ratios[start:stop])


class _Terms(NamedTuple):
    """What the formulas are written in, [N] each; see the top of the file."""

    margin: Tensor
    chosen: Tensor
    rejected: Tensor
    logps: PairLogps


def scaled(loss_type: str, logps: PairLogps, settings: PreferenceSettings) -> PairLogps:
    """The log-probabilities as the loss sees them: means per token, scaled to the pair's mean length, or sums."""
    if loss_type in ON_MEANS:
        by_chosen, by_rejected = 1.0 / logps.chosen_lengths, 1.0 / logps.rejected_lengths
    elif settings.normalize_logps:
        mean = (logps.chosen_lengths + logps.rejected_lengths) / 2
        by_chosen, by_rejected = mean / logps.chosen_lengths, mean / logps.rejected_lengths
    else:
        return logps
    return logps._replace(
        policy_chosen=logps.policy_chosen * by_chosen, policy_rejected=logps.policy_rejected * by_rejected,
        ref_chosen=logps.ref_chosen * by_chosen, ref_rejected=logps.ref_rejected * by_rejected,
    )  # fmt: skip


def rewards(loss_type: str, logps: PairLogps, settings: PreferenceSettings) -> tuple[Tensor, Tensor]:
    """The implicit rewards (arXiv 2305.18290, section 4): beta times the ratios of chosen and rejected, [N] each."""
    seen = scaled(loss_type, logps, settings)
    beta = settings.beta
    return beta * (seen.policy_chosen - seen.ref_chosen), beta * (seen.policy_rejected - seen.ref_rejected)


def preference_loss(
    loss_type: str, logps: PairLogps, settings: PreferenceSettings, *,
    score_delta: Tensor | None = None, across: Across | None = None,
) -> Tensor:  # fmt: skip
    """The loss of each pair, [N]. `across` None: these pairs are the whole step."""
    seen = scaled(loss_type, logps, settings)
    chosen, rejected = seen.policy_chosen - seen.ref_chosen, seen.policy_rejected - seen.ref_rejected
    margin = chosen - rejected
    if settings.offset_alpha and score_delta is not None:
        margin = margin - settings.offset_alpha / settings.beta * paddle.log(score_delta + 1e-6)
    if across is None:
        across = look_across(loss_type, logps, settings)
    return LOSSES[loss_type](_Terms(margin, chosen, rejected, seen), settings, across)


@paddle.no_grad()
def look_across(loss_type: str, logps: PairLogps, settings: PreferenceSettings) -> Across:
    """What `loss_type` takes from these pairs, all those of a step. (The shift of bco outlives steps: the caller's.)"""
    seen = scaled(loss_type, logps, settings)
    if loss_type == "kto_pair":
        kls = ((seen.policy_chosen - seen.ref_chosen).mean(), (seen.policy_rejected - seen.ref_rejected).mean())
        return Across(*(max(float(kl), 0.0) for kl in kls))
    if loss_type == "aot":
        rank_N = paddle.argsort(paddle.argsort(seen.policy_chosen - seen.policy_rejected, stable=True), stable=True)
        return Across(ref_ratios_N=paddle.sort(seen.ref_chosen - seen.ref_rejected).gather(rank_N))
    return Across()


# ---------------------------------------------------------------------- the margin decides
def sigmoid(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h).

    DPO (arXiv 2305.18290, eq. 7); with e > 0 its conservative form (Mitchell, "A note on DPO with noisy preferences").
    ERNIEKit the same; TRL no longer smooths here.
    """
    return _smoothed(s.beta * t.margin, s.label_smoothing)


def hinge(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """max(0, 1 - beta h): SLiC's margin (arXiv 2305.10425, section 2) on DPO's ratio (RSO, arXiv 2309.06657, section
    3). ERNIEKit and TRL the same."""
    return F.relu(1.0 - s.beta * t.margin)


def ipo(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """(h - 1 / (2 beta))^2 on means per token (arXiv 2310.12036, eq. 17; beta is the paper's tau).

    The paper's log-probabilities are of whole answers; ERNIEKit and today's TRL take means, TRL before 0.10 took sums.
    """
    return paddle.square(t.margin - 0.5 / s.beta)


def simpo(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """DPO's loss of beta h - gamma on means per token, without a reference (arXiv 2405.14734, eq. 6).

    gamma is the paper's target margin itself (ERNIEKit and TRL: the same). The paper's beta is 2 to 2.5.
    """
    return _smoothed(s.beta * t.margin - s.simpo_gamma, s.label_smoothing)


def dpop(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """-log sigma(beta (h - lambda max(0, -chosen ratio))): DPO that keeps the chosen answer's likelihood up (Smaug,
    arXiv 2402.13228, section 3). ERNIEKit the same; TRL has none."""
    return -F.log_sigmoid(s.beta * (t.margin - s.dpop_lambda * F.relu(-t.chosen)))


def robust(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """(-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2 e), e < 1/2 (rDPO, arXiv 2403.00409, section 3): an
    unbiased DPO loss when a share e of the pairs is labelled wrongly. TRL the same; ERNIEKit has none."""
    e, x = s.label_smoothing, s.beta * t.margin
    return (e * F.log_sigmoid(-x) - (1.0 - e) * F.log_sigmoid(x)) / (1.0 - 2.0 * e)


def exo(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """KL(p || q) with p = (sigma(beta h), sigma(-beta h)) and q = (1 - e, e), 0 < e < 1 (arXiv 2402.00856, eq. 16).
    TRL's exo_pair; ERNIEKit has none."""
    e, x = s.label_smoothing, s.beta * t.margin
    e = paddle.to_tensor(e, x.dtype)
    chosen, rejected = F.log_sigmoid(x), F.log_sigmoid(-x)
    return paddle.exp(chosen) * (chosen - paddle.log1p(-e)) + paddle.exp(rejected) * (rejected - paddle.log(e))


def aot(t: _Terms, s: PreferenceSettings, across: Across) -> Tensor:
    """DPO's loss with each pair's log-ratio beside the reference's of the same rank in the step, not its own (alignment
    by optimal transport, arXiv 2406.05882, section 3, paired). TRL ranks within a micro-batch; ERNIEKit has none."""
    assert across.ref_ratios_N is not None
    ratios = t.logps.policy_chosen - t.logps.policy_rejected
    return _smoothed(s.beta * (ratios - across.ref_ratios_N), s.label_smoothing)


def odds_ratio(t: _Terms, _s: PreferenceSettings, _: Across) -> Tensor:
    """-log sigma(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) of the mean log-probability per token: the
    preference term of ORPO (arXiv 2403.07691, eq. 4 and 7), without a reference.

    ORPO's other term is the likelihood of the chosen answers (`sft_loss_ratio`); its lambda is `pref_loss_ratio`
    (TRL calls it beta). ERNIEKit: the same.
    """
    chosen, rejected = t.logps.policy_chosen, t.logps.policy_rejected
    odds = (chosen - rejected) - (paddle.log1p(-paddle.exp(chosen)) - paddle.log1p(-paddle.exp(rejected)))
    return -F.log_sigmoid(odds)


# ---------------------------------------------------------------------- each answer on its own
def kto_pair(t: _Terms, s: PreferenceSettings, across: Across) -> Tensor:
    """Mean of 1 - sigma(beta (chosen ratio - KL_rejected)) and 1 - sigma(beta (KL_chosen - rejected ratio)): KTO (arXiv
    2402.01306, section 4) on pairs, KL = max(0, the step's mean ratio of that side).

    As in ERNIEKit and old TRL, but for two things: theirs is the KL of a micro-batch, and lets the gradient through,
    against the paper.
    """
    chosen = F.sigmoid(s.beta * (t.chosen - across.kl_rejected))
    rejected = F.sigmoid(s.beta * (across.kl_chosen - t.rejected))
    return 1.0 - (chosen + rejected) / 2


def sppo_hard(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """(chosen ratio - 1 / (2 beta))^2 + (rejected ratio + 1 / (2 beta))^2: SPPO (arXiv 2405.00675, eq. 4.7) with the
    winner's probability taken as 1. ERNIEKit and TRL the same."""
    return paddle.square(t.chosen - 0.5 / s.beta) + paddle.square(t.rejected + 0.5 / s.beta)


def nca_pair(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """-log sigma(r_c) - (log sigma(-r_c) + log sigma(-r_r)) / 2 with r = beta ratio (NCA, arXiv 2402.05369, section 3,
    two answers). ERNIEKit and TRL the same."""
    chosen, rejected = s.beta * t.chosen, s.beta * t.rejected
    return -F.log_sigmoid(chosen) - 0.5 * F.log_sigmoid(-chosen) - 0.5 * F.log_sigmoid(-rejected)


def bco(t: _Terms, s: PreferenceSettings, across: Across) -> Tensor:
    """-log sigma(r_c - shift) - log sigma(-(r_r - shift)), r = beta ratio, shift = the running mean of all rewards
    (BCO, arXiv 2404.04656, section 3).

    TRL's bco_pair has lost the shift (it is ours at shift 0); ERNIEKit has none.
    """
    return -F.log_sigmoid(s.beta * t.chosen - across.shift) - F.log_sigmoid(across.shift - s.beta * t.rejected)


def apo_zero(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """1 - sigma(r_c) + sigma(r_r), r = beta ratio (arXiv 2408.06266, eq. 7): for chosen answers better than the model's
    own. TRL the same; ERNIEKit has none."""
    return 1.0 - F.sigmoid(s.beta * t.chosen) + F.sigmoid(s.beta * t.rejected)


def apo_down(t: _Terms, s: PreferenceSettings, _: Across) -> Tensor:
    """sigma(r_c) + 1 - sigma(r_c - r_r), r = beta ratio (arXiv 2408.06266, eq. 8): for chosen answers worse than the
    model's own. TRL the same; ERNIEKit has none."""
    return F.sigmoid(s.beta * t.chosen) + 1.0 - F.sigmoid(s.beta * (t.chosen - t.rejected))


LOSSES: dict[str, Callable[[_Terms, PreferenceSettings, Across], Tensor]] = {
    "sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "kto_pair": kto_pair, "simpo": simpo, "or": odds_ratio,
    "dpop": dpop, "sppo_hard": sppo_hard, "nca_pair": nca_pair, "robust": robust, "exo": exo, "bco": bco,
    "apo_zero": apo_zero, "apo_down": apo_down, "aot": aot, "orpo": odds_ratio,
}  # fmt: skip
ON_MEANS = ("ipo", "simpo", "or", "orpo")
ACROSS = ("kto_pair", "bco", "aot")  # look at all pairs of a step


# ---------------------------------------------------------------------- judged answers, and reward models
def kto_loss(
    ratios: Tensor, desirable: Tensor, *,
    beta: float, kl: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """w_d (1 - sigma(beta (ratio - kl))) where `desirable` [N], w_u (1 - sigma(beta (kl - ratio))) elsewhere.

    KTO (arXiv 2402.01306, section 4.1), and TRL's: the paper adds lambda - v, the same gradient. ERNIEKit has none.
    """
    sign = paddle.where(desirable, paddle.ones_like(ratios), -paddle.ones_like(ratios))
    weight = paddle.where(sign > 0, desirable_weight * paddle.ones_like(ratios), undesirable_weight * paddle.abs(sign))
    return weight * (1.0 - F.sigmoid(beta * sign * (ratios - kl)))


@paddle.no_grad()
def kto_kl(ratios: Tensor) -> float:
    """max(0, mean ratio) over answers that stand after other samples' prompts, all those of a step (TRL: those of a
    micro-batch): KTO's estimate of the KL to the reference, a constant."""
    return max(float(ratios.mean()), 0.0)


def reward_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma(reward of chosen - reward of rejected): Bradley-Terry (InstructGPT, arXiv 2203.02155, eq. 1)."""
    return -F.log_sigmoid(chosen - rejected)


def kl_estimate(ratios: Tensor, lengths: Tensor) -> Tensor:
    """exp(-d) - 1 + d, d = ratio / length: Schulman's third estimator of the KL to the reference, in nats per token; 0
    at the reference and never negative. A gauge: the answers were not drawn from the policy."""
    mean = ratios / lengths
    return paddle.expm1(-mean) + mean


def _smoothed(x: Tensor, e: float) -> Tensor:
    return -(1.0 - e) * F.log_sigmoid(x) - e * F.log_sigmoid(-x)

"""The objectives of the stages DPO, KTO and RM over a PreferenceBatch, and what is measured on held-out preferences.

A step's loss is the mean over all its samples, so each micro-batch divides by the samples of the step: the loss does
not depend on how samples share rows or micro-batches, nor on whether answers share their prompt. Losses that look at
all samples of a step (kto_pair, bco, aot; KTO's KL) do so in `begin`: where a step has several micro-batches, that is
one more forward pass over them, without gradients and without dropout.

Log-probabilities are summed over an answer in fp64: a margin is a small difference of large sums. Where those of the
reference come from is not known here: a `Reference` gives them.

Shapes: N samples, A answers of a batch, M labelled rows, B rows of a batch, S positions, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import Tensor

from erniekit.base.errors import DataError
from erniekit.config.align import AlignConfig
from erniekit.data.batch import NO_ANSWER, PreferenceBatch
from erniekit.losses.preference import (
    ACROSS,
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
)
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.reward import ErnieForReward
from erniekit.ops.cross_entropy import IGNORED
from erniekit.parallel.mesh import Mesh
from erniekit.training.objective import LossWeights, beside, run_trunk
from erniekit.training.samples import Counts, Seen, answer_lengths, gathered, joined
from erniekit.training.step import Losses, Totals

Reference = Callable[[ErnieForCausalLM, PreferenceBatch], Tensor]  # the reference's `answer_log_probs`


# ---------------------------------------------------------------------- log-probabilities of answers
@paddle.no_grad()
def answer_log_probs(model: ErnieForCausalLM, batch: PreferenceBatch) -> Tensor:
    """The model's log-probability of each answer, fp64 [A], without dropout; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    logps_A = _summed(model, run_trunk(model, batch).hidden_BSD, batch, np.arange(batch.num_answers))
    if was_training:
        model.train()
    return logps_A


def _summed(model: ErnieForCausalLM, hidden_BSD: Tensor, batch: PreferenceBatch, answers: np.ndarray) -> Tensor:
    """Log-probabilities of some of the batch's answers, fp64 [A]; those of the others are 0."""
    rows_M = np.flatnonzero((batch.labels != IGNORED) & np.isin(batch.answer_ids, answers))
    labels_M = paddle.to_tensor(batch.labels.ravel()[rows_M])
    logps_M = model.lm_head.log_probs(_rows(hidden_BSD, rows_M), labels_M)
    answers_M = paddle.to_tensor(batch.answer_ids.ravel()[rows_M].astype(np.int64))
    return paddle.zeros([batch.num_answers], "float64").index_add(answers_M, 0, logps_M.astype("float64"))


def _rows(hidden_BSD: Tensor, rows_M: np.ndarray) -> Tensor:
    return hidden_BSD.reshape([-1, hidden_BSD.shape[-1]]).gather(paddle.to_tensor(rows_M))


# ---------------------------------------------------------------------- what all three stages share
class _Scored(NamedTuple):
    """Of each sample the loss, and figures whose mean over the step is the step's figure: [N] each."""

    loss_N: Tensor
    figures: dict[str, Tensor]


class PreferenceObjective(ABC):
    """What the three have in common; callable as a training.step.Objective.

    `reference` None: the loss needs none. `weights` are those of the terms beside the preference loss. The samples of a
    step are those of all data ranks of the `mesh`.
    """

    looks_across = False  # whether the loss of a sample depends on the step's other samples

    def __init__(
        self, keys: AlignConfig, weights: LossWeights, *, reference: Reference | None = None,
        mesh: Mesh = Mesh.single(),
    ) -> None:  # fmt: skip
        self.keys, self.weights, self.reference, self.mesh = keys, weights, reference, mesh
        self._step = Counts()
        self._across: dict[int, Across] = {}  # by the identity of the step's micro-batches
        self._ref_logps: dict[int, Tensor] = {}

    @abstractmethod
    def _see(self, model: Any, batch: PreferenceBatch, hidden_BSD: Tensor) -> Seen:
        """What the loss is made from, with its gradients."""

    @abstractmethod
    def _score(self, seen: Seen, step: Counts, across: Across) -> _Scored:
        """The loss of each sample."""

    def _look(self, whole: Seen, *, learn: bool) -> Across:  # noqa: ARG002
        """What the loss takes from all samples of a step; `learn` where the run goes on from here."""
        return Across()

    def state(self) -> dict[str, Tensor]:
        """What the objective remembers from step to step."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` of an equal run returned."""
        assert not state, f"nothing is remembered here: {sorted(state)}"

    # ---- a step
    def begin(self, model: ErnieForCausalLM, batches: Sequence[PreferenceBatch]) -> None:
        """See Objective."""
        self._step, self._across, self._ref_logps = Counts.of(batches).over(self.mesh.axis("data")), {}, {}
        if not self.looks_across or len(batches) == 1:
            return
        if self.reference is not None:
            self._ref_logps = {id(batch): self.reference(model, batch) for batch in batches}
        seen = [self._see_quietly(model, batch) for batch in batches]
        everybodys, start = self._everybodys(joined(seen))
        across = self._look(everybodys, learn=True)
        for batch in batches:
            stop = start + len(batch.samples)
            self._across[id(batch)] = across.part(start, stop)
            start = stop

    def __call__(self, model: ErnieForCausalLM, batch: PreferenceBatch, totals: Totals) -> Losses:
        """The loss of one micro-batch, divided by the samples of the step."""
        if self.reference is not None and id(batch) not in self._ref_logps:
            self._ref_logps[id(batch)] = self.reference(model, batch)  # first: it may put other weights in for a moment
        trunk = run_trunk(model, batch)
        seen = self._see(model, batch, trunk.hidden_BSD)
        across = self._across.get(id(batch))
        if across is None:
            everybodys, start = self._everybodys(type(seen)(*(x.detach() for x in seen)))
            across = self._look(everybodys, learn=True).part(start, start + len(batch.samples))
        scored = self._score(seen, self._step, across)
        loss = (scored.loss_N.sum() / totals.pairs).astype("float32")
        counts = dataclasses.replace(totals, trained=self._step.chosen_tokens)
        made = beside(loss, model, trunk, batch, counts, weights=self.weights, ahead=_chosen_only(batch))
        figures = {name: value.detach().sum() / totals.pairs for name, value in scored.figures.items()}
        return made._replace(parts=figures | made.parts)

    def _everybodys(self, seen: Seen) -> tuple[Seen, int]:
        """What all data ranks have seen, rank after rank, where the loss looks at it; and where the own part begins."""
        return gathered(seen, self.mesh.axis("data")) if self.looks_across else (seen, 0)

    # ---- held-out samples
    def measure(
        self, model: ErnieForCausalLM, sources: Sequence[Iterable[PreferenceBatch]]
    ) -> list[dict[str, float]]:  # fmt: skip
        """eval_loss and the figures of a step over the samples of all sources, and then over those of each, as if they
        were one step. Raises DataError if a source has none."""
        self._ref_logps = {}
        seen: list[Seen] = []
        counts: list[Counts] = []
        for batches in sources:
            parts, count = list[Seen](), Counts()
            for batch in batches:
                found = self._see_quietly(model, batch)
                parts.append(found if batch.counts else type(found)(*(x[:0] for x in found)))
                count = count.plus(Counts.of([batch]))
            if not parts:
                raise DataError("an evaluation file gives no sample: it is empty, or none of its rows could be used.")
            self.mesh.meet("measured")  # some may have had more to do
            seen.append(gathered(joined(parts), self.mesh.axis("data"))[0])
            counts.append(count.over(self.mesh.axis("data")))
        whole = (joined(seen), functools.reduce(Counts.plus, counts))
        return [self._figures(*part) for part in (whole, *zip(seen, counts, strict=True))]

    def _figures(self, seen: Seen, count: Counts) -> dict[str, float]:
        scored = self._score(seen, count, self._look(seen, learn=False))
        found = {"loss": scored.loss_N, **scored.figures}
        return {f"eval_{name}": float(value.mean()) for name, value in found.items()} | {"eval_samples": count.samples}

    @paddle.no_grad()
    def _see_quietly(self, model: ErnieForCausalLM, batch: PreferenceBatch) -> Seen:
        was_training = model.training
        model.eval()
        seen = self._see(model, batch, run_trunk(model, batch).hidden_BSD)
        if was_training:
            model.train()
        return seen

    def _reference_logps(self, model: ErnieForCausalLM, batch: PreferenceBatch) -> Tensor:
        if self.reference is None:
            return paddle.zeros([batch.num_answers], "float64")
        known = self._ref_logps.get(id(batch))
        return self.reference(model, batch) if known is None else known


def _chosen_only(batch: PreferenceBatch) -> PreferenceBatch:
    """What multi-token prediction learns from."""
    of_chosen = np.isin(batch.answer_ids, batch.chosen[batch.desirable])
    return dataclasses.replace(batch, labels=np.where(of_chosen, batch.labels, IGNORED))


def _right(margin: Tensor) -> Tensor:
    """1 where the better answer is ahead, 1/2 where neither is."""
    return (margin > 0).astype(margin.dtype) + 0.5 * (margin == 0).astype(margin.dtype)


def _pick(values_A: Tensor, answers_N: np.ndarray) -> Tensor:
    return values_A.gather(paddle.to_tensor(answers_N))


# ---------------------------------------------------------------------- DPO
class _Pairs(NamedTuple):
    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    score_delta: Tensor

    @property
    def logps(self) -> PairLogps:
        return PairLogps(*self[:6])


class PairObjective(PreferenceObjective):
    """Stage DPO: a preference loss, and beside it the likelihood of the chosen answers if that is asked for.

    The running mean by which bco shifts rewards is state: it is saved with a checkpoint, in fp32 as it is kept.
    """

    def __init__(
        self, keys: AlignConfig, weights: LossWeights, *, reference: Reference | None = None,
        mesh: Mesh = Mesh.single(),
    ) -> None:  # fmt: skip
        super().__init__(keys, weights, reference=reference, mesh=mesh)
        self.looks_across = keys.loss_type in ACROSS
        self.settings = PreferenceSettings(
            beta=keys.beta, label_smoothing=keys.label_smoothing, simpo_gamma=keys.simpo_gamma,
            dpop_lambda=keys.dpop_lambda, offset_alpha=keys.offset_alpha, normalize_logps=keys.normalize_logps,
        )  # fmt: skip
        self._running = np.zeros(2, np.float32)  # of bco: the mean of the rewards so far, and of how many pairs

    def state(self) -> dict[str, Tensor]:
        """See PreferenceObjective."""
        return {"bco.running": paddle.to_tensor(self._running)} if self.keys.loss_type == "bco" else {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """See PreferenceObjective."""
        if self.keys.loss_type == "bco":
            self._running = np.array(state["bco.running"], np.float32)

    def _see(self, model: ErnieForCausalLM, batch: PreferenceBatch, hidden_BSD: Tensor) -> _Pairs:
        policy_A = _summed(model, hidden_BSD, batch, np.arange(batch.num_answers))
        ref_A = self._reference_logps(model, batch)
        lengths_A = paddle.to_tensor(answer_lengths(batch).astype(np.float64))
        sides = [_pick(x, answers) for x in (policy_A, ref_A, lengths_A) for answers in (batch.chosen, batch.rejected)]
        return _Pairs._make([*sides, paddle.to_tensor(batch.score_delta.astype(np.float64))])

    def _look(self, whole: _Pairs, *, learn: bool) -> Across:
        if self.keys.loss_type != "bco":
            return look_across(self.keys.loss_type, whole.logps, self.settings)
        mean, count = self._running
        if learn:
            sides = rewards(self.keys.loss_type, whole.logps, self.settings)
            new = len(whole.score_delta)
            mean += np.float32((float(paddle.concat(sides).mean()) - mean) * new / (count + new))
            self._running = np.array([mean, count + new], np.float32)
        return Across(shift=float(self._running[0]))

    def _score(self, seen: _Pairs, step: Counts, across: Across) -> _Scored:
        keys, logps = self.keys, seen.logps
        loss_N = keys.pref_loss_ratio * preference_loss(
            keys.loss_type, logps, self.settings, score_delta=seen.score_delta, across=across
        )
        chosen, rejected = rewards(keys.loss_type, logps, self.settings)
        ratios = (seen.policy_chosen - seen.ref_chosen, seen.policy_rejected - seen.ref_rejected)
        gauges = map(kl_estimate, ratios, (seen.chosen_lengths, seen.rejected_lengths))
        figures = {
            "rewards_chosen": chosen, "rewards_rejected": rejected, "margin": chosen - rejected,
            "accuracy": _right(chosen - rejected), "logps_chosen": seen.policy_chosen,
            "logps_rejected": seen.policy_rejected,
        }  # fmt: skip
        if self.reference is not None:
            figures["kl"] = sum(gauges) / 2
        if keys.sft_loss_ratio:
            figures["sft_loss"] = -seen.policy_chosen * (step.samples / max(step.chosen_tokens, 1))
            loss_N = loss_N + keys.sft_loss_ratio * figures["sft_loss"]
        return _Scored(loss_N, figures)


# ---------------------------------------------------------------------- KTO
class _Judged(NamedTuple):
    policy: Tensor
    ref: Tensor
    desirable: Tensor  # 1 or 0
    elsewhere: Tensor  # the log-ratio of another sample's answer after this prompt


class JudgedObjective(PreferenceObjective):
    """Stage KTO: answers that are desirable or not, each judged by itself."""

    looks_across = True

    def _see(self, model: ErnieForCausalLM, batch: PreferenceBatch, hidden_BSD: Tensor) -> _Judged:
        assert (batch.mismatched != NO_ANSWER).all(), "KTO needs a mismatched answer in every sample"
        ref_A = self._reference_logps(model, batch)
        with paddle.no_grad():
            elsewhere_A = _summed(model, hidden_BSD, batch, batch.mismatched) - ref_A
        policy_A = _summed(model, hidden_BSD, batch, batch.judged)
        policy_N, ref_N = _pick(policy_A, batch.judged), _pick(ref_A, batch.judged)
        desirable_N = paddle.to_tensor(batch.desirable.astype(np.float64))
        return _Judged(policy_N, ref_N, desirable_N, _pick(elsewhere_A, batch.mismatched))

    def _look(self, whole: _Judged, *, learn: bool) -> Across:  # noqa: ARG002
        return Across(kl=kto_kl(whole.elsewhere))

    def _score(self, seen: _Judged, step: Counts, across: Across) -> _Scored:
        keys, ratios = self.keys, seen.policy - seen.ref
        loss_N = kto_loss(
            ratios, seen.desirable > 0, beta=keys.beta, kl=across.kl,
            desirable_weight=keys.kto_desirable_weight, undesirable_weight=keys.kto_undesirable_weight,
        )  # fmt: skip
        figures = {"accuracy": _right((ratios - across.kl) * (2 * seen.desirable - 1))}
        sides = {"chosen": (seen.desirable, step.chosen), "rejected": (1 - seen.desirable, step.samples - step.chosen)}
        for side, (mask, count) in sides.items():
            if count:  # means over one side, so that a step's figure is the mean of that side
                figures[f"rewards_{side}"] = keys.beta * ratios * mask * (step.samples / count)
                figures[f"logps_{side}"] = seen.policy * mask * (step.samples / count)
        if 0 < step.chosen < step.samples:
            figures["margin"] = figures["rewards_chosen"] - figures["rewards_rejected"]
        figures["kl"] = paddle.full_like(ratios, across.kl)
        return _Scored(loss_N, figures)


# ---------------------------------------------------------------------- RM
class _Rewards(NamedTuple):
    chosen: Tensor
    rejected: Tensor


class RewardObjective(PreferenceObjective):
    """Stage RM: a reward for each answer, read at its last token; the chosen one's should be higher."""

    def _see(self, model: ErnieForReward, batch: PreferenceBatch, hidden_BSD: Tensor) -> _Rewards:
        rewards_A = answer_rewards(model, hidden_BSD, batch)
        return _Rewards(_pick(rewards_A, batch.chosen), _pick(rewards_A, batch.rejected))

    def _score(self, seen: _Rewards, step: Counts, across: Across) -> _Scored:  # noqa: ARG002
        margin = seen.chosen - seen.rejected
        figures = {
            "rewards_chosen": seen.chosen, "rewards_rejected": seen.rejected, "margin": margin,
            "accuracy": _right(margin),
        }  # fmt: skip
        return _Scored(reward_loss(seen.chosen, seen.rejected), figures)


def answer_rewards(model: ErnieForReward, hidden_BSD: Tensor, batch: PreferenceBatch) -> Tensor:
    """The reward of each answer of a batch, [A]: read at the last position of its branch."""
    ids = batch.answer_ids.ravel()
    last_A = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1][-batch.num_answers :]
    return model.rewards(_rows(hidden_BSD, last_A))


# ---------------------------------------------------------------------- the objective of a stage
_STAGES: dict[str, type[PreferenceObjective]] = {"DPO": PairObjective, "KTO": JudgedObjective, "RM": RewardObjective}


def preference_objective(
    stage: str, keys: AlignConfig, weights: LossWeights, *, reference: Reference | None, mesh: Mesh = Mesh.single()
) -> PreferenceObjective:
    """The objective of stage DPO, KTO or RM."""
    return _STAGES[stage](keys, weights, reference=reference, mesh=mesh)

"""Keys of preference training. They have an effect in the stages DPO, KTO and RM only."""

from dataclasses import dataclass

from erniekit.config.keys import inert, key
from erniekit.config.model import PREFERENCE_STAGES

_PREFERENCE = ("stage", PREFERENCE_STAGES)
_DPO = ("stage", ("DPO",))
_KTO = ("stage", ("KTO",))
_WITH_REFERENCE = ("stage", ("DPO", "KTO"))

REFERENCE_FREE = ("simpo", "or", "orpo")  # losses that have no reference in them
ON_THE_MARGIN = ("sigmoid", "hinge", "ipo", "simpo", "dpop", "robust", "exo")  # offset_alpha shifts what they look at
SMOOTHED = ("sigmoid", "simpo", "robust", "exo", "aot")  # label_smoothing is in their formula


@dataclass(frozen=True)
class AlignConfig:
    """The preference loss and its reference."""

    loss_type: str = key(
        "sigmoid", "The loss over pairs (formulas: erniekit/losses/preference.py). orpo is `or` with sft_loss_ratio 1 "
        "unless that is set.", only=_DPO,
        choices=("sigmoid", "hinge", "ipo", "kto_pair", "simpo", "or", "orpo", "dpop", "sppo_hard", "nca_pair",
                 "robust", "exo", "bco", "apo_zero", "apo_down", "aot"),
        spellings={"exo_pair": "exo", "bco_pair": "bco"},
    )
    beta: float = key(
        0.1, "How far the policy may leave the reference: less is further.", only=_WITH_REFERENCE, above=0
    )
    label_smoothing: float = key(
        0.0, "Share of pairs taken to be labelled wrongly (sigmoid, simpo, robust, exo, aot).", only=_DPO, least=0,
        most=1,
    )
    normalize_logps: bool = key(
        True, "Scale log-probabilities to the pair's mean length, as ERNIEKit does; ipo, simpo and or take means per "
        "token anyway. TRL has no such thing: its beta means the same only where both answers are of one length.",
        only=_DPO,
    )
    offset_alpha: float = key(
        0.0, "Weight of a pair's score difference: the margin has to exceed offset_alpha / beta * log(difference).",
        only=_DPO,
    )
    simpo_gamma: float = key(0.5, "Margin of simpo.", only=_DPO)
    dpop_lambda: float = key(50.0, "Weight of dpop's penalty.", only=_DPO, least=0)
    pref_loss_ratio: float = key(1.0, "Weight of the preference loss.", only=_DPO, least=0)
    sft_loss_ratio: float = key(
        0.0, "Weight of the likelihood of the chosen answers, a mean over their tokens.", only=_DPO, least=0
    )
    kto_desirable_weight: float = key(
        1.0, "Weight of desirable answers in KTO.", only=_KTO, least=0
    )
    kto_undesirable_weight: float = key(
        1.0, "Weight of undesirable answers in KTO.", only=_KTO, least=0
    )
    reference_free: bool = key(
        False, "Train without a reference model. simpo, or and orpo do so anyway; the other losses refuse it.",
        only=_WITH_REFERENCE,
    )
    ref_model_update_steps: int = key(
        -1, "After every so many steps the reference becomes the policy as it is then: a copy of what is trained is "
        "kept in host memory and in checkpoints. -1: never.", only=_WITH_REFERENCE,
    )
    max_prompt_len: int = key(
        2048, "Longest prompt in tokens: a longer one loses its oldest turns; a row whose last turn alone is longer is "
        "dropped.", only=_PREFERENCE, least=1,
    )
    num_comparisons: int = key(
        6, "Most pairs that a row with more than two ranked answers makes, those farthest apart in rank first.",
        only=("stage", ("DPO", "RM")), least=1,
    )
    mask_out_eos_token: bool = key(
        True, "Leave the token that ends an answer untrained, as ERNIEKit does in its preference training.",
        only=("stage", ("DPO", "KTO")),
    )
    share_prompt: bool = key(
        True, "Compute the prompt once for all its answers; False computes it again for each of them.",
        only=_PREFERENCE,
    )
    num_of_gpus: int = inert(-1, "Devices of ERNIEKit's benchmark; train_log.jsonl has the speed of every step.")
    dpo_benchmark: bool = inert(False, "ERNIEKit's measurement of speed; train_log.jsonl has that of every step.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss over pairs looks at a reference."""
        return self.loss_type not in REFERENCE_FREE

    def compares(self, stage: str) -> bool:
        """Whether a run of `stage` has a reference."""
        return not self.reference_free and (stage == "KTO" or (stage == "DPO" and self.needs_reference))

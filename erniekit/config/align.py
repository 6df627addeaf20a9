"""Keys of preference training. They have an effect in the stages DPO, KTO and RM only."""

from dataclasses import dataclass

from erniekit.config.keys import key, later
from erniekit.config.model import PREFERENCE_STAGES

_PREFERENCE = ("stage", PREFERENCE_STAGES)


@dataclass(frozen=True)
class AlignConfig:
    """The preference loss and its reference."""

    loss_type: str = later(
        "sigmoid", "The loss.", only=_PREFERENCE,
        choices=("sigmoid", "hinge", "ipo", "kto_pair", "simpo", "or", "dpop", "sppo_hard", "nca_pair"),
        spellings={"orpo": "or"},
    )
    beta: float = later(0.1, "How far the policy may leave the reference: less is further.", only=_PREFERENCE, above=0)
    label_smoothing: float = later(
        0.0, "Share of pairs taken to be labelled wrongly.", only=_PREFERENCE, least=0, most=1
    )
    normalize_logps: bool = later(
        True, "Scale log-probabilities to the pair's mean length, as ERNIEKit does.", only=_PREFERENCE
    )
    offset_alpha: float = later(0.0, "Weight of the score difference of a pair.", only=_PREFERENCE)
    simpo_gamma: float = later(0.5, "Margin of simpo.", only=_PREFERENCE)
    dpop_lambda: float = later(50.0, "Weight of dpop's penalty.", only=_PREFERENCE)
    pref_loss_ratio: float = later(1.0, "Weight of the preference loss.", only=_PREFERENCE, least=0)
    sft_loss_ratio: float = later(0.0, "Weight of the likelihood of the chosen answer.", only=_PREFERENCE, least=0)
    reference_free: bool = later(False, "Train without a reference model.", only=_PREFERENCE)
    ref_model_update_steps: int = later(-1, "Steps between updates of the reference; -1: never.", only=_PREFERENCE)
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
    num_of_gpus: int = later(-1, "Devices of the benchmark.", only=_PREFERENCE)
    dpo_benchmark: bool = later(False, "Measure speed only.", only=_PREFERENCE)

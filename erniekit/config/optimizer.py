"""Keys of the optimizer: the learning rate and its course, what is trained and how fast, moments, averages, dropout."""

from dataclasses import dataclass

from erniekit.config.keys import Alias, key, later
from erniekit.config.model import VISION_STAGES

_ENDING = ("lr_scheduler_type", ("linear", "cosine", "polynomial", "wsd"))
_FALLING = ("lr_scheduler_type", ("linear", "cosine", "wsd"))
_COSINE = ("lr_scheduler_type", ("cosine",))
_POLYNOMIAL = ("lr_scheduler_type", ("polynomial",))
_WSD = ("lr_scheduler_type", ("wsd",))


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move."""

    learning_rate: float = key(5e-05, "Largest learning rate.", least=0)
    min_lr: float = key(0.0, "Learning rate at the end of the schedule.", least=0, only=_FALLING)
    lr_scheduler_type: str = key(
        "linear", "Course of the learning rate after warm-up: down to min_lr (polynomial: to lr_end), or flat. wsd: "
        "flat up to steady_steps, then down.",
        choices=("linear", "cosine", "constant", "polynomial", "wsd"), spellings={"constant_with_warmup": "constant"},
    )
    warmup_steps: int = key(0, "Steps of linear warm-up; if positive it beats warmup_ratio.", least=0)
    warmup_ratio: float = key(0.0, "Warm-up as a share of all steps.", least=0, most=1)
    decay_steps: int | None = key(
        None, "The step at which the learning rate has come down; it stays there. null: the last step of the run.",
        least=1, only=_ENDING,
    )
    num_cycles: float = key(0.5, "Waves of the cosine; 0.5 is one way down.", above=0, only=_COSINE)
    lr_end: float = key(1e-07, "Last learning rate of the polynomial schedule.", least=0, only=_POLYNOMIAL)
    power: float = key(1.0, "Exponent of the polynomial schedule; 1 is a straight line.", above=0, only=_POLYNOMIAL)
    steady_steps: int | None = key(
        None, "The step at which wsd begins to fall; null: after nine tenths of the way to decay_steps.", least=1,
        only=_WSD,
    )
    decay_function: str = key(
        "half_life", "How wsd falls: exponentially to a twentieth and rescaled, or as 1 minus a square root.",
        choices=("half_life", "1-sqrt"), only=_WSD,
    )

    optim: str = key(
        "adamw", "Optimizer. muon: matrices inside the layers by orthogonalised momentum, everything else by AdamW; "
        "adamw_16bit_moment: AdamW with use_lowprecision_moment.",
        choices=("adamw", "muon", "adamw_16bit_moment"), later=("adamw_mini", "adafactor", "sgd"),
        spellings={"adamw_custom": "adamw"},
    )
    weight_decay: float = key(0.0, "Decoupled weight decay; none on norms, biases and the correction bias.", least=0)
    adam_beta1: float = key(0.9, "Decay of the first moment.", least=0, most=0.999999)
    adam_beta2: float = key(0.999, "Decay of the second moment.", least=0, most=0.9999999)
    adam_epsilon: float = key(1e-08, "Added to the root of the second moment.", above=0)
    max_grad_norm: float = key(1.0, "Clip the global gradient norm; 0 does not clip.", least=0)
    adaptive_norm_clip: bool | None = key(
        False, "After 100 steps, clip every tensor's gradient to 1.03 times a running norm of its own (AdaGC) in place "
        "of the global norm.",
    )
    use_lowprecision_moment: bool = key(
        False, "Keep the optimizer's moments in bf16: half the memory, dithered so that slow averages go on moving. "
        "Unless said, true with fp8_recipe qat.",
    )

    freeze: list[str] | None = key(
        None, "Parameters that are not trained: regular expressions that are looked for in the parameters' names."
    )
    train_only: list[str] | None = key(
        None, "Train only parameters whose names one of these regular expressions is found in; freeze takes away."
    )
    train_emb_only: int | bool = key(0, "Train the token embedding only.", least=0, most=1)
    train_moe_only: int | bool | None = key(None, "Train the routed experts and the routers only.", least=0, most=1)
    freeze_config: str | None = later(
        None, "Freeze the vision tower or the language model.", only=("stage", VISION_STAGES)
    )
    lr_multipliers: dict | None = key(
        None, "Regular expression: factor on the learning rate of the parameters in whose names it is found."
    )
    moe_gate_lr_ratio: float | None = key(
        None, "Factor on the learning rate of the routers. (ERNIEKit's pattern matches no router.)", above=0
    )
    layerwise_lr_decay_bound: float = key(
        1.0, "Factor on the learning rate of the embedding; it rises in equal steps, layer by layer, to 1 at the head.",
        above=0, most=1,
    )

    ema_decay: float | None = key(
        None, "Keep a moving average of the weights, of which an update keeps this share, and save it in "
        "output_dir/ema; null: none.",
        least=0, most=0.9999999, aliases=(Alias("zcc_save_ema_coef"),),
    )
    zcc_ema_interval: int = key(1, "Steps between updates of the moving average.", least=1)

    hidden_dropout_prob: float = key(
        0.0, "Dropout on what attention and MLP add to the hidden states; layer i of n gets i/n of it.",
        least=0, most=0.999,
    )
    attention_probs_dropout_prob: float = key(
        0.0, "Dropout on the attention weights; layer i of n gets i/n of it.", least=0, most=0.999
    )
    dropout_warmup_steps: int = key(0, "Steps over which both dropouts rise from 0.", least=0)
    moe_dropout_prob: float = later(0.0, "Dropout inside experts.", least=0, most=1, only=("stage", VISION_STAGES))

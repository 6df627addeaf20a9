"""Keys about number formats: quantised weights, FP8 training and mixed-precision switches.

The format itself is `compute_type` (model.py). Weights and optimizer states are fp32 masters, gradients are summed in
fp32; the switches that ask for this elsewhere have nothing left to do.
"""

from dataclasses import dataclass

from erniekit.config.keys import inert, key, later
from erniekit.config.model import QUANTISED

_FP8 = ("compute_type", ("fp8",))


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats beyond `compute_type`."""

    group_size: int | None = key(
        None, "Inputs that share a scale in a quantised weight; -1: all inputs of an output do. null: 64 for nf4, else "
        "-1.",
        only=("compute_type", QUANTISED), least=-1,
    )
    apply_hadamard: bool = later(True, "Rotate blocks before quantising: FP8 quantisation-aware training.", only=_FP8)
    hadamard_block_size: int = later(32, "Size of the rotated blocks.", only=_FP8, least=1)
    fp8_format_type: str = later("hybrid", "FP8 formats of the forward and backward pass.", only=_FP8)
    quant_input_grad: bool = later(False, "Quantise the gradient of inputs.", only=_FP8)
    quant_weight_grad: bool = later(False, "Quantise the gradient of weights.", only=_FP8)
    apply_online_actscale_step: int = later(200, "Step from which activation scales are averaged.", only=_FP8, least=0)
    actscale_moving_rate: float = later(0.01, "Rate of that average.", only=_FP8, least=0, most=1)
    fp8_force_clear_state: bool = later(False, "Forget activation scales on resume.", only=_FP8)
    enable_fp8_quantize_analysis: bool = later(False, "Record quantisation errors.", only=_FP8)
    amp_master_grad: bool = inert(False, "fp32 gradients; here always.", idle=(True,))
    fp16_opt_level: str = inert("O1", "Level of Paddle's automatic mixed precision; not used here.", idle=("O1", "O2"))
    scale_loss: float = inert(32768.0, "Start of the loss scale; only fp16 needs one.")
    bf16_full_eval: bool = inert(False, "Evaluate in bf16; here evaluation computes as training does.")
    fp16_full_eval: bool = inert(False, "Evaluate in fp16; here evaluation computes as training does.")
    amp_custom_black_list: list[str] | None = inert(None, "Operators to keep in fp32.")
    amp_custom_white_list: list[str] | None = inert(None, "Operators to run in low precision.")

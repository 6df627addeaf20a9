"""Keys about number formats: quantised weights, FP8 training and mixed-precision switches.

The format itself is `compute_type` (model.py); what the FP8 keys come to is fp8.py's. Weights and optimizer states are
fp32 masters, gradients are summed in fp32; the switches that ask for this elsewhere have nothing left to do.
"""

from dataclasses import dataclass

from erniekit.config.keys import SPEED, inert, key
from erniekit.config.model import QUANTISED

_FP8 = ("compute_type", ("fp8",))
_QAT = ("fp8_recipe", ("qat",))


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats beyond `compute_type`."""

    group_size: int | None = key(
        None, "Inputs that share a scale in a quantised weight; -1: all inputs of an output do. null: 64 for nf4, else "
        "-1.",
        only=("compute_type", QUANTISED), least=-1,
    )
    fp8_recipe: str | None = key(
        None, "How FP8 trains. blockwise: products forward and backward in E4M3, a scale for 1 x 128 numbers of "
        "activations and gradients and 128 x 128 of weights. qat: quantisation-aware, rotated, one scale per tensor, "
        "gradients in bf16. null: blockwise in stage PT, else qat; a file that sets apply_hadamard means qat.",
        choices=("blockwise", "qat"), only=_FP8,
    )
    fp8_modules: list[str] | None = key(
        None, "What computes in FP8; everything else stays as with bf16. null: experts, shared_experts and mlp, and "
        "with qat attention, too.",
        choices=("experts", "shared_experts", "mlp", "attention"), only=_FP8,
    )
    fp8_emulate: bool = key(
        False, "Compute the exact numbers of FP8 on any device: codes and scales as they are, products of what they "
        "stand for in fp32. Slower than bf16.", only=_FP8, resume="free",
    )
    fp8_check_every: int = key(
        0, "Every so many steps, compare every FP8 module's output with the one of unrounded inputs and warn of layers "
        "that are far off; 0: never.", only=_FP8, least=0, effect=SPEED,
    )
    enable_fp8_quantize_analysis: bool = key(
        False, "Log amax, underflow and overflow of every layer, not only the worst of all layers.", only=_FP8,
        effect=SPEED,
    )
    apply_hadamard: bool = key(
        True, "Rotate inputs and weights in blocks before they are quantised, so that outliers spread.", only=_QAT
    )
    hadamard_block_size: int = key(32, "Size of the rotated blocks; only 32 is built.", only=_QAT, least=1)
    fp8_format_type: str = key(
        "hybrid", "Format of quantised gradients: hybrid is E5M2, e4m3 that of weights and activations.",
        choices=("hybrid", "e4m3"), only=_QAT,
    )
    quant_input_grad: bool = key(False, "Quantise the output's gradient for the gradient of inputs.", only=_QAT)
    quant_weight_grad: bool = key(False, "Quantise the output's gradient for the gradient of weights.", only=_QAT)
    apply_online_actscale_step: int = key(
        200, "Steps in which activations are quantised with their current scale, while a running mean is kept; later, "
        "with a moving average that goes on from it.", only=_QAT, least=0,
    )
    actscale_moving_rate: float = key(
        0.01, "Share of a step's scale in that moving average.", only=_QAT, least=0, most=1
    )
    fp8_force_clear_state: bool = key(
        False, "Forget activation scales when a run goes on.", only=_QAT, resume="free"
    )
    amp_master_grad: bool = inert(False, "fp32 gradients; here always.", idle=(True,))
    fp16_opt_level: str = inert("O1", "Level of Paddle's automatic mixed precision; not used here.", idle=("O1", "O2"))
    scale_loss: float = inert(32768.0, "Start of the loss scale; only fp16 needs one.")
    bf16_full_eval: bool = inert(False, "Evaluate in bf16; here evaluation computes as training does.")
    fp16_full_eval: bool = inert(False, "Evaluate in fp16; here evaluation computes as training does.")
    amp_custom_black_list: list[str] | None = inert(None, "Operators to keep in fp32.")
    amp_custom_white_list: list[str] | None = inert(None, "Operators to run in low precision.")

"""Keys of the model: which one, what is trained of it, and the terms of its loss.

The architecture itself is the checkpoint's config.json (architecture.py); a key here that is null leaves it alone.
"""

from dataclasses import dataclass

from erniekit.config.keys import Alias, inert, key, later

VISION_STAGES = ("VL-SFT", "OCR-SFT")
PREFERENCE_STAGES = ("DPO", "KTO", "RM")
REINFORCEMENT_STAGES = ("PPO", "GRPO", "GSPO", "RL")

QUANTISED = ("wint8", "wint4/8", "wint4", "nf4")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained, and for what."""

    model_name_or_path: str | None = key(None, "The model: a folder in -PT or -Paddle layout.")
    download_hub: str | None = key(
        None, "The hub that a repository (owner/name) is downloaded from; null: huggingface.",
        choices=("huggingface", "modelscope", "aistudio"), resume="free",
    )
    stage: str = key(
        "SFT", "What kind of training: PT is pre-training on text, SFT is supervised fine-tuning on dialogues, DPO is "
        "training on pairs of answers (`loss_type` says how), KTO on answers judged one by one, RM of a reward model.",
        choices=("PT", "SFT", *PREFERENCE_STAGES), later=(*VISION_STAGES, *REINFORCEMENT_STAGES),
    )
    fine_tuning: str = key(
        "Full", "What is trained: all parameters, or low-rank adapters beside a frozen base. ERNIEKit trains LoRA when "
        "the key is absent; a notice says so.",
        choices=("Full", "LoRA"), there="LoRA",
        aliases=(Alias("lora", bool, {True: ("LoRA",), False: ("Full",)}),),
    )
    compute_type: str = key(
        "bf16", "Number format of the computation; on a CPU all compute in fp32, apart from what fp8_emulate rounds. "
        "Quantised ones keep frozen weights small: wint8, wint4, nf4, and wint4/8 (routed experts in 4 bits, other "
        "linear layers in 8).",
        choices=("bf16", "fp32", "fp8", *QUANTISED), later=("fp16",),
        spellings={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
        aliases=(
            Alias("bf16", bool, {True: ("bf16", "fp8", *QUANTISED), False: ("fp32", "fp16")}),
            Alias("fp16", bool, {True: ("fp16",), False: ()}),
            Alias("use_fp8", bool, {True: ("fp8",), False: ()}),
            Alias("weight_quantize_algo", str | None, {
                "weight_only_int8": ("wint8",), "weight_only_mix": ("wint4/8",), "weight_only_int4": ("wint4",),
                "fp8linear": ("fp8",), **{name: (name,) for name in QUANTISED}, None: (),
            }),
        ),
    )
    cpu_bf16_matmul: bool = key(
        False, "On a CPU with bf16 instructions, round the inputs of matrix products to bf16: faster, and each product "
        "is off by about 2.5e-3 of its maximum. Sums stay in fp32.",
    )
    num_nextn_predict_layers: int | None = key(
        None, "Multi-token prediction: 1 trains its block, 0 leaves it off; null: as the checkpoint has it.",
        there=0, least=0, most=1,
    )
    multi_token_pred_lambda: float | None = key(
        None, "Weight of the multi-token prediction loss; null: the checkpoint's, else 0.3.", there=0.3, least=0,
    )
    mtp_init: str | None = key(
        None, "`random`: start the multi-token prediction block from random weights where the checkpoint has none.",
        choices=("random",),
    )
    moe_aux_loss_lambda: float | None = key(
        None, "Weight of the load-balancing loss; null: the checkpoint's, else 1e-5.", there=1e-05, least=0,
    )
    moe_z_loss_lambda: float | None = key(
        None, "Weight of the router z-loss; null: the checkpoint's, else 0.", there=0.0, least=0,
    )
    moe_orthogonal_loss_lambda: float | None = key(
        None, "Weight of the router's orthogonality term; null: the checkpoint's, else 0.", there=0.0, least=0,
    )
    use_ortho_loss_callback: bool = key(
        False, "Apply the orthogonality term as a step of its own after the optimizer's, without the learning rate.",
    )
    moe_use_aux_free: bool | None = key(
        None, "Balance experts by the correction bias, updated after every step; null: as the checkpoint says.",
    )
    moe_use_aux_free_update_coef: float = key(0.001, "Step of the correction bias; 0 freezes it.", least=0)
    token_balance_loss: bool = key(
        False, "Divide a micro-batch's loss by all its positions, not by its trained ones (logged loss unchanged).",
    )
    moe_group_experts: bool | None = later(False, "Choose one expert in each of k groups.")
    moe_gate: str = later(
        "top2_fused", "Kind of router; the checkpoint's moe_k says how many experts a token gets.",
        idle=("top2", "topk", "top2_fused"),
    )
    multimodal: bool = later(False, "Train a vision-language model.", only=("stage", VISION_STAGES))
    use_moe: bool | None = inert(False, "Whether the model has experts; its config.json says so.")
    use_huggingface_model: bool = inert(False, "Layout of the model folder; it is told by the tensor names.")
    convert_from_hf: bool = inert(True, "Layout of the model folder; it is told by the tensor names.")
    bos_token_id: int | None = inert(None, "The tokenizer and the checkpoint say so.", there=0)
    eos_token_id: int | None = inert(None, "The tokenizer and the checkpoint say so.", there=1)
    pad_token_id: int | None = inert(None, "The tokenizer and the checkpoint say so.", there=0)
    max_position_embeddings: int | None = inert(
        None, "The checkpoint says so; rotary positions need no table.", there=4096,
    )

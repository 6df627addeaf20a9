"""What the keys of FP8 training come to: the settings that precision/ is handed, and what keeps a run from having them.

Modules have their names in memory, as in packing.py. Knows keys, names and sizes; no number (precision/) and no device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from erniekit.config.layout_rules import Degrees, quote, text_value

if TYPE_CHECKING:
    from erniekit.config.architecture import ErnieConfig
    from erniekit.config.run import RunConfig

Recipe = Literal["blockwise", "qat"]
Finding = tuple[tuple[str, ...], str]

MODULES = {
    "experts": r"\.mlp\.experts(\.(gate_up|down)_proj)?$",
    "shared_experts": r"\.mlp\.shared_experts\.(gate|up|down)_proj$",
    "mlp": r"\.mlp\.(gate|up|down)_proj$",
    "attention": r"\.self_attn\.[qkvo]_proj$",
}
_DEFAULT: dict[Recipe, tuple[str, ...]] = {"blockwise": ("experts", "shared_experts", "mlp"), "qat": tuple(MODULES)}
BLOCK = 128  # numbers of a row that share a scale, and the side of a weight's square
ROTATED = 32  # numbers that a Hadamard matrix mixes
_UPDATES = "ref_model_update_steps"


@dataclass(frozen=True)
class Qat:
    """Quantisation-aware training: what only this recipe has."""

    rotate: bool
    quant_input_grad: bool
    quant_weight_grad: bool
    gradients: Literal["e5m2", "e4m3"]
    online_steps: int
    moving_rate: float
    forget: bool  # the activation scales of the checkpoint that a run goes on from


@dataclass(frozen=True)
class Fp8:
    """FP8 training as a run sets it. `qat` is None for the blockwise recipe. `details`: figures of every layer."""

    recipe: Recipe
    modules: tuple[str, ...]
    emulate: bool
    check_every: int = 0
    details: bool = False
    qat: Qat | None = None

    @property
    def numbers(self) -> str:
        """What the outputs of a model depend on that was not trained yet."""
        return f"{self.recipe} {' '.join(self.modules)}{' rotated' if self.qat and self.qat.rotate else ''}"

    def covers(self, module: str) -> bool:
        """Whether a module computes in FP8: a Linear, the stacked experts, or one of their two weights."""
        return any(re.search(MODULES[word], module) for word in self.modules)


def fp8_of(config: RunConfig) -> Fp8 | None:
    """What a run's keys ask for; None unless `compute_type` is fp8."""
    if config.model.compute_type != "fp8":
        return None
    keys, recipe = config.precision, cast(Recipe, config.precision.fp8_recipe)
    qat = Qat(
        rotate=keys.apply_hadamard,
        quant_input_grad=keys.quant_input_grad, quant_weight_grad=keys.quant_weight_grad,
        gradients="e5m2" if keys.fp8_format_type == "hybrid" else "e4m3",
        online_steps=keys.apply_online_actscale_step, moving_rate=keys.actscale_moving_rate,
        forget=keys.fp8_force_clear_state,
    )  # fmt: skip
    return Fp8(
        recipe, tuple(keys.fp8_modules or _DEFAULT[recipe]), emulate=keys.fp8_emulate,
        check_every=keys.fp8_check_every, details=keys.enable_fp8_quantize_analysis,
        qat=qat if recipe == "qat" else None,
    )  # fmt: skip


# ---------------------------------------------------------------------- what the file alone says
def fp8_problems(config: RunConfig) -> Iterator[Finding]:
    """Keys that FP8 training excludes, each pair named."""
    if config.model.compute_type != "fp8":
        return
    keys = config.precision
    if config.model.fine_tuning == "LoRA" and keys.fp8_recipe == "qat":
        why = "quantisation-aware training is of the weights that LoRA freezes; set fp8_recipe to blockwise"
        yield _both(config, "fine_tuning", why)
    if config.model.cpu_bf16_matmul:
        yield _both(config, "cpu_bf16_matmul", "each says how products are rounded; set cpu_bf16_matmul to false")
    if config.parallel.sharding == "stage3" and keys.fp8_recipe == "qat":
        why = "qat keeps FP8 copies of weights for a step, and stage3 lets go of them by layer; set sharding to stage2"
        yield _both(config, "sharding", why)
    if keys.fp8_recipe == "qat" and config.align.ref_model_update_steps > 0 and config.has_effect(_UPDATES):
        yield _both(config, _UPDATES, "the codes that are kept are those of the policy's weights; set it to -1")
    if keys.fp8_recipe == "blockwise" and keys.apply_hadamard and config.given("apply_hadamard"):
        yield ("fp8_recipe", "apply_hadamard"), (
            f"{quote(config, 'fp8_recipe')} rotates nothing, and {quote(config, 'apply_hadamard')} asks for "
            "quantisation-aware training; delete one of them, or set fp8_recipe to qat"
        )
    if config.has_effect("hadamard_block_size") and keys.hadamard_block_size != ROTATED:
        yield ("hadamard_block_size",), (
            f"{quote(config, 'hadamard_block_size')}: only blocks of {ROTATED} are built; leave the key out"
        )


def _both(config: RunConfig, name: str, why: str) -> Finding:
    names = (name, "compute_type")
    return names, f"{quote(config, name)} and {quote(config, 'compute_type')} exclude each other: {why}"


# ---------------------------------------------------------------------- what the model's sizes say
class _Size(NamedTuple):
    """Numbers along which a kind of module is quantised, on one rank."""

    word: str
    module: str
    key: str  # of config.json
    whole: int
    ranks: int


def fp8_misfits(config: RunConfig, arch: ErnieConfig, asked: Degrees) -> Iterator[str]:
    """Every size that is no multiple of the blocks, on a rank that holds its part of it."""
    settings = fp8_of(config)
    if settings is None:
        return
    block = BLOCK if settings.recipe == "blockwise" else ROTATED
    wrong = [
        size for size in _sizes(arch, asked, settings)
        if size.whole % size.ranks == 0 and size.whole // size.ranks % block
    ]  # fmt: skip
    for size in wrong:
        shared = size.ranks > 1
        part = f"{size.whole // size.ranks} of {size.key} {size.whole}" if shared else f"{size.key} {size.whole}"
        by = f" on each of the {size.ranks} devices of {quote(config, 'tensor_parallel_degree')}" if shared else ""
        left = [word for word in settings.modules if word not in {other.word for other in wrong}]
        ways = [f"fp8_modules=[{', '.join(left)}]"] if left else ["compute_type=bf16"]
        if shared and size.whole % block == 0:
            ways.append("a smaller tensor_parallel_degree")
        yield (
            f"{quote(config, 'compute_type')} ({settings.recipe}) quantises {size.module} in blocks of {block}, and it "
            f"has {part}{by}, no multiple of {block}; set {' or '.join(ways)}"
        )


def _sizes(arch: ErnieConfig, asked: Degrees, settings: Fp8) -> Iterator[_Size]:
    """Sizes along which rows lie in blocks: inputs, and with the blockwise recipe outputs (of gradients), too."""
    sparse, layers = set(arch.moe_layers), range(arch.num_hidden_layers)
    first_sparse = next(iter(sorted(sparse)), None)
    first_dense = next((layer for layer in layers if layer not in sparse), None)
    width, tensor = text_value(arch.moe_intermediate_size), asked.tensor
    expert_ranks = 1 if asked.experts_over_tensor else tensor
    parts = {
        "experts": (first_sparse, "mlp.experts", "moe_intermediate_size", width, expert_ranks),
        "shared_experts": (
            first_sparse if arch.moe_num_shared_experts else None, "mlp.shared_experts",
            "moe_intermediate_size * moe_num_shared_experts", arch.shared_intermediate_size, tensor,
        ),
        "mlp": (first_dense, "mlp", "intermediate_size", arch.intermediate_size, tensor),
        "attention": (0, "self_attn", "num_attention_heads * head_dim", arch.q_dim, tensor),
    }  # fmt: skip
    for word in settings.modules:
        layer, module, key, whole, ranks = parts[word]
        if layer is None:
            continue
        name = f"model.layers.{layer}.{module}"
        yield _Size(word, name, "hidden_size", arch.hidden_size, 1)
        yield _Size(word, name, key, whole, ranks)
        if word == "attention" and settings.recipe == "blockwise":
            ranks = min(tensor, arch.num_key_value_heads)
            yield _Size(word, name, "num_key_value_heads * head_dim", arch.kv_dim, ranks)

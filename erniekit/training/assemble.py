"""THE order in which a model for training comes together; the only file that knows all the parts.

    build, each rank its part -> weights, quantised while they are read -> adapters -> freezing -> bf16 products ->
    tensor and expert shards -> recomputation -> (pipeline) -> FP8 -> optimizer, sharded as the mesh says

The step in parentheses is a later room; it takes its place here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle

from erniekit.adapters.lora import adapter_config_of, add_adapters
from erniekit.adapters.targets import (
    FACTS,
    adapter_config,
    adapter_names,
    b_rate,
    require_unpacked,
    started_config,
)
from erniekit.base.console import notice
from erniekit.base.errors import ConfigError
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_io import load_adapter
from erniekit.checkpoint.ernie45 import HEAD_BIAS, memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import build_model
from erniekit.config.adapter import AdapterConfig
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.fp8 import fp8_of
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.packing import packing_of
from erniekit.config.run import RunConfig
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.float8 import has_float8
from erniekit.parallel.expert import use_expert_parallel
from erniekit.parallel.flat import blocks_of
from erniekit.parallel.layered import LayerShards
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.recompute import apply_recompute
from erniekit.parallel.tensor import use_tensor_parallel
from erniekit.parallel.tokens import TokenRanks
from erniekit.parallel.whole import Wholes
from erniekit.parallel.zero import GradientSync
from erniekit.precision.blockwise import use_blockwise
from erniekit.precision.products import use_bf16_products
from erniekit.precision.qat import Ranks, use_qat
from erniekit.training.budget import flat_bytes_of
from erniekit.training.dropout import DropoutCourse
from erniekit.training.fp8 import Fp8Training
from erniekit.training.health import RouterHealth
from erniekit.training.objective import LossWeights
from erniekit.training.optimizer import AdamWSettings, Optimizer, matrices_inside
from erniekit.training.router import RouterUpkeep, sparse_layers
from erniekit.training.selection import ROUTERS, freeze, rate_factors, trained_names


def architecture(base: Folder, cfg: RunConfig) -> ErnieConfig:
    """The base model's architecture with what the run changes: multi-token prediction on or off, a score for a head.

    Preferences train no multi-token prediction unless it is asked for. Raises ConfigError for a reward model where a
    language model is needed.
    """
    wanted, stage = cfg.model.num_nextn_predict_layers, cfg.model.stage
    if base.config.is_reward and stage != "RM":
        raise ConfigError(
            f"{base.path}: is a reward model: it has a score and no language model's head, so stage {stage} cannot "
            "train it. Take the language model that it was made from."
        )
    if stage == "RM":
        return base.config.replace(is_reward=True, num_nextn_predict_layers=0)
    if wanted is None and stage in PREFERENCE_STAGES:
        wanted = 0
    return base.config if wanted is None else base.config.replace(num_nextn_predict_layers=wanted)


def adapter_of(base: Folder, arch: ErnieConfig, cfg: RunConfig) -> AdapterConfig | None:
    """The adapter that the run trains; None if it trains the model's own weights. Raises ConfigError."""
    if cfg.model.fine_tuning != "LoRA":
        return None
    names = list(memory_table(arch, head_bias=base.has_head_bias).tensors)
    if cfg.lora.lora_path:
        given = {name: cfg.value(name) for name in FACTS if cfg.given(name)}
        config = started_config(AdapterFolder.open(cfg.lora.lora_path).config, given, names, keys=cfg.lora)
    else:
        config = adapter_config(cfg.lora, names)
    packing = packing_of(cfg)
    if packing:
        require_unpacked(config, names, packing)
    return config


def check_names(base: Folder, arch: ErnieConfig, cfg: RunConfig) -> None:
    """Raise ConfigError for every pattern that picks no parameter, and for weights that cannot be packed as
    `compute_type` says, before anything is read, written or built."""
    table = memory_table(arch, head_bias=base.has_head_bias)
    names = list(table.tensors)
    adapter, packing, problems = adapter_of(base, arch, cfg), packing_of(cfg), list[str]()
    if packing:
        packing.check({name.removesuffix(".weight"): tensor.shape for name, tensor in table.tensors.items()})
    if adapter:
        names = adapter_names(adapter, names)
    for judge in (trained_names, functools.partial(rate_factors, num_layers=arch.num_hidden_layers)):
        try:
            judge(names, keys=cfg.optimizer)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def assemble_model(
    weights: Folder, arch: ErnieConfig, cfg: RunConfig, *, mesh: Mesh = Mesh.single(),
    adapter: AdapterConfig | None = None, trained: Path | None = None,
) -> ErnieForCausalLM:  # fmt: skip
    """This rank's part of the model that will be trained: `weights` is the base folder or a checkpoint. With `adapter`,
    always the base, and `trained` is an adapter folder to go on from."""
    on_gpu = _on_gpu()
    dtype = "bfloat16" if on_gpu and cfg.model.compute_type != "fp32" else "float32"
    if cfg.model.compute_type == "bf16" and not on_gpu and not cfg.model.cpu_bf16_matmul:
        notice("compute_type bf16: a CPU computes in fp32, with fp32 masters; only the saved model is rounded.")
    wholes, cut = Wholes(mesh, arch), Cut.of(mesh.layout, mesh.rank)
    model = build_model(
        weights, arch, dtype=dtype, mtp_init=cfg.model.mtp_init, seed=cfg.train.seed, pack=packing_of(cfg),
        cut=cut, greatest=wholes.greatest,
    )  # fmt: skip
    if adapter:
        _adapt(model, adapter, trained, seed=cfg.train.seed, parts=wholes, cut=cut)
    freeze(model, cfg.optimizer)
    if cfg.model.cpu_bf16_matmul and on_gpu:
        notice("cpu_bf16_matmul is about CPUs; on a GPU compute_type says how products are computed.")
    elif cfg.model.cpu_bf16_matmul:
        use_bf16_products(model)
    use_tensor_parallel(model, mesh)
    use_expert_parallel(model, mesh)
    if cfg.train.recompute:
        apply_recompute(model, cfg.train.recompute_granularity)
    return model


def _on_gpu() -> bool:
    return paddle.device.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")


def _adapt(
    model: ErnieForCausalLM, config: AdapterConfig, trained: Path | None, *, seed: int, parts: Wholes, cut: Cut
) -> None:
    has_bias = any(name == HEAD_BIAS for name, _ in model.named_parameters())
    table = memory_table(model.config, head_bias=has_bias)
    base = sum(math.prod(tensor.shape) for tensor in table.tensors.values())
    add_adapters(model, config, seed=seed, draw=trained is None, parts=parts)
    if trained:
        load_adapter(model, AdapterFolder.open(trained), cut=cut)
    trainable = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    numbers = sum(math.prod(parts.shape(name, p.shape)) for name, p in trainable.items())
    whole = f" and {len(config.modules_to_save)} whole modules" if config.modules_to_save else ""
    notice(
        f"adapters of rank {config.rank} on {len(config.targets)} modules{whole}: {numbers:,} numbers are trained, "
        f"{100 * numbers / base:.2f} % of the model's {base:,}"
    )


def assemble_fp8(model: ErnieForCausalLM, cfg: RunConfig, *, mesh: Mesh = Mesh.single()) -> Fp8Training | None:
    """Let the assembled model compute in FP8 as the run sets it; None if it does not. Raises ConfigError on a device
    that has no FP8, unless it is emulated."""
    settings = fp8_of(cfg)
    if settings is None:
        return None
    if not settings.emulate and not has_float8():
        raise ConfigError(
            "compute_type: fp8 needs a GPU that multiplies FP8, and a build of Paddle for it. Set fp8_emulate: true: "
            "the same numbers on any device, slower."
        )
    if settings.recipe == "blockwise":
        blockwise = use_blockwise(model, settings, keep=mesh.layout.stage != 3)
        return Fp8Training(settings, blockwise, blockwise.watch, mesh=mesh)
    world, tensor = mesh.axis("world"), mesh.axis("tensor")
    held = Cut.of(mesh.layout, mesh.rank).experts(_experts_of(model.config))
    ranks = Ranks(
        everywhere=functools.partial(world.all_reduce, op="max"), beside=functools.partial(tensor.all_reduce, op="max"),
        first_expert=held.start, num_experts=_experts_of(model.config) or None,
    )  # fmt: skip
    qat = use_qat(model, settings, ranks=ranks)
    return Fp8Training(settings, qat, qat.watch, memory=qat, mesh=mesh)


def _experts_of(arch: ErnieConfig) -> int:
    count = arch.moe_num_experts
    return count if isinstance(count, int) else count[0]


def assemble_optimizer(model: ErnieForCausalLM, cfg: RunConfig, *, mesh: Mesh = Mesh.single()) -> Optimizer:
    """AdamW or Muon as the run sets it, sharded as the mesh says."""
    keys, adapted = cfg.optimizer, adapter_config_of(model) is not None
    names = [name for name, p in model.named_parameters() if not (adapted and p.stop_gradient)]
    if keys.moe_gate_lr_ratio is not None and not any(re.search(ROUTERS, name) for name in names):
        notice(f"moe_gate_lr_ratio has no effect: the {'routers are frozen' if adapted else 'model has no routers'}")
    small = keys.use_lowprecision_moment or keys.optim == "adamw_16bit_moment"
    if cfg.kernels.tensorwise_offload_optimizer and not _on_gpu():
        notice("tensorwise_offload_optimizer: on a CPU, the optimizer's states are in host memory anyway.")
    return Optimizer(
        model.named_parameters(),
        AdamWSettings(
            beta1=keys.adam_beta1, beta2=keys.adam_beta2, epsilon=keys.adam_epsilon,
            weight_decay=keys.weight_decay, max_grad_norm=keys.max_grad_norm,
        ),
        rates=rate_factors(names, num_layers=model.config.num_hidden_layers, keys=keys, b_rate=b_rate(cfg.lora)),
        matrices=matrices_inside(model) if keys.optim == "muon" else None,
        moments="bfloat16" if small else "float32", ema_decay=keys.ema_decay, ema_interval=keys.zcc_ema_interval,
        adaptive_clip=bool(keys.adaptive_norm_clip), sync=_gradient_sync(model, cfg, mesh),
        offload=cfg.kernels.tensorwise_offload_optimizer,
    )  # fmt: skip


def _gradient_sync(model: ErnieForCausalLM, cfg: RunConfig, mesh: Mesh) -> GradientSync:
    """What brings the gradients of all ranks together; at stage 3, it takes the layers' weights in hand."""
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if not p.stop_gradient}
    blocks = blocks_of(parameters, mesh.layout, model.config, tensor=mesh.coordinates.tensor)
    layers = LayerShards(model, mesh, blocks=blocks) if mesh.layout.stage == 3 else None
    return GradientSync(trained, mesh, blocks=blocks, flat_bytes=flat_bytes_of(cfg), layers=layers)


def step_hooks(model: ErnieForCausalLM, cfg: RunConfig) -> tuple[Callable[[int], None], ...]:
    """What is to be called with each 0-based step before it begins."""
    keys = cfg.optimizer
    return (DropoutCourse.of(model, keys),) if keys.hidden_dropout_prob or keys.attention_probs_dropout_prob else ()


def loss_weights(arch: ErnieConfig, cfg: RunConfig, *, mesh: Mesh = Mesh.single()) -> LossWeights:
    """Coefficients by precedence: the run's, the checkpoint's config.json, ERNIEKit's default."""
    model, extras = cfg.model, arch.extras
    decoupled = model.use_ortho_loss_callback
    return LossWeights(
        balance=_first(model.moe_aux_loss_lambda, extras.get("moe_aux_loss_lambda"), 1e-5),
        z=_first(model.moe_z_loss_lambda, extras.get("moe_z_loss_lambda"), 0.0),
        orthogonal=0.0 if decoupled else _orthogonal(arch, cfg),
        multi_token=_first(model.multi_token_pred_lambda, extras.get("multi_token_pred_lambda"), 0.3),
        token_balance=model.token_balance_loss,
        ranks=TokenRanks(mesh),
    )


def router_upkeep(model: ErnieForCausalLM, cfg: RunConfig, *, mesh: Mesh = Mesh.single()) -> RouterUpkeep:
    """The bias controller and the decoupled orthogonal step, as far as the run wants them.

    Beside adapters the correction bias stands still, even where the routers are trained whole: it belongs to the base,
    and no adapter folder has a place for it.
    """
    aux_free = _first(cfg.model.moe_use_aux_free, model.config.extras.get("moe_use_aux_free"), False)
    decoupled = cfg.model.use_ortho_loss_callback
    return RouterUpkeep(
        model,
        bias_coefficient=cfg.model.moe_use_aux_free_update_coef if aux_free and not adapter_config_of(model) else 0.0,
        orthogonal_lambda=_orthogonal(model.config, cfg) if decoupled else 0.0,
        health=_router_health(model, cfg, TokenRanks(mesh)),
        ranks=TokenRanks(mesh),
    )


def _router_health(model: ErnieForCausalLM, cfg: RunConfig, ranks: TokenRanks) -> RouterHealth | None:
    layers, window = sparse_layers(model), cfg.watch.moe_health_steps
    if not layers or not window:
        return None
    return RouterHealth(layers, experts_per_token=model.config.moe_k, window=window, ranks=ranks)


def _orthogonal(arch: ErnieConfig, cfg: RunConfig) -> float:
    return _first(cfg.model.moe_orthogonal_loss_lambda, arch.extras.get("moe_orthogonal_loss_lambda"), 0.0)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)

"""Sizes that follow from a config.json and that both the parameter counts and the checkpoint map need."""

from __future__ import annotations

from dataclasses import dataclass

from erniekit.base.errors import CheckpointError
from erniekit.config.architecture import ErnieConfig


def expert_groups(cfg: ErnieConfig) -> tuple[tuple[int, int], ...]:
    """(number of routed experts, width) per router: one in text models, text then vision in vision-language models."""
    routers = 2 if cfg.is_vl else 1
    counts, widths = (
        (value,) * routers if isinstance(value, int) else value
        for value in (cfg.moe_num_experts, cfg.moe_intermediate_size)
    )
    if len(counts) != routers or len(widths) != routers:
        raise CheckpointError(
            f"moe_num_experts {cfg.moe_num_experts} and moe_intermediate_size {cfg.moe_intermediate_size}: a pair "
            f"(text, vision) belongs to model_type ernie4_5_moe_vl, not to {cfg.model_type}."
        )
    return tuple(zip(counts, widths, strict=True))


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower and the resampler of a vision-language model, counted in elements."""

    depth: int
    width: int
    mlp: int
    patch: int  # values of one image patch
    merged: int  # width of spatially merged patches
    frames: int  # width of two merged frames; 0 without temporal_linear

    @classmethod
    def of(cls, cfg: ErnieConfig) -> VisionSizes:
        """Read the flat form's `vision_config` and resampler keys; raises CheckpointError naming what is absent."""
        extras, vision = cfg.extras, cfg.extras.get("vision_config") or {}
        needed = {f"vision_config.{key}": vision.get(key) for key in ("depth", "embed_dim", "patch_size")}
        needed["pixel_hidden_size"] = extras.get("pixel_hidden_size")
        missing = [key for key, value in needed.items() if not isinstance(value, int)]
        if missing:
            raise CheckpointError(f"config.json of a vision-language model: {', '.join(missing)} missing.")
        width, spatial = vision["embed_dim"], extras.get("spatial_conv_size", 2)
        merged = extras["pixel_hidden_size"] * spatial * spatial
        return cls(
            depth=vision["depth"],
            width=width,
            mlp=int(width * vision.get("mlp_ratio", 4)),
            patch=vision.get("in_channels", 3) * vision["patch_size"] ** 2,
            merged=merged,
            frames=merged * extras.get("temporal_conv_size", 2) if extras.get("use_temporal_conv", True) else 0,
        )

"""Keys of low-rank adapters. They have an effect with `fine_tuning: LoRA` only."""

from dataclasses import dataclass

from erniekit.config.keys import key

_LORA = ("fine_tuning", ("LoRA",))
_OF_ADAPTER = {"only": _LORA, "told_by": "lora_path"}
RSLORA_ALPHA = PLUS_SCALE = 4  # of ERNIEKit: alpha where rslora is on and none is set; lora_plus_scale of rslora_plus


@dataclass(frozen=True)
class LoraConfig:
    """Shape, scale and place of the adapters."""

    lora_rank: int = key(8, "Rank of the adapters.", least=1, **_OF_ADAPTER)
    lora_alpha: int = key(
        -1, "The product of an adapter is scaled by alpha / rank. -1: twice the rank (4 with rslora, as in ERNIEKit).",
        least=-1, **_OF_ADAPTER,
    )
    lora_dropout: float = key(
        0.0, "Dropout on what enters the adapters, in training.", only=_LORA, least=0, most=0.999
    )
    lora_path: str | None = key(
        None, "An adapter folder to start from; it says rank, alpha and targets.", only=_LORA
    )
    lora_target_modules: list[str] | None = key(
        None, "Modules that get an adapter: `all-linear`, `attention`, `mlp` (dense and shared), `experts` (routed), "
        "names, or regular expressions. null: all-linear, as in ERNIEKit.", **_OF_ADAPTER,
    )
    modules_to_save: list[str] | None = key(
        None, "Modules that are trained whole and saved with the adapter: names or regular expressions.", **_OF_ADAPTER
    )
    rslora: bool = key(False, "Scale by alpha / sqrt(rank) (arXiv 2312.03732).", **_OF_ADAPTER)
    rslora_plus: bool = key(
        False, "Stands for rslora: true, lora_alpha: 4 and lora_plus_scale: 4, as in ERNIEKit.", only=_LORA
    )
    lora_plus_scale: float = key(
        1.0, "Factor on the learning rate of the B matrices (LoRA+, arXiv 2402.12354).", only=_LORA, above=0
    )
    dora: bool = key(
        False, "Train the length of every output's weights apart from their direction (DoRA, arXiv 2402.09353); not "
        "for routed experts.", **_OF_ADAPTER,
    )
    lora_init: str = key(
        "default", "How adapters start: `default` at zero, `pissa` on the largest singular vectors (arXiv 2404.02948).",
        choices=("default", "pissa"), only=_LORA,
    )

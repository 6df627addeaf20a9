"""Keys of low-rank adapters. They have an effect with `fine_tuning: LoRA` only."""

from dataclasses import dataclass

from erniekit.config.keys import later

_LORA = ("fine_tuning", ("LoRA",))


@dataclass(frozen=True)
class LoraConfig:
    """Shape and scale of the adapters."""

    lora_rank: int = later(8, "Rank of the adapters.", only=_LORA, least=1)
    lora_alpha: int = later(-1, "Scale of the adapters; -1 is twice the rank.", only=_LORA)
    lora_path: str | None = later(None, "An adapter to start from.", only=_LORA)
    rslora: bool = later(False, "Scale by the square root of the rank.", only=_LORA)
    rslora_plus: bool = later(False, "rsLoRA with the settings of LoRA+.", only=_LORA)
    lora_plus_scale: float = later(1.0, "Learning-rate ratio of the B matrices.", only=_LORA, above=0)

"""Keys of the verb `export`."""

from dataclasses import dataclass

from erniekit.config.keys import inert, later, speed


@dataclass(frozen=True)
class ExportConfig:
    """What an exported folder holds."""

    max_shard_size: int = speed(5, "Largest file of weights in GB.", least=1)
    copy_tokenizer: bool = inert(True, "The tokenizer is always exported.")
    mergekit_task_config: str | None = later(None, "A recipe for merging models.", resume="free")
    hf_hub_id: str | None = later(None, "A repository to upload the export to.", resume="free")

"""Keys of the verb `export`."""

from dataclasses import dataclass

from erniekit.config.keys import SPEED, inert, key, later


@dataclass(frozen=True)
class ExportConfig:
    """What an exported folder holds."""

    max_shard_size: int = key(
        5, "Largest file of weights in GB: of the trained model, of an export and of `split`.", effect=SPEED, least=1,
    )
    merge_tolerance: float | None = key(
        None, "Mean KL divergence per token that is allowed between base + adapter and the merged model; above it the "
        "export fails. null: 1e-7 for fp32, 2e-3 for bfloat16.", resume="free", least=0,
    )
    merge_proof: bool = key(
        True, "Compare base + adapter with the merged model before it appears. false: where the base does not fit into "
        "this machine's memory; the export says that it is not proved.", resume="free",
    )
    copy_tokenizer: bool = inert(True, "The tokenizer is always exported.")
    mergekit_task_config: str | None = later(None, "A recipe for merging models.", resume="free")
    hf_hub_id: str | None = later(None, "A repository to upload the export to.", resume="free")

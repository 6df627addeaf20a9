"""Keys of ERNIEKit's inference server. The verb `server` does not exist yet, so they have no effect."""

from dataclasses import dataclass

from erniekit.config.keys import inert


@dataclass(frozen=True)
class ServeConfig:
    """A server's address, memory and parsers."""

    host: str = inert("127.0.0.1", "Address of the server.")
    port: int = inert(8188, "Port of the server.")
    metrics_port: int = inert(8001, "Port of its metrics.")
    engine_worker_queue_port: int = inert(8002, "Port of its queue.")
    max_model_len: int = inert(2048, "Longest dialogue in tokens.")
    max_num_seqs: int = inert(8, "Dialogues at a time.")
    use_warmup: int | bool = inert(0, "Warm up at the start.")
    gpu_memory_utilization: float = inert(0.9, "Share of device memory to use.")
    quantization: str | None = inert(None, "Format of the served weights.")
    enable_mm: bool = inert(False, "Serve pictures and video.")
    limit_mm_per_prompt: dict | None = inert(
        None, "Pictures and videos of one prompt.", there="{'image': 1, 'video': 1}"
    )
    reasoning_parser: str | None = inert("ernie-45-vl", "Parser of thoughts.")
    tool_call_parser: str | None = inert(None, "Parser of tool calls.")
    max_num_batched_tokens: int = inert(384, "Tokens of a batch.")
    block_size: int = inert(64, "Tokens of a cache block.")
    kv_cache_ratio: float = inert(0.75, "Share of the cache for prompts.")
    load_choices: str | None = inert(None, "How weights are loaded.")
    server_tp_degree: int = inert(1, "Devices of the server.")

"""Keys of the parallel layout: how many devices share what. A layout never changes a result, but `batch_size` counts
rows on each device that has rows of its own. layout.py makes a layout of them, layout_rules.py judges them."""

from dataclasses import dataclass

from erniekit.config.keys import SPEED, Alias, key, later, speed

DEVICE_DEGREES = (
    "tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree", "expert_parallel_degree",
    "expert_tensor_parallel_degree", "sep_parallel_degree", "context_parallel_degree",
)  # fmt: skip
UNBUILT_DEGREES = {
    "pipeline_parallel_degree": "a pipeline of devices",
    "expert_tensor_parallel_degree": "experts cut apart from the rest",
    "sep_parallel_degree": "a sequence shared by attention heads",
    "context_parallel_degree": "a sequence passed round a ring of devices",
}
_ONE = {"idle": (0, 1), "least": -1, "resume": "free"}
_LAYOUT = {"effect": SPEED}  # so it may be another one when a run is resumed


FLAT_BYTES = 64 * 2**20  # of fp32 gradients that are reduced as one: enough for a network, little beside a model


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees, and the switches of each kind of parallelism."""

    tensor_parallel_degree: int = key(-1, "Devices that share every matrix.", **_ONE, **_LAYOUT)
    pipeline_parallel_degree: int = later(-1, "Devices that share the layers.", **_ONE)
    sharding_parallel_degree: int = key(
        -1, "Devices that share what `sharding` says; -1: all that see rows of their own.",
        aliases=(Alias("sharding_degree"),), **_ONE, **_LAYOUT,
    )  # fmt: skip
    expert_parallel_degree: int = key(
        -1, "Devices with rows of their own that share the experts; -1: as `moe_group` says.", **_ONE, **_LAYOUT
    )
    expert_tensor_parallel_degree: int = later(-1, "Devices that share every expert.", **_ONE)
    sep_parallel_degree: int = later(-1, "Devices that share a sequence (Ulysses).", **_ONE)
    context_parallel_degree: int = later(-1, "Devices that share a sequence (ring).", **_ONE)

    sharding: str | None = key(
        None, "What is sharded: stage1 (optimizer states), stage2 (gradients too), stage3 (weights too).",
        choices=("stage1", "stage2", "stage3"), **_LAYOUT,
    )  # fmt: skip
    sharding_parallel_mesh_dimension: str = speed("dp", "Mesh axis of sharding.")
    sharding_comm_buffer_size_MB: int = key(
        -1, "Gradients are summed over devices in pieces of so many MB; -1: 64.", **_LAYOUT
    )
    sharding_parallel_config: str | None = speed(None, "Switches of sharding.")
    data_parallel_config: str | None = speed(None, "Switches of data parallelism.")
    ddp_find_unused_parameters: bool | None = speed(None, "Look for parameters without gradient.")
    split_norm_comm: bool = speed(False, "Split the reduction of the gradient norm.")
    hybrid_parallel_topo_order: str | None = speed(None, "Order of the mesh axes.")
    enable_auto_parallel: bool = speed(False, "Paddle's automatic parallelism.")

    sequence_parallel: bool = key(
        False, "Share activations along the sequence between tensor-parallel devices.", **_LAYOUT
    )
    fuse_sequence_parallel_allreduce: bool = speed(False, "Fused reductions of sequence parallelism.")
    use_sp_callback: bool = speed(False, "Reduce gradients of sequence parallelism in a callback.")
    sequence_parallel_config: str | None = speed(None, "Switches of sequence parallelism.")
    tensor_parallel_config: str | None = speed(None, "Switches of tensor parallelism.")
    tensor_parallel_output: bool = speed(True, "Keep logits split.")
    split_inputs_sequence_dim: bool = speed(True, "Split inputs along the sequence.")

    virtual_pp_degree: int = speed(1, "Pieces of the layers on one pipeline device.", least=1)
    pp_seg_method: str | list[int] = speed(
        "layer:Ernie4_5_DecoderLayer|ErnieDecoderLayer|EmptyLayer", "Where the pipeline is cut."
    )
    add_tail_layers: int | bool = speed(0, "Empty layers at the end of the pipeline.")
    pipeline_parallel_config: str | None = speed(None, "Switches of pipeline parallelism.")
    disable_pipeline_warmup: bool = speed(False, "Start the pipeline without warm-up.")
    enable_mtp_magic_send: bool | None = speed(False, "Send embeddings to the multi-token prediction stage.")
    pp_need_data: bool = speed(False, "Read data on every pipeline device.")
    pp_need_data_degree: int = speed(0, "Pipeline devices that read data.")

    use_expert_parallel: bool = key(
        False, "Share the experts; without a degree, between all devices with rows of their own.", **_LAYOUT
    )
    moe_group: str | None = key(
        "dummy", "Devices that share the experts. mp: the tensor-parallel ones; data: all with rows of their own; "
        "dummy: as many as `expert_parallel_degree` says.",
        choices=("mp", "data", "dummy"), spellings={"tp": "mp", "model": "mp", "dp": "data"}, **_LAYOUT,
    )  # fmt: skip
    moe_multimodal_dispatch_use_allgather: str | None = speed("v2-alltoall-unpad", "How tokens reach their experts.")
    expert_max_capacity: int = later(2**32, "Largest number of tokens of an expert; here none is dropped.", least=1)
    expert_min_capacity: int = later(1, "Smallest number of token places of an expert.", least=1)

"""Keys about how the model is computed: fused operators, offloading, details of recomputation. None of them
changes a result.

The fastest operator that the device has is chosen without being asked, so most of ERNIEKit's switches are accepted and
not acted on.
"""

from dataclasses import dataclass

from erniekit.config.keys import SPEED, Alias, key, speed


@dataclass(frozen=True)
class KernelConfig:
    """Time and memory of one device."""

    recompute_use_reentrant: bool = speed(True, "How recomputation is built.")
    no_recompute_layers: int | list[int] | None = speed(None, "Layers that recomputation leaves out.")
    refined_recompute: str | None = speed(None, "Recomputation chosen operator by operator.")
    offload_recompute_inputs: bool = speed(False, "Keep the inputs of recomputed layers in host memory.")
    use_recompute_moe: bool | None = speed(False, "Recompute expert layers.")
    use_recompute_mtp: bool = speed(False, "Recompute the multi-token prediction block.")
    use_recompute_loss_fn: bool = speed(True, "Recompute the loss; here the loss is always computed in chunks.")
    loss_subbatch_seqlen: int = speed(32768, "Chunk length of the loss; here it is chosen.")
    use_sparse_head_and_loss_fn: bool = speed(False, "Head and loss on trained tokens only.")
    use_fused_head_and_loss_fn: bool = speed(False, "Head and loss in one operator.")
    use_flash_attention: bool = speed(True, "Flash attention; here it is used where the device has it.")
    use_mem_eff_attn: bool | None = speed(True, "Memory-efficient attention.")
    use_flash_attn_with_mask: bool | None = speed(True, "Flash attention with a dense mask.")
    use_attn_mask_start_row_indices: bool = speed(
        True, "Column-interval masks; here always.", aliases=(Alias("use_attn_mask_startend_row_indices"),)
    )
    use_sparse_flash_attn: bool = speed(True, "Flash attention on column intervals.")
    fuse_linear: bool = speed(False, "Fused linear with bias.")
    fuse_rope: bool = speed(False, "Fused rotary embedding.")
    fuse_softmax_mask: bool = speed(False, "Fused softmax with mask.")
    fuse_rms_norm: bool = speed(True, "Fused RMS norm.")
    fuse_swiglu: bool = speed(True, "Fused SwiGLU.")
    fuse_gate_detach_matmul: bool = speed(True, "Fused router product.")
    moe_with_send_router_loss: bool = speed(False, "Send router losses along the pipeline.")
    tensorwise_offload_optimizer: bool = key(
        False, "Keep the optimizer's states in host memory; in an update they come to the device tensor by tensor. On "
        "a CPU they are there anyway.",
        effect=SPEED, aliases=(Alias("offload_optim", bool, {True: (True,), False: ()}),),
    )
    optim_shard_num: int = speed(1, "Files that the optimizer states are saved in.")
    release_grads: bool = speed(False, "Free gradients after every step.")
    flatten_param_grads: bool = speed(False, "Gradients in one buffer.")
    pre_alloc_memory: float = speed(0.0, "GB of device memory to take at the start.")
    gc_interval: int = speed(0, "Steps between garbage collections.")
    to_static: bool = speed(False, "Compile the step to a static graph.")
    device: str = speed("gpu", "Where to train; here a GPU if Paddle sees one, else the CPU.")
    no_cuda: bool = speed(False, "Stay on the CPU.")

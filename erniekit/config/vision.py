"""Keys of vision-language training. They have an effect in the stages VL-SFT and OCR-SFT only."""

from dataclasses import dataclass

from erniekit.config.keys import later
from erniekit.config.model import VISION_STAGES

_VISION = {"only": ("stage", VISION_STAGES)}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, the preparation of pictures and video, and the mixture with text."""

    vision_config: dict | None = later(None, "Settings of the vision tower as one mapping.", **_VISION)
    vision_model_name_or_path: str | None = later(None, "A vision tower to start from.", **_VISION)
    attn_implementation: str = later("eager", "Attention of the vision tower.", **_VISION)
    attn_sep: bool = later(True, "Attend within a frame.", **_VISION)
    depth: int = later(32, "Layers of the vision tower.", **_VISION)
    embed_dim: int = later(1280, "Width of the vision tower.", **_VISION)
    hidden_act: str = later("quick_gelu", "Activation of the vision tower.", **_VISION)
    hidden_size: int = later(1280, "Width of the vision tower's output.", **_VISION)
    in_channels: int = later(3, "Colour channels.", **_VISION)
    in_chans: int = later(3, "Colour channels.", **_VISION)
    mlp_ratio: int = later(4, "Width of the vision MLP over the tower's.", **_VISION)
    model_type: str = later("DFNRope_vision_transformer", "Kind of vision tower.", **_VISION)
    num_heads: int = later(16, "Heads of the vision tower.", **_VISION)
    patch_size: int = later(14, "Pixels of a patch's side.", **_VISION)
    spatial_merge_size: int = later(2, "Patches merged along a side.", **_VISION)
    spatial_patch_size: int = later(14, "Pixels of a patch's side.", **_VISION)
    use_recompute: bool = later(True, "Recompute the vision tower.", **_VISION)
    vit_num_recompute_layers: int = later(10000, "Layers of the vision tower to recompute.", **_VISION)
    rope_3d: bool | None = later(True, "Positions in time, height and width.", **_VISION)
    moe_use_hard_gate: bool | None = later(False, "Experts of its own for each modality.", **_VISION)

    text_dataset_path: list[str] | None = later(None, "Text files beside the pictures.", **_VISION)
    text_dataset_prob: list[float] | None = later(None, "Shares of those files.", **_VISION)
    modality_interleave: str = later("acc", "Where text and pictures alternate.", **_VISION)
    modality_ratio: list[int] | None = later(None, "How they alternate.", **_VISION)
    from_scratch: int | bool | None = later(1, "Start the data from the beginning.", **_VISION)
    lr_scheduler: str = later("cosine", "Course of the learning rate.", **_VISION)
    vit_lr_ratio: float | None = later(None, "Learning rate of the vision tower, as a share.", **_VISION)
    visual_ld: float | None = later(None, "Layer-wise decay in the vision tower.", **_VISION)
    vit_second_fwd_batch_size: int | None = later(None, "Pictures per forward pass of the tower.", **_VISION)
    balanced_image_preprocess: bool = later(False, "Share the preparation of pictures between devices.", **_VISION)

    factor: int = later(20, "Weight of a task's size.", **_VISION)
    example_from_same_task_prob: float = later(0.0, "Share of examples from one task.", **_VISION)
    pseudo_sampling_prob: float = later(0.5, "Share of pseudo samples.", **_VISION)
    trigger_data_prob: float = later(0.5, "Share of rows with a trigger.", **_VISION)
    drop_history_with_k: bool = later(False, "Drop early turns of a dialogue.", **_VISION)
    add_sys_token: bool = later(False, "Mark the system text.", **_VISION)
    min_shot: int = later(2, "Fewest examples in a prompt.", **_VISION)
    max_shot: int = later(8, "Most examples in a prompt.", **_VISION)
    use_train_part_sharding: bool | None = later(True, "Share files between devices.", **_VISION)
    text_use_train_part_sharding: bool | None = later(True, "Share text files between devices.", **_VISION)

    video_fps: int = later(2, "Frames per second.", **_VISION)
    video_min_frames: int = later(16, "Fewest frames.", **_VISION)
    video_max_frames: int = later(480, "Most frames.", **_VISION)
    video_target_frames: int = later(-1, "Exact number of frames.", **_VISION)
    video_frames_sample: str = later("middle", "Which frame of an interval.", **_VISION)
    render_timestamp: bool = later(False, "Draw the time on every frame.", **_VISION)

    corpus_name: str | None = later(None, "Name of the data.", **_VISION)
    im_prefix_length: int = later(64, "Tokens of a picture of fixed size.", **_VISION)
    image_token_len: int = later(64, "Tokens of a picture of fixed size.", **_VISION)
    image_dtype: str = later("uint8", "Number format of pixels.", **_VISION)
    use_pic_id: bool = later(True, "Number the pictures in the text.", **_VISION)
    prompt_dir: str | None = later("./", "Folder of prompt files.", **_VISION)
    serialize_output: bool = later(True, "Serialise prepared samples.", **_VISION)
    one_sample_in_one_seq: bool = later(False, "One sample in a row.", **_VISION)
    variable_resolution: bool = later(False, "Pictures keep their size.", **_VISION)
    spatial_conv_size: int = later(2, "Patches merged along a side.", **_VISION)
    adaptive_max_imgtoken_option: list[int] | None = later(None, "Choices of tokens per picture.", **_VISION)
    adaptive_max_imgtoken_rate: list[float] | None = later(None, "Shares of those choices.", **_VISION)
    max_pixels: int | None = later(None, "Most pixels of a picture.", **_VISION)
    min_pixels: int | None = later(None, "Fewest pixels of a picture.", **_VISION)
    video_max_pixels: int | None = later(None, "Most pixels of a frame.", **_VISION)
    video_min_pixels: int | None = later(None, "Fewest pixels of a frame.", **_VISION)
    drop_untrainble_sample: bool = later(False, "Drop samples without trained tokens.", **_VISION)
    sft_shift_by_one: bool = later(False, "Shift labels when samples are made.", **_VISION)
    load_args_from_api: bool = later(False, "Take the preparation's settings from the caller.", **_VISION)

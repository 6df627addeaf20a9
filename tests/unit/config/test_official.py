"""What stands in ERNIEKit's own YAML files, in its spelling: everything passes `check`, and `train` refuses by name
what is not built. The files here are made up; every odd value is one that an official file holds."""

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config
from erniekit.config.readiness import not_built, not_checked_here, require_built, require_ready

COMMON = """
seed: 23
do_train: True
do_eval: True
distributed_dataloader: False
dataloader_num_workers: 1
batch_size: 1
num_train_epochs: 1
max_steps: 100
max_evaluate_steps: 10000
eval_steps: 10000
evaluation_strategy: steps
save_steps: 10000000
save_total_limit: 5
save_strategy: steps
logging_steps: 1
release_grads: True
gradient_accumulation_steps: 8
logging_dir: ./vdl_log
output_dir: ./output
disable_tqdm: 1
warmup_steps: 20
lr_scheduler_type: cosine
layerwise_lr_decay_bound: 1.0
weight_decay: 0.1
adam_epsilon: 1.0e-8
adam_beta1: 0.9
adam_beta2: 0.95
offload_optim: True
tensor_parallel_degree: 1
pipeline_parallel_degree: 1
sharding_parallel_degree: 1
sharding: stage1
sequence_parallel: True
pipeline_parallel_config: enable_delay_scale_loss enable_release_grads disable_partial_send_recv
recompute: True
recompute_use_reentrant: True
fp16_opt_level: O2
disable_ckpt_quant: True
amp_master_grad: True
amp_custom_white_list:
  - lookup_table
  - "flash_attn"
amp_custom_black_list: [reduce_sum, sin, cos]
unified_checkpoint: True
unified_checkpoint_config: async_save
"""
SFT = COMMON + """
train_dataset_type: "erniekit"
eval_dataset_type: "erniekit"
train_dataset_path: "./examples/data/sft-train.jsonl"
train_dataset_prob: "1.0"
eval_dataset_path: "./examples/data/sft-eval.jsonl"
eval_dataset_prob: "1.0"
max_seq_len: 8192
num_samples_each_epoch: 6000000
model_name_or_path: baidu/ERNIE-4.5-0.3B-Paddle
fine_tuning: Full
fuse_rope: True
use_sparse_head_and_loss_fn: True
stage: SFT
learning_rate: 1.0e-5
min_lr: 1.0e-6
compute_type: bf16
"""
FP8 = SFT.replace("compute_type: bf16", "compute_type: fp8") + """
moe_group: mp
num_nextn_predict_layers: 0
optim: adamw_custom
optim_shard_num: 8
pp_seg_method: [0,29,57]
apply_hadamard: True
use_lowprecision_moment: True
tensorwise_offload_optimizer: True
"""
DPO = SFT.replace("stage: SFT", "stage: DPO").replace("lr_decay_bound: 1.0", "lr_decay_bound: 0.5") + """
mix_strategy: random
packing: true
lora_rank: 32
attention_probs_dropout_prob: 0.1
dropout_warmup_steps: 100
offset_alpha: 0.0
scale_loss: 8192
use_sp_callback: True
tensor_parallel_config: "sync_param sync_grad sync_moment"
"""
VISION = """
stage: VL-SFT
model_name_or_path: baidu/ERNIE-4.5-VL-28B-A3B-Paddle/
multimodal: true
fuse_linear: true
fuse_rms_norm: false
use_flash_attention: 1
use_moe: true
fine_tuning: LoRA
lora_rank: 32
use_recompute_loss_fn: false
moe_group: "mp"
moe_use_aux_free_update_coef: 0.0
moe_aux_loss_lambda: 0.0
moe_use_aux_free: true
moe_use_hard_gate: true
moe_multimodal_dispatch_use_allgather: v2-alltoall-unpad-text
pp_seg_method: layer:Ernie4_5_DecoderLayer|ErnieDecoderLayer|EmptyLayer
dataset_name: "FunctionCallSFTReader"
train_dataset_path: ""
train_dataset_prob: ""
text_dataset_path: "examples/data/function-call-train.jsonl"
text_dataset_prob: "1.0"
max_seq_len: 8192
num_samples_each_epoch: 10000000
modality_ratio: "[1,1]"
variable_resolution: 1
pad_to_max_seqlen: 8192
render_timestamp: true
serialize_output: false
one_sample_in_one_seq: true
chat_template: "ernie_vl_thinking"
prefetch_factor: 10
add_sys_token: true
same_data: true
freeze_config: "freeze_vision"
trigger_data_prob: 1.0
from_scratch: 0
load_sharded_model: true
gc_interval: 100000
drop_history_with_k: true
overwrite_output_dir: true
moe_gate_lr_ratio: 0.01
visual_ld: 0.9
vit_lr_ratio: 0.9
scale_loss: 4096
sequence_parallel: 1
tensor_parallel_degree: 4
pp_need_data: true
pp_need_data_degree: 2
virtual_pp_degree: 1
disable_pipeline_warmup: false
sharding_comm_buffer_size_MB: 2048
save_sharding_stage1_model_include_freeze_params: true
use_recompute_moe: true
recompute: true
recompute_granularity: full
pre_alloc_memory: 60
bf16: true
amp_master_grad: 1
max_steps: 8000
warmup_steps: 100
"""
CHAT = """
model_name_or_path: baidu/ERNIE-4.5-VL-28B-A3B
tensor_parallel_degree: 1
output_dir: None
max_model_len: 131072
port: 8188
quantization: wint4
enable_mm: true
limit_mm_per_prompt: '{"image": 100, "video": 100}'
reasoning_parser: ernie-45-vl
max_new_tokens: 8192
top_p: 0.7
temperature: 0.95
"""
EXPORT = """
model_name_or_path: baidu/ERNIE-4.5-VL-424B-A47B-Paddle/
fine_tuning: LoRA
max_shard_size: 5
hf_hub_id: null
output_dir: ./output
tensor_parallel_degree: 8
compute_type: bf16
fp16_opt_level: O2
"""
EVAL = """
eval_dataset_type: "chatml"
eval_dataset_path: "./examples/data/function-call-eval.jsonl"
eval_dataset_prob: "1.0"
num_samples_each_epoch: 6000000
mix_strategy: random
packing: true
fine_tuning: LoRA
do_train: False
do_eval: True
recompute: True
"""
UNBUILT = {
    "sft": (SFT, set()),
    "fp8": (FP8, set()),
    "dpo": (DPO, set()),
    "vision": (VISION, {"stage"}),
    "chat": (CHAT, set()),
    "export": (EXPORT, set()),
    "eval": (EVAL, set()),
}


@pytest.mark.parametrize("kind", UNBUILT)
def test_an_official_file_passes_check(kind, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(UNBUILT[kind][0])
    config = load_config(path)
    assert {line.split(": ")[1] for line in not_built(config)} == UNBUILT[kind][1]
    again = tmp_path / "again.yaml"
    config.write_resolved(again)
    assert load_config(again).flat() == config.flat()


def test_the_official_sft_file_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where none of the files that it names are
    path = tmp_path / "run.yaml"
    path.write_text(SFT)
    config = load_config(path)
    require_built(config)
    assert config.optimizer.learning_rate == 1e-5
    assert config.train.disable_tqdm is True
    assert config.data.train_dataset_prob == [1.0]
    assert config.data.mix_strategy == "concat"
    assert len(config.notices) == 3
    assert [line.split(": ")[1] for line in not_checked_here(config)] == [
        "model_name_or_path", "train_dataset_path", "eval_dataset_path",
    ]  # fmt: skip


def test_train_refuses_the_others_by_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(VISION)
    with pytest.raises(ConfigError) as caught:
        require_ready(load_config(path))
    text = "\n".join(caught.value.problems)
    for name in UNBUILT["vision"][1]:
        assert f": {name}: " in text
    assert "tensor_parallel_degree: 4" in text and f"{path} --nproc 4" in text


def test_odd_values_mean_what_they_should(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(VISION + CHAT.partition("enable_mm: true")[2].partition("reasoning_parser")[0])
    config = load_config(path)
    assert config.vision.modality_ratio == [1, 1]
    assert config.vision.variable_resolution is True
    assert config.data.pad_to_max_seqlen == 8192
    assert config.data.train_dataset_path is config.data.train_dataset_prob is None
    assert config.kernels.use_flash_attention is True
    assert config.serve.limit_mm_per_prompt == {"image": 100, "video": 100}
    assert load_config({"pp_seg_method": "[0,7,10]"}).parallel.pp_seg_method == "[0,7,10]"
    assert load_config({"pp_seg_method": [0, 7, 10]}).parallel.pp_seg_method == [0, 7, 10]

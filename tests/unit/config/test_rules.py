"""What holds between keys, and what the user is told."""

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.load import load_config


def problem(**keys):
    with pytest.raises(ConfigError) as caught:
        load_config(keys)
    (text,) = caught.value.problems
    return text


def notices(**keys):
    return load_config(keys).notices


def test_a_positive_max_steps_beats_epochs_with_one_notice():
    assert notices(max_steps=5, num_train_epochs=3) == ("max_steps: 5 beats num_train_epochs: 3.0",)
    assert notices(max_steps=-1, num_train_epochs=3) == ()
    assert notices(max_steps=5) == ()


def test_a_chat_template_is_a_name_or_a_file():
    text = problem(chat_template="ernie_vll")
    assert "neither a known format (base, ernie_thinking, ernie_vl, ernie_vl_thinking) nor a .jinja file" in text
    assert text.endswith("Did you mean 'ernie_vl'?")
    load_config({"chat_template": "own/format.jinja"})
    load_config({"chat_template": "ernie_thinking"})


def test_warmup():
    assert notices(warmup_steps=5, warmup_ratio=0.1) == ("warmup_steps: 5 beats warmup_ratio: 0.1",)
    assert notices(warmup_steps=20, max_steps=10) == ("warmup_steps: 20 is longer than the run (max_steps: 10)",)
    assert notices(warmup_steps=20, max_steps=20) == ()


def test_fine_tuning_is_not_guessed_in_silence():
    (text,) = notices(train_dataset_path="a.jsonl")
    assert "Full" in text
    assert "ERNIEKit would train LoRA" in text
    assert notices(train_dataset_path="a.jsonl", fine_tuning="Full") == ()


def test_an_evaluation_of_nothing_is_named():
    (text,) = notices(evaluation_strategy="steps")
    assert "eval_dataset_path is not set" in text
    assert notices(evaluation_strategy="steps", eval_dataset_path="a.jsonl") == ()
    assert notices(evaluation_strategy="no") == ()


def test_speed_keys_share_one_notice():
    (text,) = notices(release_grads=True, amp_custom_white_list=None, fuse_rope=1, fuse_linear=True, recompute=True)
    assert text.startswith("accepted and not acted on in this version")
    assert text.endswith(": fuse_linear, fuse_rope, release_grads")


def test_speed_keys_that_ask_for_nothing_are_not_named():
    assert notices(release_grads=False, fuse_rope="false", dataloader_num_workers=0, virtual_pp_degree=1) == ()


def test_keys_without_effect_share_one_notice():
    assert notices(stage="SFT", beta=0.1, loss_type="hinge", lora_rank=32, scale_loss=4096, apply_hadamard=True) == (
        "without effect here: scale_loss; apply_hadamard (with compute_type: bf16); lora_rank (with fine_tuning: "
        "Full); loss_type, beta (with stage: SFT)",
    )


def test_a_sequence_is_shared_by_tensor_ranks_alone():
    (text,) = notices(sequence_parallel=True)
    assert text == "without effect here: sequence_parallel (with tensor_parallel_degree: -1)"
    assert notices(sequence_parallel=True, tensor_parallel_degree=2) == ()


def test_idle_keys_without_effect_are_not_named():
    assert notices(reference_free=False, do_train=True, train_dataset_prob="1.0", rslora=False) == ()


def test_recomputed_part_needs_recomputation():
    assert "recompute_granularity (with recompute: false)" in notices(recompute_granularity="full_attn")[0]
    assert notices(recompute_granularity="full_attn", recompute=True) == ()


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"train_dataset_path": "a,b,c", "train_dataset_prob": "0.5,0.5", "max_steps": 5}, ("2 values", "has 3")),
        ({"eval_dataset_path": "a,b", "eval_dataset_type": "erniekit,text,text"}, ("3 values", "has 2")),
        ({"train_dataset_path": "a,b", "train_dataset_prob": "1.5,-0.5", "max_steps": 5}, ("negative",)),
        ({"train_dataset_path": "a,b", "train_dataset_prob": "0,0", "max_steps": 5}, ("above 0",)),
    ],
)
def test_shares(keys, parts):
    text = problem(**keys)
    assert all(part in text for part in parts)
    assert "argument" in text


def test_one_type_serves_all_files():
    config = load_config({"train_dataset_path": "a,b", "train_dataset_type": "erniekit", "max_steps": 5})
    assert config.data.train_dataset_type == ["erniekit"]


def test_learning_rates():
    text = problem(learning_rate=1e-6, min_lr=1e-5)
    assert "min_lr: 1e-05 (argument)" in text
    assert "learning_rate: 1e-06 (argument)" in text
    assert load_config({"learning_rate": 5e-7, "min_lr": 5e-7}).optimizer.min_lr == 5e-7
    load_config({"learning_rate": 1e-6, "min_lr": 1e-5, "lr_scheduler_type": "constant_with_warmup"})


def test_the_end_of_the_polynomial_is_below_its_start():
    assert "lr_end: 1e-07 (default) is above learning_rate: 1e-08" in problem(
        lr_scheduler_type="polynomial", learning_rate=1e-8
    )
    load_config({"lr_end": 1.0})  # without effect


@pytest.mark.parametrize("start", [{"warmup_steps": 20}, {"steady_steps": 20, "lr_scheduler_type": "wsd"}])
def test_a_schedule_needs_a_way_down(start):
    assert "leaves no way down to decay_steps: 20 (argument)" in problem(decay_steps=20, **start)
    load_config({"decay_steps": 21, **start})
    load_config({"decay_steps": 20, **start, "lr_scheduler_type": "constant"})


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"freeze": ["a", "(b"]}, "'(b' is no regular expression"),
        ({"lr_multipliers": {"*a": 2}}, "'*a' is no regular expression"),
        ({"lr_multipliers": {"a": -1}}, "'a': -1 is no number above 0"),
        ({"lr_multipliers": {"a": "x"}}, "'a': x is no number above 0"),
        ({"train_only": ["a"], "train_emb_only": 1}, "only one of them can be"),
    ],
)
def test_patterns_and_factors(keys, part):
    assert part in problem(**keys)


def test_mixing_follows_the_number_of_files():
    one, two = load_config({"train_dataset_path": "a"}), load_config({"train_dataset_path": "a,b", "max_steps": 1})
    assert (one.data.mix_strategy, two.data.mix_strategy) == ("concat", "random")
    assert two.origins["mix_strategy"] == "default for 2 training files"
    assert not two.given("mix_strategy")


def test_drawing_rows_needs_an_end():
    text = problem(train_dataset_path="a,b")
    for part in ("mix_strategy: random (default for 2 training files)", "max_steps: -1 (default)", "concat"):
        assert part in text
    for end in ({"max_steps": 5}, {"num_samples_each_epoch": 100}, {"mix_strategy": "concat"}):
        load_config({"train_dataset_path": "a,b", **end})
    load_config({"eval_dataset_path": "a,b", "mix_strategy": "random"})  # an evaluation draws nothing


def test_evaluation_batches_follow_training_batches():
    config = load_config({"batch_size": 3})
    assert config.train.per_device_eval_batch_size == 3
    assert config.origins["per_device_eval_batch_size"] == "default: batch_size"
    assert load_config({"batch_size": 3, "per_device_eval_batch_size": 1}).train.per_device_eval_batch_size == 1


def test_an_unreadable_value_gives_no_second_problem():
    assert problem(learning_rate="quick", min_lr=1e-3) == "argument: learning_rate: quick is not a number"


def test_a_split_and_evaluation_files_are_refused_together():
    with pytest.raises(ConfigError, match=r"validation_split: 0\.1 .* and eval_dataset_path: \[a\] .* delete one"):
        load_config({"validation_split": 0.1, "eval_dataset_path": "a"})
    assert load_config({"validation_split": 0.1}).data.has_eval_data


def test_a_file_that_is_never_drawn_cannot_end_an_epoch():
    keys = {"mix_strategy": "interleave_over", "train_dataset_path": "a,b", "train_dataset_prob": "0,1"}
    with pytest.raises(ConfigError, match="never draws some"):
        load_config(keys)
    load_config({**keys, "mix_strategy": "interleave_under"})


def test_a_guard_against_forgetting_needs_something_to_measure():
    with pytest.raises(ConfigError, match=r"canary_max_increase: 0\.1 \(argument\) needs files.*canary_dataset_path"):
        load_config({"canary_max_increase": 0.1})
    assert load_config({"canary_max_increase": 0.1, "canary_dataset_path": "a.jsonl"}).watch.canary_max_increase == 0.1


def test_each_canary_file_has_its_format():
    with pytest.raises(ConfigError, match=r"canary_dataset_type.* has 2 values and canary_dataset_path"):
        load_config({"canary_dataset_path": "a,b,c", "canary_dataset_type": "text,erniekit"})

"""Other toolkits' run files: told apart, read key by key with none lost in silence, written so that `check` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.dialects.rules import CHANGED, KEPT, LOST
from erniekit.config.load import load_config
from erniekit.config.migrate import DIALECTS, migrate
from erniekit.config.reader import read_file
from erniekit.config.run import ALIASES, KEYS

FILES = Path(__file__).parents[2] / "data" / "migrate"
CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
NAMES = ("erniekit", "paddleformers", "llamafactory", "swift")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    return path


def reasons(done, kind: str) -> dict[str, str]:
    return {line.entry.name: line.outcome.reason for line in done.lines if line.outcome.kind == kind}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_tells_its_toolkit_and_no_key_vanishes(name, tmp_path):
    done = migrate(FILES / f"{name}.yaml")
    assert done.dialect.name == name
    read = read_file(FILES / f"{name}.yaml")
    kinds = [done.of(kind) for kind in (KEPT, CHANGED, LOST)]
    assert sum(map(len, kinds)) == len(read) == len(done.lines) > 10
    assert [line.entry for line in done.lines] == read
    assert all(map(len, kinds))
    path = tmp_path / "ours.yaml"
    path.write_text(done.text())
    config = load_config(path)
    for line in done.lines:
        for key in line.outcome.settings:
            assert config.given(ALIASES[key][0].name if key in ALIASES else key)
        assert line.outcome.kind == KEPT or (line.outcome.reason and line.text in done.text())


def test_llama_factory():
    done = migrate(FILES / "llamafactory.yaml")
    config = load_config(done.settings)
    assert (config.model.stage, config.model.fine_tuning, config.lora.lora_rank) == ("SFT", "LoRA", 16)
    assert (config.data.max_seq_len, config.data.packing, config.data.random_shuffle) == (2048, False, False)
    assert (config.train.batch_size, config.train.evaluation_strategy) == (1, "steps")
    assert (config.value("sharding"), config.value("tensorwise_offload_optimizer")) == ("stage2", True)
    assert "packing" in done.added and "max_seq_len" not in done.added
    assert "only ERNIE 4.5" in reasons(done, CHANGED)["model_name_or_path"]
    lost = reasons(done, LOST)
    assert "dataset_info.json" in lost["dataset"]
    assert "template is used" in lost["template"]
    assert lost["something_new"].startswith("not known")
    assert "hush" not in done.text() and "hf_hub_token: (secret)" in done.text()


def test_swift():
    done = migrate(FILES / "swift.yaml")
    config = load_config(done.settings)
    assert config.model.model_name_or_path == "baidu/ERNIE-4.5-21B-A3B-PT"
    assert (config.model.download_hub, config.model.fine_tuning, config.model.stage) == ("modelscope", "Full", "DPO")
    assert config.data.train_dataset_path == ["data/train.jsonl", "data/more.jsonl"]
    assert config.data.eval_dataset_path == ["data/eval.jsonl"]
    assert config.data.columns == {"query": "q", "response": "a"}
    assert (config.data.mix_strategy, config.data.max_seq_len) == ("concat", 8192)
    assert config.value("min_lr") == 1e-6 and config.value("weight_decay") == 0.1
    assert "'#'" in reasons(done, CHANGED)["dataset"]
    assert {"truncation_strategy", "attn_impl"} <= reasons(done, LOST).keys()
    assert "split_dataset_ratio" in {**reasons(done, LOST), **reasons(done, CHANGED)}


ADAPTERS = {
    "llamafactory": """
stage: sft
finetuning_type: lora
lora_rank: 16
lora_dropout: 0.1
lora_target: q_proj,v_proj
additional_target: lm_head
use_dora: true
loraplus_lr_ratio: 16
quantization_bit: 4
""",
    "swift": """
train_type: lora
lora_rank: 16
lora_dropout: 0.1
lora_alpha: -1
target_modules: [q_proj, v_proj]
modules_to_save: [lm_head]
use_dora: true
target_parameters: experts
lorap_lr_ratio: 16
quant_bits: 4
""",
    "paddleformers": """
template_backend: custom
fine_tuning: LoRA
lora_rank: 16
lora_dropout: 0.1
lora_target_modules: [q_proj, v_proj]
modules_to_save: lm_head
dora: true
pissa: false
use_mora: true
lora_plus_scale: 16
compute_type: nf4
""",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_a_quantised_base(name, tmp_path):
    done = migrate(write(tmp_path, ADAPTERS[name]))
    assert done.dialect.name == name
    config = load_config(done.settings)
    lora = config.lora
    assert (config.model.fine_tuning, lora.lora_rank, lora.lora_dropout, lora.lora_alpha) == ("LoRA", 16, 0.1, -1)
    assert (lora.lora_target_modules, lora.modules_to_save) == (["q_proj", "v_proj"], ["lm_head"])
    assert (lora.dora, lora.lora_init, lora.lora_plus_scale) == (True, "default", 16)
    assert config.model.compute_type == "nf4"
    assert reasons(done, LOST).keys() <= {"target_parameters", "use_mora", "template_backend"}


@pytest.mark.parametrize(
    "text",
    [
        "stage: sft\nfinetuning_type: lora\npissa_init: true\npissa_iter: 16\n",
        "train_type: lora\ninit_weights: pissa\ntarget_parameters: experts\n",
        "template_backend: custom\nfine_tuning: LoRA\npissa: true\n",
    ],
    ids=["llamafactory", "swift", "paddleformers"],
)
def test_adapters_that_begin_with_singular_vectors(text, tmp_path):
    done = migrate(write(tmp_path, text))
    assert load_config(done.settings).lora.lora_init == "pissa"
    assert reasons(done, LOST).keys() <= {"pissa_iter", "target_parameters", "template_backend"}


def test_words_for_the_places_of_adapters(tmp_path):
    done = migrate(write(tmp_path, "finetuning_type: lora\nlora_target: all\n"))
    assert done.settings["lora_target_modules"] == "all-linear"
    lost = reasons(migrate(write(tmp_path, "finetuning_type: lora\nlora_target: q_proj,c_attn\n")), LOST)
    assert lost["lora_target"] == "no module of ERNIE 4.5: c_attn"


def test_preferences_of_llama_factory(tmp_path):
    done = migrate(write(tmp_path, "stage: dpo\nfinetuning_type: lora\npref_loss: orpo\npref_beta: 0.2\n"))
    config = load_config(done.settings)
    assert (config.model.stage, config.align.loss_type) == ("DPO", "orpo")
    assert (config.align.pref_loss_ratio, config.align.sft_loss_ratio) == (0.2, 1.0)
    assert not config.align.normalize_logps and not config.align.mask_out_eos_token
    done = migrate(write(tmp_path, "stage: kto\nfinetuning_type: lora\npref_beta: 0.2\nkto_chosen_weight: 2\n"))
    config = load_config(done.settings)
    assert (config.model.stage, config.align.beta, config.align.kto_desirable_weight) == ("KTO", 0.2, 2.0)
    assert load_config(migrate(write(tmp_path, "stage: rm\nfinetuning_type: lora\n")).settings).model.stage == "RM"


def test_preferences_of_swift(tmp_path):
    def align(text):
        return load_config(migrate(write(tmp_path, f"train_type: lora\n{text}")).settings).align

    simpo = align("rlhf_type: simpo\n")
    assert (simpo.loss_type, simpo.beta, simpo.simpo_gamma, simpo.sft_loss_ratio) == ("simpo", 2.0, 1.0, 1.0)
    assert align("rlhf_type: simpo\ncpo_alpha: 0\nbeta: 2.5\n").sft_loss_ratio == 0
    orpo = align("rlhf_type: orpo\nbeta: 0.3\n")
    assert (orpo.loss_type, orpo.pref_loss_ratio, orpo.sft_loss_ratio) == ("orpo", 0.3, 1.0)
    assert align("rlhf_type: dpo\nloss_type: exo_pair\nlabel_smoothing: 0.001\n").loss_type == "exo"
    assert not align("rlhf_type: dpo\n").mask_out_eos_token
    done = migrate(write(tmp_path, "train_type: lora\nrlhf_type: dpo\nloss_type: discopop\n"))
    assert reasons(done, LOST) == {"loss_type": "discopop has no counterpart here"}


def test_paddleformers():
    done = migrate(FILES / "paddleformers.yaml")
    config = load_config(done.settings)
    assert (config.value("tensor_parallel_degree"), config.data.chat_template) == (2, "ernie_vl")
    assert (config.data.packing, config.value("normalize_logps")) == (False, False)
    assert {"packing", "normalize_logps"} <= done.added.keys()
    assert {"_attn_implementation", "template_backend", "save_checkpoint_format"} <= reasons(done, LOST).keys()
    assert config.value("sharding") == "stage1"
    assert "accepted and not acted on" in reasons(done, CHANGED)["sharding_parallel_config"]


def test_erniekit():
    done = migrate(FILES / "erniekit.yaml")
    config = load_config(done.settings)
    assert (config.model.fine_tuning, config.train.seed) == ("LoRA", 42)
    assert config.value("num_samples_each_epoch") == 6000000
    lines = [line.text for line in done.lines if line.entry.name == "seed"]
    assert lines == ["seed: 23 (stands once more further down, which counts)", "seed: 42"]
    assert "without effect here" in reasons(done, LOST)["do_train"]


def test_a_value_that_is_wrong_and_keys_that_contradict_each_other(tmp_path):
    text = "finetuning_type: lora\ncutoff_len: long\nlearning_rate: 1e-5\nstage: sft\n"
    text += "lr_scheduler_kwargs: {min_lr: 1e-3}\nlr_scheduler_type: polynomial_with_wings\n"
    done = migrate(write(tmp_path, text))
    lost = reasons(done, LOST)
    assert lost["cutoff_len"] == "max_seq_len: long is not a whole number"
    assert "no counterpart" in lost["lr_scheduler_type"]
    assert "is above learning_rate" in lost["lr_scheduler_kwargs"]
    assert len(done.lines) == 6
    load_config(done.settings)


SHIPPED = [path for path in sorted(CONFIGS.rglob("run_*.yaml")) if "_bases" not in path.parts][::12]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_configs_that_erniekit_ships(path):
    done = migrate(path)
    assert done.dialect.name == "erniekit"
    assert len(done.lines) == len(read_file(path))
    config, ours = load_config(path), load_config(done.settings)
    lost = {line.entry.name for line in done.lines if line.outcome.kind == LOST}
    differ = {name for name in KEYS if config.value(name) != ours.value(name)} - done.added.keys()
    assert differ <= {ALIASES[name][0].name if name in ALIASES else name for name in lost}


def test_what_stands_in_a_key_stays_in_a_comment(tmp_path):
    done = migrate(write(tmp_path, 'cutoff_len: 9\n"odd\\nseed: 7": "a\\nb"\n'))
    path = tmp_path / "ours.yaml"
    path.write_text(done.text())
    assert load_config(path).train.seed == 42


def test_two_keys_that_say_different_things(tmp_path):
    done = migrate(write(tmp_path, "cutoff_len: 9\npreprocessing_num_workers: 16\ndataloader_num_workers: 4\n"))
    assert reasons(done, LOST) == {"dataloader_num_workers": "preprocessing_num_workers says otherwise"}
    assert done.settings["dataloader_num_workers"] == "16"


def test_no_loggers_and_a_share_to_evaluate_on(tmp_path):
    done = migrate(write(tmp_path, "cutoff_len: 9\nreport_to: none\nval_size: 0.1\n"))
    assert (done.settings["report_to"], done.settings["validation_split"]) == ("none", "0.1")
    lost = reasons(migrate(write(tmp_path, "cutoff_len: 9\nval_size: 100\n")), LOST)
    assert lost["val_size"] == "a number of rows; here validation_split is a share"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_every_rule_leads_to_keys_that_exist(dialect):
    assert dialect.rules or dialect.name == "erniekit"
    assert set(dialect.marks.split()) <= set(dialect.rules)
    for name, rule in dialect.rules.items():
        for value in ("true", "false", "lora", "1", "zero3", "dpo", "{min_lr: 1}", ["a.jsonl"]):
            outcome = rule(value)
            assert outcome.settings or outcome.reason, name
            assert set(outcome.settings) <= {*KEYS, *ALIASES}, name
    assert set(dialect.defaults({"train_dataset_path": "a,b", "stage": "DPO"})) <= set(KEYS)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        migrate(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        migrate(write(tmp_path, "a: [\n"))
    with pytest.raises(ConfigError, match="must hold `key: value` lines"):
        migrate(write(tmp_path, "- a\n- b\n"))
    with pytest.raises(ConfigError, match="say which with --from"):
        migrate(write(tmp_path, "apples: 3\n"))
    assert len(migrate(write(tmp_path, "apples: 3\n"), "swift").lines) == 1

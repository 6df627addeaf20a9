"""The budget against Paddle's account of tensors: the peak of a step, and what each layer keeps between the passes.

Models are small and steps are real. Nothing in the formula is fitted, so that what it misses shows here.
"""

from __future__ import annotations

import gc
import json

import numpy as np
import paddle
import pytest
from paddle.base import core

from erniekit.adapters.lora import add_adapters
from erniekit.adapters.targets import adapter_config
from erniekit.config.align import AlignConfig
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.families import count_parameters, family
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.config.lora import LoraConfig
from erniekit.data.batch import Batch, PreferenceBatch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.recompute import apply_recompute
from erniekit.training.activations import Load, Terms
from erniekit.training.budget import Budget, Formats, Parameters, architecture_of, budget, megabytes, run_budget
from erniekit.training.objective import LanguageModelObjective, LossWeights
from erniekit.training.optimizer import AdamWSettings, Optimizer
from erniekit.training.preference import preference_objective
from erniekit.training.reference import base_log_probs
from erniekit.training.router import RouterUpkeep
from erniekit.training.step import Objective, Totals, train_step

DENSE = family("micro-dense").replace(hidden_size=128, intermediate_size=320, head_dim=32, num_hidden_layers=3)
MOE = family("micro-moe").replace(
    hidden_size=128, intermediate_size=320, head_dim=32, moe_intermediate_size=96, num_hidden_layers=3
)
TERMS = Terms()
OBJECTIVE = LanguageModelObjective(LossWeights(balance=1e-5))


class Measured:
    """A model in training, and the bytes that it holds above what was there before."""

    def __init__(
        self, arch: ErnieConfig, load: Load, *, lora: dict | None = None, recompute: str | None = None
    ) -> None:
        gc.collect()
        self._before = current()
        self.arch, self.load, self.recompute = arch, load, recompute
        self.model = ErnieForCausalLM(arch)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.parameters = Parameters(shapes, list(shapes))
        for p in self.model.parameters():
            p.set_value(paddle.full_like(p, 0.01))
        if lora is not None:
            adapter = adapter_config(LoraConfig(**lora), list(shapes))
            add_adapters(self.model, adapter, seed=0)
            self.parameters = Parameters.adapted(shapes, adapter)
        if recompute:
            apply_recompute(self.model, recompute)
        self.model.train()

    def batch(self) -> Batch:
        rows, length = self.load.rows, self.load.length
        ids = np.random.default_rng(0).integers(3, self.arch.vocab_size, (rows, length + 1))
        positions = np.arange(length)[None].repeat(rows, 0)
        return Batch(ids[:, :-1], ids[:, 1:], positions, np.ones_like(positions))

    def pairs(self) -> PreferenceBatch:
        """A pair in every row: a quarter of it the prompt, the rest two answers with a label on every position."""
        whole, (rows, length) = self.batch(), (self.load.rows, self.load.length)
        place = np.arange(length)[None].repeat(rows, 0)
        side = np.digitize(place, [length // 4, 5 * length // 8])  # 1 chosen, 2 rejected
        ids = np.where(side, side - 1 + 2 * np.arange(rows)[:, None], -1).astype("int32")
        ends = np.where(side == 1, 5 * length // 8, length).astype("int32")
        numbers = np.arange(rows)
        return PreferenceBatch(
            whole.input_ids, np.where(side, whole.labels, -100), whole.position_ids, whole.segment_ids, ends, ids,
            chosen=2 * numbers, rejected=2 * numbers + 1, mismatched=np.full(rows, -1), samples=numbers,
            score_delta=np.ones(rows, "float32"), names=("",) * rows,
        )  # fmt: skip

    def between_the_passes(self) -> int:
        """What the forward pass leaves."""
        batch = self.batch()
        before = current()
        losses = OBJECTIVE(self.model, batch, Totals.of([batch], row_length=self.load.length))
        found = current() - before
        losses.total.backward()
        return found

    def peak(self, *, micro_batches: int, objective: Objective = OBJECTIVE, batch: Batch | None = None) -> int:
        """The most of a step that is not the first, which makes the optimizer's states."""
        optimizer = Optimizer(self.model.named_parameters(), AdamWSettings())
        upkeep = RouterUpkeep(self.model, bias_coefficient=0.0, orthogonal_lambda=0.0)
        for _ in range(2):
            core.host_memory_stat_reset_peak_value("Allocated", 0)
            train_step(
                self.model, optimizer, batches=[batch or self.batch()] * micro_batches, objective=objective,
                upkeep=upkeep, learning_rate=1e-3, row_length=self.load.length,
            )  # fmt: skip
        return core.host_memory_stat_peak_value("Allocated", 0) - self._before

    def budget(self, *, micro_batches: int = 1, terms: Terms = TERMS) -> Budget:
        return budget(
            self.arch, self.load, self.parameters, formats=Formats(), terms=terms, micro_batches=micro_batches,
            recompute=self.recompute,
        )  # fmt: skip


def current() -> int:
    return core.host_memory_stat_current_value("Allocated", 0)


def load(rows: int, length: int) -> Load:
    return Load(rows, length, labelled=rows * length)


@pytest.mark.parametrize("arch", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("recompute", "micro_batches"), [(None, 1), (None, 2), ("full", 2), ("full_attn", 1), ("core_attn", 1)]
)
def test_the_peak_of_a_full_step(arch, recompute, micro_batches):
    run = Measured(arch, load(2, 256), recompute=recompute)
    needed = run.budget(micro_batches=micro_batches).peak
    assert needed == pytest.approx(run.peak(micro_batches=micro_batches), rel=0.05)


@pytest.mark.parametrize(("rows", "length"), [(1, 64), (3, 128), (1, 512)])
@pytest.mark.parametrize("arch", [DENSE, MOE, MOE.replace(num_nextn_predict_layers=1)], ids=["dense", "moe", "mtp"])
def test_the_peak_follows_the_batch(arch, rows, length):
    run = Measured(arch, load(rows, length))
    assert run.budget().peak == pytest.approx(run.peak(micro_batches=1), rel=0.05)


@pytest.mark.parametrize("arch", [
    DENSE.replace(vocab_size=4096), DENSE.replace(vocab_size=4096, tie_word_embeddings=False),
], ids=["tied", "own"])  # fmt: skip
def test_the_peak_of_a_large_vocabulary(arch):
    run = Measured(arch, load(1, 64))
    assert run.budget().peak == pytest.approx(run.peak(micro_batches=1), rel=0.05)


@pytest.mark.parametrize("lora", [
    {}, {"lora_target_modules": ["attention"]}, {"lora_target_modules": ["experts"]}, {"lora_dropout": 0.1},
    {"lora_init": "pissa"}, {"lora_target_modules": ["attention", "mlp"], "dora": True},
    {"modules_to_save": ["embed_tokens"]},
], ids=lambda lora: "-".join(map(str, lora)) or "all")  # fmt: skip
def test_the_peak_of_adapters(lora):
    run = Measured(MOE, load(2, 256), lora=lora)
    assert run.budget().peak == pytest.approx(run.peak(micro_batches=1), rel=0.05)


def test_the_peak_of_adapters_with_recomputation():
    run = Measured(MOE, load(2, 256), lora={}, recompute="full")
    assert run.budget().peak == pytest.approx(run.peak(micro_batches=1), rel=0.05)


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_the_peak_of_pairs(lora, recompute):
    """With adapters the base runs as the reference in every step; else its log-probabilities are numbers."""
    run = Measured(MOE, Load(2, 256, labelled=384), lora=lora, recompute=recompute)
    batch = run.pairs()
    numbers = paddle.zeros([batch.num_answers], "float64")
    reference = (lambda _model, _batch: numbers) if lora is None else base_log_probs
    objective = preference_objective("DPO", AlignConfig(), LossWeights(balance=1e-5), reference=reference)
    needed = run.budget(terms=Terms(head="answers")).peak
    assert needed == pytest.approx(run.peak(micro_batches=1, objective=objective, batch=batch), rel=0.05)


@pytest.mark.parametrize(
    ("rows", "length", "lora"), [(1, 64, None), (2, 96, None), (1, 160, {"lora_rank": 4})], ids=["1x64", "2x96", "lora"]
)
@pytest.mark.parametrize("arch", [
    DENSE, DENSE.replace(intermediate_size=64, num_key_value_heads=4), MOE, MOE.replace(moe_k=3),
    MOE.replace(moe_num_experts=8, moe_intermediate_size=32), MOE.replace(moe_num_shared_experts=0),
], ids=["dense", "narrow", "moe", "k3", "e8", "unshared"])  # fmt: skip
def test_what_a_layer_keeps(arch, lora, rows, length):
    """The difference of models of three and of four layers."""
    more = arch.replace(num_hidden_layers=4, **({"moe_layer_end_index": 3} if arch.is_moe else {}))
    runs = [Measured(shape, load(rows, length), lora=lora) for shape in (arch, more)]
    kept = [run.budget().activations for run in runs]
    found = [run.between_the_passes() for run in runs]
    extra = arch.is_moe * 2 * rows * length * arch.moe_num_experts * 4  # logits, which losses read, and their softmax
    assert kept[1] - kept[0] + extra == pytest.approx(found[1] - found[0], rel=0.01)


@pytest.mark.parametrize(
    ("keys", "on_gpu", "weights", "gradients", "states"),
    [
        ({}, False, 4, 4, 8),
        ({}, True, 2, 2, 12),
        ({"compute_type": "fp32"}, True, 4, 4, 8),
        ({"use_lowprecision_moment": True}, False, 4, 4, 4),
        ({"optim": "adamw_16bit_moment", "ema_decay": 0.99}, False, 4, 4, 8),
    ],
)
def test_bytes_of_a_parameter(keys, on_gpu, weights, gradients, states):
    needed, count = run_budget(load_config(keys), family("0.3B"), on_gpu=on_gpu), count_parameters(family("0.3B"))
    assert (needed.numbers, needed.trained) == (count, count)
    found = (needed.weights, needed.gradients, needed.states)
    assert found == tuple(count * part for part in (weights, gradients, states))


def test_offloaded_states_are_in_host_memory():
    """Those of the largest parameter come to the device; on a CPU nothing changes, and averages stay where they are."""
    keys, arch = {"ema_decay": 0.99}, family("0.3B")
    count, largest = count_parameters(arch), arch.vocab_size * arch.hidden_size
    plain = run_budget(load_config(keys), arch, on_gpu=True)
    needed = run_budget(load_config({**keys, "tensorwise_offload_optimizer": True}), arch, on_gpu=True)
    assert (plain.states, plain.host) == (16 * count, 0) and "host" not in plain.text
    assert (needed.states, needed.host) == (4 * count + 12 * largest, 12 * count)
    assert needed.peak == plain.peak - plain.states + needed.states
    assert f"host memory {megabytes(12 * count)} MB" in needed.text
    assert run_budget(load_config({"offload_optim": True}), arch) == run_budget(load_config({}), arch)


def test_fp8_copies_of_weights():
    """A byte for every number of the modules that compute in FP8; none where weights are given away (stage 3)."""
    keys = {"compute_type": "fp8", "stage": "PT", "max_seq_len": 128}
    needed, plain = run_budget(load_config(keys), MOE), run_budget(load_config({"max_seq_len": 128}), MOE)
    dense, expert, shared = 3 * 128 * 320, 4 * 3 * 128 * 96, 3 * 128 * 96
    assert needed.copies == dense + 2 * (expert + shared) and plain.copies == 0
    assert needed.peak == plain.peak + needed.copies
    assert "FP8 copies 0.5" in needed.text and "FP8" not in plain.text
    cut = Cut.of(Layout(2, sharding=2, stage=3), 0)
    assert run_budget(load_config(keys), MOE, cut=cut).copies == 0


def test_adapters_on_a_quantised_base():
    """wint4/8: the routed experts take half a byte a number, other linear layers one, the rest its own format."""
    keys = {"fine_tuning": "LoRA", "lora_rank": 8, "compute_type": "wint4/8", "max_seq_len": 128}
    needed, plain = run_budget(load_config(keys), MOE), run_budget(load_config({"max_seq_len": 128}), MOE)
    assert needed.weights < 0.4 * plain.weights
    assert needed.trained < 0.2 * plain.trained
    assert needed.states == 8 * needed.trained


def test_the_architecture_of_a_folder_or_of_a_name(tmp_path):
    assert architecture_of(load_config({"model_name_or_path": "baidu/ERNIE-4.5-0.3B-Paddle"})) == family("0.3B")
    (tmp_path / "config.json").write_text(json.dumps(family("micro-moe").to_dict("pt")))
    found = architecture_of(load_config({"model_name_or_path": tmp_path}))
    assert found is not None and count_parameters(found) == count_parameters(family("micro-moe"))
    assert architecture_of(load_config({"model_name_or_path": "apples"})) is None
    (tmp_path / "config.json").write_text("[")
    assert architecture_of(load_config({"model_name_or_path": tmp_path})) is None

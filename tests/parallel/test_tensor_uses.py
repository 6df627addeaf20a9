"""What else is done with a model in parts: generation, scores of tokens, rewards, dropout, the other kernels."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from erniekit.checkpoint.folder import Folder
from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import Layout
from erniekit.config.load import load_config
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.cross_entropy import IGNORED
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import adapter_of, architecture, assemble_model
from tests.parallel.equal import Case, assert_parallel_equals_single, parallel
from tests.parallel.ranks import run_ranks
from tests.parallel.samples import VOCABULARY, packed_row, pair_row, steps_of, write_model

TWO = Layout(2, tensor=2, sequence_parallel=True)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, two of them of experts, tied."""
    return write_model(tmp_path_factory.mktemp("models") / "sparse", sparse=True, head_bias=True)


def assembled(mesh: Mesh, folder: Path, **keys: Any) -> ErnieForCausalLM:
    cfg, weights = load_config({"compute_type": "fp32", "stage": "SFT", **keys}), Folder.open(folder)
    arch: ErnieConfig = architecture(weights, cfg)
    return assemble_model(weights, arch, cfg, mesh=mesh, adapter=adapter_of(weights, arch, cfg))


# ---------------------------------------------------------------------- without gradients
@paddle.no_grad()
def used(mesh: Mesh, folder: Path) -> dict[str, np.ndarray]:
    """Tokens that are generated greedily by two rows with a cache, their logits, scores of tokens, all logits."""
    model = assembled(mesh, folder)
    model.eval()
    ids = paddle.to_tensor(np.random.default_rng(1).integers(3, VOCABULARY, [1, 5]))
    cache, logits = model.new_cache(), []
    for _ in range(4):
        logits.append(model.step(ids, cache))
        ids = logits[-1].argmax(-1, keepdim=True)
    rows = paddle.to_tensor(np.random.default_rng(2).integers(3, VOCABULARY, [2, 7]))
    labels = np.random.default_rng(3).integers(3, VOCABULARY, [14])
    everything = model(rows)
    labels[:8] = everything.reshape([14, -1]).argmax(-1).numpy()[:8]
    labels[5] = IGNORED
    hidden = model.trunk(rows, paddle.arange(7).unsqueeze(0).expand([2, 7]), paddle.full([2, 7], 7, "int32")).hidden_BSD
    losses, correct = model.lm_head.token_scores(hidden.reshape([14, -1]), paddle.to_tensor(labels))
    found = {"steps": paddle.stack(logits), "logits": everything, "losses": losses, "correct": correct}
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_generation_and_scores(sparse: Path) -> None:
    wanted = used(Mesh.single(), sparse)
    assert 7 <= wanted["correct"].sum() < 14
    for found in run_ranks(used, TWO, sparse):
        np.testing.assert_array_equal(found.pop("correct"), wanted["correct"])
        for name, array in found.items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------------- dropout
def dropped(mesh: Mesh, folder: Path) -> tuple[dict[str, np.ndarray], set[str]]:
    """What a rank has after its first block and in the end, with dropout everywhere, and which layers drop by a stream
    of the rank's own."""
    model = assembled(mesh, folder, fine_tuning="LoRA", lora_dropout=0.3)
    model.train()
    for layer in model.model.layers:
        layer.dropout = layer.self_attn.core_attn.dropout = 0.3
    kept: dict[str, np.ndarray] = {}
    model.model.layers[0].register_forward_post_hook(lambda _l, _given, made: kept.update(between=made[0].numpy()))
    paddle.seed(5)
    ids = paddle.to_tensor(np.random.default_rng(1).integers(3, VOCABULARY, [1, 9]))
    hidden = model.trunk(ids, paddle.arange(9).unsqueeze(0), paddle.full([1, 9], 9, "int32")).hidden_BSD
    kept |= {"end": hidden.numpy(), "drawn next": paddle.rand([4]).numpy()}
    own = {name for name, layer in model.named_sublayers() if getattr(layer, "stream", 0) == mesh.rank + 1}
    assert not any(getattr(layer, "stream", 0) not in (0, mesh.rank + 1) for layer in model.sublayers())
    return kept, {re.sub(r"^model\.layers\.\d+\.?", "", name) for name in own}


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("over", ["data", "tensor"])
def test_dropout_is_alike_where_ranks_are_alike_and_only_there(sparse: Path, over: Any, *, in_parts: bool) -> None:
    expert = 2 if over == "tensor" else 1
    layout = Layout(2, tensor=2, expert=expert, experts_over=over, sequence_parallel=in_parts)
    (one, own), (other, _) = run_ranks(dropped, layout, sparse)
    for name in ("end", "drawn next", *([] if in_parts else ["between"])):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    rows = {"self_attn.o_proj.adapter", "mlp.down_proj.adapter", "mlp.shared_experts.down_proj.adapter"}
    rows |= {"mlp.experts.gate_up_adapter"} if over == "tensor" else set()
    assert own == {"self_attn.core_attn", *rows, "mlp.experts.down_adapter", *([""] if in_parts else [])}
    plain, _ = dropped(Mesh.single(), sparse)
    assert np.abs(plain["end"] - one["end"]).max() > 1e-3  # something was dropped, and something else


DROPPED = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "moe_aux_loss_lambda": 0.1}
DRIFTING = {
    "tensor": Layout(2, tensor=2),
    "sequences": TWO,
    "experts over tensor": Layout(2, tensor=2, expert=2, experts_over="tensor"),
    "experts": Layout(2, expert=2),
    "weights": Layout(2, sharding=2, stage=3),
}


@pytest.mark.parametrize("layout", list(DRIFTING))
def test_what_drops_at_random_does_not_drift_apart(sparse: Path, layout: str) -> None:
    """What several ranks hold, their weights and gradients, is the same after every step, to the last bit."""
    keys = {"stage": "SFT", **DROPPED}
    whole = Case(sparse, steps_of(packed_row, rows=2), keys, rate=0.01, adamw=True)
    adapters = dataclasses.replace(whole, keys={**keys, "fine_tuning": "LoRA", "lora_rank": 2, "lora_dropout": 0.3})
    for case, found in zip((whole, adapters), parallel([whole, adapters], DRIFTING[layout]), strict=True):
        plain = dataclasses.replace(case, keys={**case.keys, **dict.fromkeys(DROPPED, 0.0), "lora_dropout": 0.0})
        assert found.figures[0]["loss"] != pytest.approx(plain.alone.figures[0]["loss"], rel=1e-4)


# ---------------------------------------------------------------------- recomputation
def recomputed(mesh: Mesh, folder: Path) -> list[np.ndarray]:
    """Gradients of 9 positions: alone, and when 4 other positions have gone through before they were recomputed."""
    model, found = assembled(mesh, folder, recompute=True), []
    model.train()

    def trunk(size: int) -> paddle.Tensor:
        ids = paddle.arange(3, 3 + size).unsqueeze(0)
        return model.trunk(ids, paddle.arange(size).unsqueeze(0), paddle.full([1, size], size, "int32")).hidden_BSD

    for others in (False, True):
        hidden = trunk(9)
        if others:
            with paddle.no_grad():
                trunk(4)
        paddle.square(hidden).sum().backward()
        grads = [p.grad.numpy().ravel() for p in model.parameters() if p.grad is not None]
        found.append(np.concatenate(grads))
        model.clear_gradients()
    return found


def test_rows_are_recomputed_at_their_own_length(sparse: Path) -> None:
    for alone, among_others in run_ranks(recomputed, TWO, sparse):
        np.testing.assert_array_equal(among_others, alone)


# ---------------------------------------------------------------------- rewards, kernels
def test_rewards(sparse: Path) -> None:
    assert_parallel_equals_single(Case(sparse, steps_of(pair_row, rows=2), {"stage": "RM"}, rate=0.02), TWO)


@pytest.mark.parametrize("tier", ["ERNIEKIT_NUMPY_OPS", "ERNIEKIT_PLAIN_OPS"])
def test_the_other_kernels(sparse: Path, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tier, "1")
    cases = [Case(sparse, steps_of(packed_row, rows=2), {"stage": "SFT"}, rate=0.02)]
    cases += [Case(sparse, steps_of(pair_row, rows=2), {"stage": "DPO", "loss_type": "simpo"}, rate=0.02)]
    assert_parallel_equals_single(cases, TWO)

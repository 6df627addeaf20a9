"""Blockwise FP8: the algebra of its backward passes, how near its gradients are, what it keeps, and for how long."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from erniekit.config.fp8 import Fp8
from erniekit.models.layers import MLP, Linear
from erniekit.models.moe import MoE
from erniekit.ops.float8 import E4M3, Blocks, Float8, Rows, Scheme, bf16_numbers, dense, quantise
from erniekit.parallel.recompute import apply_recompute
from erniekit.precision import blockwise
from erniekit.precision.blockwise import use_blockwise
from tests.unit.models.test_decoder import build

SETTINGS = Fp8("blockwise", ("experts", "shared_experts", "mlp"), emulate=True)
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
TOKENS = 150  # no multiple of 128; of four experts, each token takes two


class Exact(Float8):
    """Numbers that went through no cast: the codes are the numbers."""


def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch all rounding off."""

    def kept(x: paddle.Tensor, scheme: Scheme, *, counts: list[int] | None = None, **_how: Any) -> Exact:
        return Exact(x, paddle.ones([1]), scheme, E4M3, counts or [x.shape[-2]])

    def product(x: Exact, weight: Exact, *, turned: bool = False, counts: list[int]) -> paddle.Tensor:
        weights = weight.codes if weight.codes.ndim == 3 else weight.codes.unsqueeze(0)
        rows = x.codes.split(counts)
        return paddle.concat([paddle.matmul(part, weights[e], transpose_y=turned) for e, part in enumerate(rows)])

    def weight_product(x: Exact, grad: Exact, *, counts: list[int]) -> paddle.Tensor:
        pairs = zip(x.codes.split(counts), grad.codes.split(counts), strict=True)
        return paddle.stack([paddle.matmul(a, b, transpose_x=True) for a, b in pairs])

    monkeypatch.setattr(blockwise, "quantise_or_nan", kept)
    monkeypatch.setattr(blockwise, "dense", lambda x: x.codes)
    monkeypatch.setattr(blockwise, "product", product)
    monkeypatch.setattr(blockwise, "weight_product", weight_product)
    monkeypatch.setattr(blockwise, "bf16_numbers", lambda x: x)


def part(kind: str) -> MoE | MLP:
    """The MLP of a layer, always with the same weights."""
    return build(**SIZES).model.layers[1 if kind == "experts" else 0].mlp


def passed(block: MoE | MLP) -> dict[str, np.ndarray]:
    """The output for some tokens and all gradients."""
    rng = np.random.default_rng(3)
    x = paddle.to_tensor(rng.normal(size=(1, TOKENS, 128)).astype("float32"), stop_gradient=False)
    y = block(x)[0] if isinstance(block, MoE) else block(x)
    (y * paddle.to_tensor(rng.normal(size=y.shape).astype("float32"))).sum().backward()
    named = {name: p.grad.numpy() for name, p in block.named_parameters() if p.grad is not None}
    return named | {"x": x.grad.numpy(), "y": y.numpy()}


def named(block: MoE | MLP) -> paddle.nn.Layer:
    """The block where modules are looked for."""
    root, layer = paddle.nn.Layer(), paddle.nn.Layer()
    layer.mlp, root.layer = block, layer
    return root


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_without_rounding_it_is_what_it_stands_for(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    want, block = passed(part(kind)), part(kind)
    use_blockwise(named(block), SETTINGS)
    exactly(monkeypatch)
    found = passed(block)
    assert found.keys() == want.keys() and len(want) >= 5
    for name, expected in want.items():
        assert np.abs(found[name] - expected).max() <= 1e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_outputs_and_gradients_point_where_unrounded_ones_do(kind: str) -> None:
    want, block = passed(part(kind)), part(kind)
    use_blockwise(named(block), SETTINGS)
    found = passed(block)
    for name, expected in want.items():
        cosine = (found[name] * expected).sum() / np.linalg.norm(found[name]) / np.linalg.norm(expected)
        assert 0.997 < cosine < 1 - 1e-6, f"{name}: {cosine}"  # casts one after another


@pytest.mark.parametrize("counts", [[200], [130, 0, 1, 69]], ids=str)
def test_a_weight_s_gradient_is_that_of_rows_filled_up_with_zeros(counts: list[int]) -> None:
    """Its cosine with that of unrounded operands is above 0.999."""
    rng = np.random.default_rng(0)
    x, grad = (rng.normal(size=(sum(counts), 128)).astype("float32") for _ in range(2))
    sizes = np.float32(100.0) ** np.repeat(np.arange(len(counts)), counts)  # no block may reach into its neighbour
    x, grad = x * sizes[:, None], grad * sizes[:, None]
    layer = Linear(128, 128, bias=False, dtype="float32")
    stack = paddle.zeros([len(counts), 128, 128])
    module = blockwise.Module("m", blockwise.Watch(["m"]), blockwise._Common(), keep=True)
    cast = module.cast(paddle.to_tensor(x), Rows(), "x")
    found = module.weight_gradient(dense(cast), paddle.to_tensor(grad), stack, counts=counts).numpy()
    ends = np.cumsum([0, *counts])
    for expert, (start, stop) in enumerate(itertools.pairwise(ends)):
        want = x[start:stop].T @ grad[start:stop]
        filled = [
            np.pad(part[start:stop], [(0, -(stop - start) % 128), (0, 0)]).T for part in (dense(cast).numpy(), grad)
        ]
        if stop > start:
            a, b = (dense(quantise(paddle.to_tensor(each), Rows())).numpy() for each in filled)
            np.testing.assert_allclose(found[expert], a @ b.T, rtol=1e-5, atol=1e-5 * np.abs(want).max())
            assert (found[expert] * want).sum() / np.linalg.norm(want) / np.linalg.norm(found[expert]) > 0.999
        else:
            assert not found[expert].any()
    assert layer.weight.dtype == paddle.float32


def test_the_forward_pass_is_the_product_of_what_codes_stand_for() -> None:
    rng, layer = np.random.default_rng(1), Linear(256, 128, bias=True, dtype="float32")
    layer.weight.set_value(rng.normal(size=(256, 128)).astype("float32"))
    layer.bias.set_value(rng.normal(size=128).astype("float32"))
    x = paddle.to_tensor(rng.normal(size=(2, 5, 256)).astype("float32"))
    root, mlp = paddle.nn.Layer(), paddle.nn.Layer()
    mlp.gate_proj, root.mlp = layer, mlp
    top = paddle.nn.Layer()
    top.layer = root
    use_blockwise(top, SETTINGS)
    a = dense(quantise(x.reshape([10, 256]), Rows())).numpy()
    b = dense(quantise(layer.weight, Blocks())).numpy()
    want = bf16_numbers(paddle.to_tensor(a @ b)).numpy().reshape(2, 5, 128) + layer.bias.numpy()
    np.testing.assert_allclose(layer(x).numpy(), want, rtol=2**-8, atol=1e-5)
    assert np.abs(layer(x).numpy() - (x.numpy() @ layer.weight.numpy() + layer.bias.numpy())).max() > 0.05


def test_little_is_kept_for_the_backward_pass() -> None:
    """Codes of x and o1 of the experts, in one piece; their weights are the model's own tensors."""
    block = part("experts")
    block.shared_experts = None
    use_blockwise(named(block), SETTINGS)
    kept = {}

    def pack(x: paddle.Tensor) -> paddle.Tensor:
        kept[x.data_ptr()] = (str(x.dtype).removeprefix("paddle."), tuple(x.shape))
        return x

    x_TD = paddle.randn([2 * TOKENS, 128])
    x_TD.stop_gradient = False
    with paddle.autograd.saved_tensors_hooks(pack, lambda x: x):
        block.experts(x_TD, [200, 0, 60, 40], paddle.rand([2 * TOKENS]))
    assert sorted(kept.values()) == [
        ("float32", (4, 128, 128)), ("float32", (4, 128, 256)), ("float32", (300,)), ("float32", (300, 1)),
        ("float32", (300, 256)), ("uint8", (300, 128)),
    ]  # fmt: skip


class Counting:
    """How often weights were cast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights, plain = 0, blockwise.quantise_or_nan

        def counted(x: paddle.Tensor, scheme: Scheme, **how: Any) -> Float8:
            self.weights += isinstance(scheme, Blocks)
            return plain(x, scheme, **how)

        monkeypatch.setattr(blockwise, "quantise_or_nan", counted)

    def during(self, work: Callable[[], object]) -> int:
        """How often in this."""
        before = self.weights
        work()
        return self.weights - before


def test_adapters_on_frozen_experts() -> None:
    """Products are made one by one then; adapters have gradients, weights have none."""

    class Scaled(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.by = self.create_parameter([1])

        def forward(self, _rows: paddle.Tensor, made: paddle.Tensor, _counts: list[int]) -> paddle.Tensor:
            return made * (1.0 + self.by)

    want, block = part("experts"), part("experts")
    use_blockwise(named(block), SETTINGS)
    for each in (want, block):
        for p in each.experts.parameters():
            p.stop_gradient = True
        each.experts.gate_up_adapter, each.experts.down_adapter = Scaled(), Scaled()
        for adapter in (each.experts.gate_up_adapter, each.experts.down_adapter):
            adapter.by.set_value(paddle.full([1], 0.25))
    expected, found = passed(want), passed(block)
    assert found.keys() == expected.keys() and "experts.down_proj" not in found
    assert {"experts.gate_up_adapter.by", "experts.down_adapter.by"} <= found.keys()
    for name in ("x", "y"):
        assert np.linalg.norm(found[name] - expected[name]) < 0.1 * np.linalg.norm(expected[name]), name


IDS = paddle.to_tensor(np.random.default_rng(0).integers(3, 64, (2, 40)))


def test_copies_of_weights_are_made_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**SIZES)
    training, count = use_blockwise(model, SETTINGS), Counting(monkeypatch)
    apply_recompute(model, "full")
    number = 3 + 2 * (2 + 3)  # the dense layer's, and of two layers the experts' and the shared experts'
    assert len(training.modules) == number

    def micro_batch() -> None:
        model(IDS).square().mean().backward()

    assert [count.during(micro_batch) for _ in range(2)] == [number, 0]
    training.after_update()
    assert count.during(micro_batch) == number


def test_without_gradients_copies_are_neither_kept_nor_used() -> None:
    """So an evaluation of averaged weights sees these, and leaves nothing behind."""
    model = build(**SIZES)
    use_blockwise(model, SETTINGS)
    trained = model(IDS).numpy()
    weight = model.model.layers[1].mlp.experts.down_proj
    own = weight.numpy()
    weight.set_value(0.5 * own)
    with paddle.no_grad():
        averaged = model(IDS).numpy()
    weight.set_value(own)
    assert np.abs(averaged - trained).max() > 0.01
    np.testing.assert_array_equal(model(IDS).numpy(), trained)


def test_where_none_may_be_kept_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for keep in (True, False):
        model = build(**SIZES)
        training = use_blockwise(model, SETTINGS, keep=keep)
        model(IDS).square().mean().backward()
        gradients.append(model.model.layers[1].mlp.experts.down_proj.grad.numpy())
        assert all((module._codes is not None) == keep for module in training.modules)
    np.testing.assert_array_equal(*gradients)


def test_recomputation_changes_no_number() -> None:
    found = []
    for recomputed in (False, True):
        model = build(**SIZES, num_nextn_predict_layers=1)
        use_blockwise(model, SETTINGS)
        if recomputed:
            apply_recompute(model, "full")
        model.model(IDS, *_positions(model), predict_ahead=True).mtp_hidden[0].square().mean().backward()
        found.append({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith("model.mtp_block.0.mlp") for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(found[1][name], gradient, err_msg=name)


def _positions(model: Any) -> tuple[Any]:
    from erniekit.models.attention import Positions

    rows, width = IDS.shape
    places = paddle.arange(width).unsqueeze(0).expand([rows, width])
    return (Positions.of(places, paddle.full([rows, width], width, "int32"), model.config),)


def test_what_is_covered_computes_in_fp8_and_nothing_else() -> None:
    model = build(**SIZES, num_nextn_predict_layers=1)
    names = {module.name for module in use_blockwise(model, SETTINGS).modules}
    assert {"model.layers.0.mlp.up_proj", "model.mtp_block.0.mlp.gate_proj"} <= names
    assert {"model.layers.1.mlp.experts.down_proj", "model.layers.2.mlp.shared_experts.gate_proj"} <= names
    for name, layer in model.named_sublayers():
        if isinstance(layer, Linear):
            assert (layer.product is not None) == (name in names), name
    some = use_blockwise(build(**SIZES), Fp8("blockwise", ("attention",), emulate=True))
    assert {module.name.rpartition(".")[2] for module in some.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_gate_and_up_share_the_cast_of_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = part("dense")
    use_blockwise(named(mlp), SETTINGS)
    casts, plain = [], blockwise.quantise_or_nan
    monkeypatch.setattr(
        blockwise, "quantise_or_nan", lambda x, scheme, **how: casts.append(how["name"]) or plain(x, scheme, **how)
    )
    mlp(paddle.randn([1, 7, 128]))
    inputs = [name for name in casts if "input" in name]
    assert inputs == ["the input of layer.mlp.gate_proj", "the input of layer.mlp.down_proj"]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_on_the_wire_are_cast_rows(rows: int) -> None:
    """A byte for a number and four for 128 of them; casting what arrives again changes nothing."""
    block = part("experts")
    use_blockwise(named(block), SETTINGS)
    x = paddle.randn([rows, 256]) * paddle.logspace(-20, 20, 256)
    written = block.experts.wire.encode(x)
    assert written.dtype == paddle.uint8 and written.shape == [rows, 256 + 4 * 2]
    arrived = block.experts.wire.decode(written)
    np.testing.assert_array_equal(arrived.numpy(), dense(quantise(x, Rows())).numpy())
    np.testing.assert_array_equal(dense(quantise(arrived, Rows())).numpy(), arrived.numpy())


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 3, 0, 2]], ids=str)
def test_experts_may_have_no_rows(counts: list[int]) -> None:
    block = part("experts")
    watch = use_blockwise(named(block), SETTINGS).watch
    watch.begin(looking=True, comparing=True)
    x, weights = paddle.randn([sum(counts), 128]), paddle.rand([sum(counts)])
    x.stop_gradient = weights.stop_gradient = False
    block.experts(x, counts, weights).sum().backward()
    assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
    there = block.experts.down_proj.grad.abs().sum([1, 2]).numpy() > 0
    assert there.tolist() == [count > 0 for count in counts]


@pytest.mark.parametrize("where", ["input", "gradient of the output"])
def test_infinity_is_told_once_and_becomes_nan(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    mlp = part("dense")
    use_blockwise(named(mlp), SETTINGS)
    x = paddle.randn([1, 7, 128])
    x[0, 3, 5] = float("inf") if where == "input" else 0.0
    x.stop_gradient = False
    y = mlp(x)
    assert np.isnan(y.numpy()).all() == (where == "input")
    (y.sum() * (1.0 if where == "input" else float("inf"))).backward()
    assert all(np.isnan(p.grad.numpy()).all() for name, p in mlp.named_parameters() if name.endswith("weight"))
    told = capsys.readouterr()
    module = "gate_proj" if where == "input" else "down_proj"
    assert (told.out + told.err).count("NaN or infinity") == 1
    assert f"the {where} of layer.mlp.{module} holds NaN or infinity" in told.out + told.err


def test_the_watch_sees_casts_and_compares_products() -> None:
    block = part("experts")
    training = use_blockwise(named(block), SETTINGS)
    watch = training.watch
    passed(block)
    assert not watch.figures().any()
    training.after_update()
    watch.begin(looking=True, comparing=True)
    passed(block)
    told = watch.told(watch.figures(), details=True)
    assert set(told) == {
        *(f"layer.mlp.experts.{weight}_proj" for weight in ("gate_up", "down")),
        *(f"layer.mlp.shared_experts.{weight}_proj" for weight in ("gate", "up", "down")),
    }
    for name, figures in told.items():
        assert all(figures[f"amax_{role}"] > 0 for role in "xwg"), name
    off = watch.warn_of(1, watch.figures())
    assert all(0.005 < value < 0.1 for value in off.values()), off

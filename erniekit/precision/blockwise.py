"""Blockwise FP8 training: every product of the chosen modules, forward and backward, of E4M3 numbers.

    forward    y  = x w            x: a scale for 1 x 128 of a row         w: a scale for 128 x 128
    backward   dx = g w^T          g: a scale for 1 x 128 of a row         w: the same codes
               dw = x^T g          both anew, a scale for 128 x 1: a product sums along its blocks, here along tokens

Scales are powers of two, so only the cast rounds. For dw, x comes from its saved codes, which are what is kept of x
for the backward pass: one byte for a number. Tokens end in a short block, of each expert apart, which has the numbers
and the scale of one filled up with zeros. y and dx are rounded to bf16, dw stays in fp32 and is added up there.

Experts in one piece keep the codes of x, o1 = x w_gate_up and the weights p of the rows, no more:

    o2 = swiglu(o1) * p,  y = o2 w_down        p is multiplied in before the cast: then y is simply added up
    do2 = g w_down^T,  dp = sum(do2 * swiglu(o1)),  do1 = swiglu'(o1, do2 * p)

Rows that travel to experts elsewhere do so as codes and scales, in one message. What comes back, and all gradients,
travel as they are.

With adapters between the products these are made one by one, and a frozen weight keeps nothing of x. An adapter reads
rows that are not rounded, so these travel as they are, too.

Codes of weights are made when a step first needs them and serve all its micro-batches and all that is computed again;
`after_update` and `forget_weights` drop them. Without gradients (evaluation, perhaps of averaged weights) none are
kept and no kept ones are used. Where a rank gives its weights away between uses (stage 3), none are kept at all: that
would be the model once more.

E4M3 has no infinity, and casts lose NaN. So neither is ever cast: a module that meets them says so, and what it makes
of them is NaN throughout. A step with such a loss or gradient is not taken, by any rank (training/loop.py).

Knows layers and their slots; neither ranks, nor files, nor the run's config. On a GPU nothing of it was run.
Shapes: T rows (sorted by expert), D inputs, F outputs, I width, E experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import paddle
from paddle import nn

from erniekit.config.fp8 import BLOCK, Fp8
from erniekit.models.layers import Linear
from erniekit.models.moe import ExpertMLP, ExpertProduct, Experts
from erniekit.ops.float8 import (
    E4M3,
    Blocks,
    Columns,
    Float8,
    Rows,
    Scheme,
    bf16_numbers,
    dense,
    product,
    quantise_or_nan,
    weight_product,
)
from erniekit.ops.gradients import wanted
from erniekit.ops.mlp import weighted_gated, weighted_gated_backward
from erniekit.precision.watch import Role, Watch, unrounded

_SCALE = 4  # bytes of a scale
_TOLD: dict[Role, str] = {"x": "the input of", "w": "the weight of", "g": "the gradient of the output of"}


class _Common:
    """What all modules of a model share: the rows that were cast last. Gate and up get the same ones, and one cast
    serves both."""

    def __init__(self) -> None:
        self._of: weakref.ref | None = None
        self._cast: Float8 | None = None

    def cast_of(self, x: paddle.Tensor) -> Float8 | None:
        """The cast of x, if that was the last."""
        return self._cast if self._of is not None and self._of() is x else None

    def keep(self, x: paddle.Tensor, cast: Float8) -> None:
        """This was the last."""
        self._of, self._cast = weakref.ref(x), cast


class Call(NamedTuple):
    """How a module is called."""

    counts: list[int]  # rows of every expert; of a linear layer, all of them
    training: bool  # whether gradients will be wanted


class Module:
    """A weight that is multiplied in FP8, or a stack of them: its casts and its products."""

    def __init__(self, name: str, watch: Watch, common: _Common, *, keep: bool) -> None:
        self.name, self.watch, self.common, self._keep = name, watch, common, keep
        self._codes: Float8 | None = None

    def cast(self, x: paddle.Tensor, scheme: Scheme, role: Role, *, counts: list[int] | None = None) -> Float8:
        """x in FP8; all of it NaN, with a warning, if x is not finite."""
        short, name = isinstance(scheme, Columns), f"{_TOLD[role]} {self.name}"
        made = quantise_or_nan(x, scheme, tell=self.watch.lost, counts=counts, short=short, name=name)
        if self.watch.looking and not short:
            self.watch.saw(self.name, role, given=x, cast=made)
        return made

    def weight(self, weight: paddle.Tensor, *, training: bool) -> Float8:
        """The codes of the weight."""
        if training and self._codes is not None:
            return self._codes
        made = self.cast(weight.detach(), Blocks(), "w")
        if training and self._keep:
            self._codes = made
        return made

    def forget(self) -> None:
        """The weight has changed."""
        self._codes = None

    def forward(self, x: paddle.Tensor, cast: Float8, weight: paddle.Tensor, call: Call) -> paddle.Tensor:
        """x @ weight of the rows `x` whose cast is made: [T, F], like x in dtype."""
        y = product(cast, self.weight(weight, training=call.training), counts=call.counts).astype(x.dtype)
        if self.watch.comparing:
            self.watch.compared(self.name, y, exact=unrounded(x, weight, call.counts))
        return y

    def backward(self, grad: paddle.Tensor, weight: paddle.Tensor, *, counts: list[int]) -> paddle.Tensor:
        """grad @ weight^T: [T, D]."""
        cast = self.cast(grad, Rows(), "g")
        return product(cast, self.weight(weight, training=True), turned=True, counts=counts).astype(grad.dtype)

    def weight_gradient(
        self, x: paddle.Tensor, grad: paddle.Tensor, weight: paddle.Tensor, *, counts: list[int]
    ) -> paddle.Tensor:  # fmt: skip
        """x^T @ grad, both cast along the tokens: like the weight."""
        rows, grads = self.cast(x, Columns(), "x", counts=counts), self.cast(grad, Columns(), "g", counts=counts)
        made = weight_product(rows, grads, counts=counts)
        return made.reshape(weight.shape).astype(weight.dtype)


# ---------------------------------------------------------------------- a linear layer, or one product of the experts
class _Product(paddle.autograd.PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x_TD: paddle.Tensor, weight: paddle.Tensor, module: Module, cast: Float8, call: Call
    ) -> paddle.Tensor:  # fmt: skip
        ctx.module, ctx.counts, ctx.wanted = module, call.counts, wanted(x_TD, weight)
        ctx.save_for_backward(weight, *([cast.codes, cast.scales] if ctx.wanted[1] else []))
        return module.forward(x_TD, cast, weight, call)

    @staticmethod
    def backward(ctx: Any, grad_TF: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        weight, *saved = ctx.saved_tensor()
        module, counts, grad_TD, grad_weight = ctx.module, ctx.counts, None, None
        if ctx.wanted[0]:
            grad_TD = module.backward(grad_TF, weight, counts=counts)
        if saved:
            grad_weight = module.weight_gradient(_rows(*saved), grad_TF, weight, counts=counts)
        return grad_TD, grad_weight


def _rows(codes: paddle.Tensor, scales: paddle.Tensor) -> paddle.Tensor:
    return dense(Float8(codes, scales, Rows(), E4M3, [codes.shape[0]]))


def _linear_product(module: Module) -> Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]:
    def multiply(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        rows_TD, cast = x.reshape([-1, x.shape[-1]]), module.common.cast_of(x)
        if cast is None or module.watch.looking:
            cast = module.cast(rows_TD.detach(), Rows(), "x")
            module.common.keep(x, cast)
        y_TF = _Product.apply(rows_TD, weight, module, cast, Call([rows_TD.shape[0]], paddle.is_grad_enabled()))
        return y_TF.reshape([*x.shape[:-1], y_TF.shape[-1]])

    return multiply


def _expert_product(module: Module) -> ExpertProduct:
    def multiply(x_TD: paddle.Tensor, weight_EDF: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        cast = module.cast(x_TD.detach(), Rows(), "x")
        return _Product.apply(x_TD, weight_EDF, module, cast, Call(counts, paddle.is_grad_enabled()))

    return multiply


# ---------------------------------------------------------------------- the experts in one piece
class _Experts(paddle.autograd.PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x_TD: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor, weights_T: paddle.Tensor | None,
        modules: tuple[Module, Module], call: Call,
    ) -> paddle.Tensor:  # fmt: skip
        ctx.wanted = wanted(x_TD, gate_up, down, weights_T)
        ctx.modules, ctx.counts, ctx.weighed = modules, call.counts, weights_T is not None
        first, second = modules
        x = first.cast(x_TD, Rows(), "x")
        o1_T2I = first.forward(x_TD, x, gate_up, call)
        o2_TI = weighted_gated(o1_T2I, weights_T)
        y_TD = second.forward(o2_TI.astype(x_TD.dtype), second.cast(o2_TI, Rows(), "x"), down, call)
        ctx.save_for_backward(x.codes, x.scales, o1_T2I, gate_up, down, *([weights_T] if ctx.weighed else []))
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        codes, scales, o1_T2I, gate_up, down, *weights = ctx.saved_tensor()
        (first, second), counts, weights_T = ctx.modules, ctx.counts, weights[0] if weights else None
        grad_o2_TI = second.backward(grad_TD, down, counts=counts)
        o2_TI, grad_o1_T2I, grad_T = weighted_gated_backward(o1_T2I, weights_T, grad_o2_TI)
        o2_TI, grad_o1_T2I = bf16_numbers(o2_TI), bf16_numbers(grad_o1_T2I)
        grad_x = grad_gate_up = grad_down = None
        if ctx.wanted[2]:
            grad_down = second.weight_gradient(o2_TI, grad_TD, down, counts=counts)
        if ctx.wanted[0]:
            grad_x = first.backward(grad_o1_T2I, gate_up, counts=counts).astype(grad_TD.dtype)
        if ctx.wanted[1]:
            grad_gate_up = first.weight_gradient(_rows(codes, scales), grad_o1_T2I, gate_up, counts=counts)
        grads = (grad_x, grad_gate_up, grad_down)
        return (*grads, grad_T if ctx.wanted[3] else None) if ctx.weighed else grads


def _expert_mlp(modules: tuple[Module, Module]) -> ExpertMLP:
    def compute(
        x_TD: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor, counts: list[int],
        weights_T: paddle.Tensor | None,
    ) -> paddle.Tensor:  # fmt: skip
        return _Experts.apply(x_TD, gate_up, down, weights_T, modules, Call(counts, paddle.is_grad_enabled()))

    return compute


class _Wire:
    """Rows as bytes: the codes of a row, then its scales: 1 + 4 / 128 bytes for a number.

    What arrives is cast once more, which is exact: numbers that came out of a cast fit the scale that they get, be it
    the same or half of it. So results are those of rows that travel in full.
    """

    def __init__(self, module: Module) -> None:
        self._module = module

    def encode(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """See Wire."""
        made, groups = self._module.cast(x_TD, Rows(), "x"), x_TD.shape[1] // BLOCK
        if not x_TD.size:
            return paddle.zeros([0, x_TD.shape[1] + _SCALE * groups], "uint8")
        return paddle.concat([made.codes, made.scales.contiguous().clone().view("uint8")], axis=1)

    def decode(self, bytes_TB: paddle.Tensor) -> paddle.Tensor:
        """See Wire."""
        width = bytes_TB.shape[1] // (BLOCK + _SCALE) * BLOCK
        if not bytes_TB.size:
            return paddle.zeros([0, width])
        codes_TD, scales_TB = (part.contiguous().clone() for part in (bytes_TB[:, :width], bytes_TB[:, width:]))
        return _rows(codes_TD, scales_TB.view("float32"))


# ---------------------------------------------------------------------- a model
class BlockwiseTraining:
    """The FP8 modules of a model: their copies of weights, and what is seen of their casts (`watch`)."""

    def __init__(self, modules: list[Module], watch: Watch) -> None:
        self.modules, self.watch = modules, watch

    def after_update(self) -> None:
        """A step was taken: the weights are others."""
        self.forget_weights()

    def forget_weights(self) -> None:
        """Weights were replaced."""
        for module in self.modules:
            module.forget()


def use_blockwise(model: nn.Layer, settings: Fp8, *, keep: bool = True) -> BlockwiseTraining:
    """Let the modules that `settings` cover compute in FP8. `model` holds its rank's part already; `keep` says whether
    copies of weights may be kept for a step."""
    layers = {name: layer for name, layer in model.named_sublayers() if settings.covers(name)}
    stacks = [name for name, layer in layers.items() if isinstance(layer, Experts)]
    linears = [name for name, layer in layers.items() if isinstance(layer, Linear)]
    names = [*linears, *(f"{name}.{weight}" for name in stacks for weight in ("gate_up_proj", "down_proj"))]
    watch, common = Watch(names), _Common()
    modules = {name: Module(name, watch, common, keep=keep) for name in names}
    for name in linears:
        layers[name].product = _linear_product(modules[name])
    for name in stacks:
        experts, pair = layers[name], (modules[f"{name}.gate_up_proj"], modules[f"{name}.down_proj"])
        experts.mlp, experts.weighs_rows = _expert_mlp(pair), True
        experts.wire = _Wire(pair[0]) if experts.gate_up_adapter is None else None  # adapters read rows as they are
        experts.gate_up_product, experts.down_product = map(_expert_product, pair)
    return BlockwiseTraining(list(modules.values()), watch)

"""Quantisation-aware training in FP8: the forward pass computes what an FP8 model with fixed scales will compute.

    x~ = x H, Q_x = E4M3(x~ / s_x)        H: block-diagonal Hadamard of 32 (ops/hadamard.py), H H^T = 32 I
    w~ = H w, Q_w = E4M3(w~ / s_w)        one scale for a tensor: s = largest / 448 + 1e-8
    y = (Q_x Q_w) s_x s_w / 32            without rounding that is x w

Backward, rounding counts as the identity (straight through; ops/straight_through.py). The gradient of y
may be rounded, too.

Weights. They are the model's own, in its dtype; the optimizer moves them (or their fp32 masters). Codes are made from
them when they are first used and kept until the weights change. Matrices that the official toolkit holds as one (q, k
and v; gate and up) share a scale, so that its folders can hold them; of routed experts every one has its own.

Inputs. A deployed model does not look at its inputs before it rounds them: their scales are constants, which training
finds. For the first `online_steps` steps an input is rounded by its own largest number, while a running mean a of the
scales is kept; afterwards by a moving average that goes on from it. In evaluation a rounds, or, where an input was
never seen in training, its own largest number. An average moves by 1 % of a difference, which bf16 would lose: a is
fp32.

A step counts once. Micro-batches, layers computed again and repeated calls leave the largest scale of the step behind;
`after_update` folds it into a. Within a step nothing moves, so a layer computed again gives the same numbers. Every
rank comes to the same scales: those of weights agree over ranks that share a matrix, those of inputs over all. Where
one of them meets NaN or infinity it says so, the scale is NaN for all, and so is what comes of it: a step with such a
loss or gradient is not taken, by any rank (training/loop.py).

Knows layers and what they hold; neither ranks (it is handed `Ranks`), nor files, nor the run's config.
Shapes: T rows sorted by expert, D inputs, F outputs, E experts held (1: a linear layer), N all experts there are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import paddle
from paddle import nn

from erniekit.base.console import notice
from erniekit.config.fp8 import Fp8, Qat
from erniekit.models.layers import Linear
from erniekit.models.moe import ExpertProduct, Experts
from erniekit.ops.arrays.float8 import ADDED
from erniekit.ops.float8 import E4M3, E5M2, Float8, Tensor, quantise_or_nan
from erniekit.ops.hadamard import SIZE, rotate, rotate_inputs
from erniekit.ops.straight_through import Backward, rounded_rows, scale_of, straight_through
from erniekit.precision.watch import Watch, unrounded

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "up_gate_proj", "up_proj": "up_gate_proj"
}  # fmt: skip
_STACKS = {"gate_up_proj": "gate_up_product", "down_proj": "down_product"}  # weights of Experts, and their slots
Greatest = Callable[[paddle.Tensor], paddle.Tensor]


@dataclass(frozen=True)
class Ranks:
    """Who has to come to the same scales. With one rank, nobody has to ask."""

    everywhere: Greatest = lambda found: found  # over all that train; they take their steps together
    beside: Greatest = lambda found: found  # over those that share matrices; they evaluate together, too
    first_expert: int = 0  # of those held here, among all
    num_experts: int | None = None  # that there are; None: all are held here


def shared_name(module: str) -> str:
    """The name under which a linear layer's scales are kept: of several that share them, one."""
    path, _, own = module.rpartition(".")
    return f"{path}.{_FUSED.get(own, own)}"


class InputScale:
    """The scales of one input, or of one for each of `num` experts."""

    def __init__(self, num: int, qat: Qat, ranks: Ranks, *, experts: slice) -> None:
        self.scales_N = paddle.zeros([num])
        self.steps_N = paddle.zeros([num], "int64")  # in which there was such an input
        self._seen_N = paddle.zeros([num])  # the largest of the step under way
        self._qat, self._ranks, self._held = qat, ranks, experts

    def of(self, amax_E: paddle.Tensor, *, training: bool) -> paddle.Tensor:
        """The scales by which inputs with these largest numbers are rounded; NaN if one is not finite on any rank."""
        found_E = _nan_is_infinity(amax_E)
        found_N = paddle.zeros_like(self.scales_N)
        found_N[self._held] = paddle.where(found_E > 0, scale_of(found_E, E4M3), found_E)
        found_N = (self._ranks.everywhere if training else self._ranks.beside)(found_N)
        if training:
            self._seen_N = paddle.maximum(self._seen_N, found_N)
            chosen_N = paddle.where(self.steps_N < self._qat.online_steps, found_N, self._moved(found_N))
        else:
            chosen_N = paddle.where(self.scales_N > 0, self.scales_N, found_N)
        chosen_N = paddle.where(paddle.isinf(found_N), paddle.full_like(found_N, float("nan")), chosen_N)
        return chosen_N[self._held].clip(min=ADDED)

    def _moved(self, found_N: paddle.Tensor) -> paddle.Tensor:
        """The moving average one step on; an input that is met for the first time begins it."""
        rate = self._qat.moving_rate
        moved_N = (1.0 - rate) * self.scales_N + rate * found_N
        return paddle.where(self.scales_N > 0, moved_N, found_N)

    def fold(self) -> None:
        """The step is over: its largest scale goes into the average."""
        steps_N, seen_N = self.steps_N.astype("float32"), self._seen_N
        mean_N = (steps_N * self.scales_N + seen_N) / (steps_N + 1.0)
        moved_N = paddle.where(self.steps_N < self._qat.online_steps, mean_N, self._moved(seen_N))
        met_N = seen_N > 0
        self.scales_N = paddle.where(met_N, moved_N, self.scales_N)
        self.steps_N = self.steps_N + met_N.astype("int64")
        self._seen_N = paddle.zeros_like(seen_N)

    def load(self, scales: np.ndarray, steps: np.ndarray) -> None:
        """Take over what another run of the same model had."""
        self.scales_N, self.steps_N = paddle.to_tensor(scales), paddle.to_tensor(steps)


class SharedScales:
    """Weights that share a scale, and the scale of their common input."""

    def __init__(self, qat: Qat, ranks: Ranks, watch: Watch, *, num: int, experts: slice) -> None:
        self.input = InputScale(num, qat, ranks, experts=experts)
        self._qat, self._ranks, self._watch, self.held, self._num = qat, ranks, watch, experts, num
        self._members: list[tuple[str, nn.Layer, str]] = []
        self._scale_E: paddle.Tensor | None = None
        self._codes: dict[int, Float8] = {}
        self._last: tuple[weakref.ref, bool, Float8] | None = None

    def add(self, module: str, layer: nn.Layer, weight: str) -> int:
        """Take in a module, its layer and the name of the weight there; returns its number."""
        self._members.append((module, layer, weight))
        return len(self._members) - 1

    def forget(self) -> None:
        """The weights have changed."""
        self._scale_E, self._codes, self._last = None, {}, None

    @paddle.no_grad()
    def weight(self, number: int) -> Float8:
        """The rounded weight, rotated; its scale has the 32 of the rotations in it."""
        if number not in self._codes:
            scale_E = self._weight_scale()
            module, rotated = self._members[number][0], self._turned(number)
            name = f"the weight of {module}"
            codes = quantise_or_nan(rotated, Tensor(), tell=self._watch.lost, scale=scale_E, name=name)
            if self._watch.looking:
                self._watch.saw(module, "w", given=rotated, cast=codes)
            share = 1.0 / SIZE if self._qat.rotate else 1.0
            self._codes[number] = replace(codes, scales=codes.scales * share)
        return self._codes[number]

    def _turned(self, number: int) -> paddle.Tensor:
        _, layer, name = self._members[number]
        weight = getattr(layer, name).detach()
        return rotate_inputs(weight) if self._qat.rotate else weight

    def _weight_scale(self) -> paddle.Tensor:
        """Of all members together, and of all ranks that hold parts of them."""
        if self._scale_E is None:
            largest = [self._turned(number).abs().astype("float32") for number in range(len(self._members))]
            each = [one.amax([1, 2]) if one.ndim == 3 else one.max().reshape([1]) for one in largest]
            found_N = paddle.zeros([self._num])
            found_N[self.held] = _nan_is_infinity(paddle.stack(each).max(0))
            self._scale_E = scale_of(self._ranks.beside(found_N)[self.held], E4M3)
        return self._scale_E

    @paddle.no_grad()
    def rounded_input(self, number: int, x: paddle.Tensor, counts: list[int], *, training: bool) -> Float8:
        """The rows of x [..., D] in FP8, rotated, with a scale for every expert, rows or none. Members that get the
        same x share the work."""
        if self._last and self._last[0]() is x and self._last[1] == training and not self._watch.looking:
            return self._last[2]
        module = self._members[number][0]
        rows_TD = x.detach().reshape([-1, x.shape[-1]])
        rotated_TD = rotate(rows_TD) if self._qat.rotate else rows_TD
        scale_E, name = self.input.of(_largest(rotated_TD, counts), training=training), f"the input of {module}"
        made = rounded_rows(rotated_TD, scale_E, counts, name=name, lost=self._watch.lost)
        if self._watch.looking:
            there = paddle.to_tensor([expert for expert, count in enumerate(counts) if count], "int64")
            scales = scale_E.gather(there).unsqueeze(-1)  # experts without rows have no block
            self._watch.saw(module, "x", given=rotated_TD, cast=replace(made, scales=scales))
        if len(self._members) > 1:
            self._last = (weakref.ref(x), training, made)
        return made

    def product(
        self, number: int, x: paddle.Tensor, weight: paddle.Tensor, counts: list[int], *, backward: Backward
    ) -> paddle.Tensor:  # fmt: skip
        """x [..., D] times the weight: [..., F]."""
        module, layer, _ = self._members[number]
        codes = self.rounded_input(number, x, counts, training=layer.training)
        rows_TD = x.reshape([-1, x.shape[-1]])
        y_TF = straight_through(rows_TD, weight, codes, self.weight(number), backward=backward)
        if self._watch.comparing:
            self._watch.compared(module, y_TF, exact=unrounded(rows_TD, weight, counts))
        return y_TF.reshape([*x.shape[:-1], y_TF.shape[-1]])


def _nan_is_infinity(x: paddle.Tensor) -> paddle.Tensor:
    """Ranks look for the largest number among them, which NaN is not everywhere."""
    return paddle.where(paddle.isfinite(x), x, paddle.full_like(x, float("inf")))


def _largest(rows_TD: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """The largest number among the rows of every expert; 0 where there are none."""
    parts = zip(rows_TD.split(counts) if len(counts) > 1 else [rows_TD], counts, strict=True)
    found = [part.abs().max().astype("float32") if count else paddle.zeros([]) for part, count in parts]
    return paddle.stack(found)


class QatTraining:
    """The scales of a model's modules by name: what a run carries from step to step (training/state.py)."""

    def __init__(self, groups: Mapping[str, SharedScales], watch: Watch, *, forget: bool) -> None:
        """`forget`: what earlier lives of the run found out is not taken over."""
        self.groups, self.watch, self._forget = groups, watch, forget

    def after_update(self) -> None:
        """A step was taken: its scales count, and the weights are others."""
        for group in self.groups.values():
            group.input.fold()
            group.forget()

    def forget_weights(self) -> None:
        """Weights were replaced."""
        for group in self.groups.values():
            group.forget()

    def state(self) -> dict[str, paddle.Tensor]:
        """See Memory; the same on all ranks. A slash: these are no states of parameters, though named like some."""
        scales = {f"activation_scale/{name}": group.input.scales_N for name, group in self.groups.items()}
        return scales | {f"activation_steps/{name}": group.input.steps_N for name, group in self.groups.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """See Memory."""
        if self._forget:
            notice("fp8_force_clear_state: the scales of inputs are forgotten, and found anew.")
            return
        for name, group in self.groups.items():
            if (key := f"activation_scale/{name}") in state:  # modules may have been added with fp8_modules
                group.input.load(state[key], state[f"activation_steps/{name}"])


def use_qat(model: nn.Layer, settings: Fp8, *, ranks: Ranks = Ranks()) -> QatTraining:
    """Let the modules that `settings` cover compute in FP8. `model` holds its rank's part already."""
    qat = settings.qat
    assert qat is not None, "the settings of another recipe"
    layers = {name: layer for name, layer in model.named_sublayers() if settings.covers(name)}
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, Linear)}
    stacks = {
        f"{name}.{weight}": layer for name, layer in layers.items() if isinstance(layer, Experts) for weight in _STACKS
    }
    watch, groups = Watch([*linears, *stacks]), dict[str, SharedScales]()
    for name, layer in linears.items():
        group = groups.setdefault(
            shared_name(name), SharedScales(qat, ranks, watch, num=1, experts=slice(0, 1))
        )  # fmt: skip
        layer.product = _linear_product(group, group.add(name, layer, "weight"), _backward(name, qat, ranks, watch))
    for name, experts in stacks.items():
        held = slice(ranks.first_expert, ranks.first_expert + experts.num_experts)
        weight, num = name.rpartition(".")[2], ranks.num_experts or experts.num_experts
        group = groups[name] = SharedScales(qat, ranks, watch, num=num, experts=held)
        number, backward = group.add(name, experts, weight), _backward(name, qat, ranks, watch)
        setattr(experts, _STACKS[weight], _expert_product(group, number, backward))
    return QatTraining(groups, watch, forget=qat.forget)


def _backward(name: str, qat: Qat, ranks: Ranks, watch: Watch) -> Backward:
    def saw(grad_TF: paddle.Tensor, cast: Float8) -> None:
        if watch.looking:
            watch.saw(name, "g", given=grad_TF, cast=cast)

    return Backward(
        rotated=qat.rotate, rounds_for_inputs=qat.quant_input_grad, rounds_for_weights=qat.quant_weight_grad,
        kind=E5M2 if qat.gradients == "e5m2" else E4M3, everywhere=ranks.everywhere, saw=saw, lost=watch.lost,
        name=name,
    )  # fmt: skip


def _linear_product(
    group: SharedScales, number: int, backward: Backward
) -> Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]:  # fmt: skip
    return lambda x, weight: group.product(number, x, weight, [x.size // x.shape[-1]], backward=backward)


def _expert_product(group: SharedScales, number: int, backward: Backward) -> ExpertProduct:
    return lambda x_TD, weight_EDF, counts: group.product(number, x_TD, weight_EDF, counts, backward=backward)

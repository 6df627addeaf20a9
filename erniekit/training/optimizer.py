"""AdamW or Muon over a model's trainable parameters with global-norm clipping, and averages of the weights.

State is named by the model's own parameter names, so that a checkpoint does not depend on Paddle's counters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.base.errors import CheckpointError, listed
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.ops.adamw import Update, adamw
from erniekit.ops.muon import muon
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.zero import GradientSync
from erniekit.training.averages import Averages
from erniekit.training.clipping import AdaptiveClip
from erniekit.training.offload import to_device, to_host
from erniekit.training.selection import EMBEDDING, HEAD, ROUTERS

_NO_MATRICES = rf"{EMBEDDING}|{HEAD}|{ROUTERS}|e_score_correction_bias$"


@dataclass(frozen=True)
class AdamWSettings:
    """The constants of AdamW (arXiv 1711.05101) and of clipping; `max_grad_norm` 0 switches clipping off."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Piece:
    """What a rank holds of one tensor of the state: the numbers [start, stop) of the rank's own block of a parameter,
    the block taken as flat. With one rank, the block is the parameter and a piece is all of it."""

    name: str  # of the parameter
    part: str  # moment1, moment2, momentum, master, ema
    tensor: paddle.Tensor  # of any shape, stop - start numbers
    start: int
    stop: int
    first: bool  # whether this rank is the first of those that hold these numbers, so that each is written once


def decays(name: str) -> bool:
    """Whether weight decay applies: not to norms and biases."""
    return not (name.endswith("bias") or "norm" in name)


class Optimizer:
    """AdamW with decoupled decay over the parameters that have a gradient flag; Muon for those named in `matrices`.

    The states are ours (named, fp32 unless `moments` says bfloat16) and the arithmetic is a fused kernel (ops/adamw.py)
    or a few products (ops/muon.py). A parameter that is not fp32 has an fp32 master, which is what the update moves.
    With `offload`, moments and masters are in host memory but for those of the parameter that is being updated.
    On a mesh, gradients are summed over ranks and a rank updates its own ranges, of which it has the states
    (parallel/zero.py).
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, paddle.Tensor]], settings: AdamWSettings, *,
        rates: Mapping[str, float] | None = None, matrices: Mapping[str, int] | None = None, moments: str = "float32",
        ema_decay: float | None = None, ema_interval: int = 1, adaptive_clip: bool = False,
        sync: GradientSync | None = None, offload: bool = False,
    ) -> None:  # fmt: skip
        """`rates` are factors on the learning rate by name; `matrices` says how many stand side by side in a weight;
        `ema_decay` is what the moving average of the weights keeps at each update (None: there is no average); `sync`
        is about the same parameters (None: one rank)."""
        self.settings = settings
        self.parameters = {name: p for name, p in named_parameters if not p.stop_gradient}
        self.num_steps = 0
        self.sync = sync or GradientSync(self.parameters, Mesh.single())
        self._rates, self._matrices, self._moments = rates or {}, matrices or {}, moments
        self._offload = offload
        assert all(self.sync.is_whole(name) for name in self._matrices), "Muon needs whole matrices"
        self._states: dict[str, dict[str, paddle.Tensor]] = {}
        self._masters: dict[str, paddle.Tensor] = {}
        self._squares: dict[str, paddle.Tensor] = {}  # of the gradients that any rank has, once they are complete
        self._clip = AdaptiveClip() if adaptive_clip else None
        self._averages = None
        if ema_decay is not None:
            self._averages = Averages(self.sync, decay=ema_decay, interval=ema_interval)

    def expect(self, *, last: bool) -> None:
        """A backward pass comes; with `last`, it is the step's last one, and sums over ranks may start within it."""
        self.sync.expect(last=last)

    @paddle.no_grad()
    def gradient_norm(self) -> float:
        """The global 2-norm of the accumulated gradients of all ranks."""
        self.sync.finish()
        names = list(self.parameters)
        squares, present = self.sync.squares(names)
        there = np.flatnonzero(present.numpy())
        self._squares = {names[i]: squares[i : i + 1] for i in there.tolist()}
        # Not Tensor.norm: it adds 50 million squares up in one fp32 number, 13 % off, and takes 15 times as long.
        return math.sqrt(float(paddle.concat(list(self._squares.values())).sum())) if self._squares else 0.0

    @paddle.no_grad()
    def step(self, learning_rate: float, *, gradient_norm: float) -> None:
        """Clip by the global norm, update every parameter that has a gradient, clear the gradients."""
        if not self._squares:
            self.gradient_norm()
        self.num_steps += 1
        settings, limit = self.settings, self.settings.max_grad_norm
        scale = limit / (gradient_norm + 1e-6) if 0 < limit < gradient_norm else 1.0
        scales = {}
        if self._clip:
            norms = {name: math.sqrt(square.item()) for name, square in self._squares.items()}
            scales = self._clip.scales(norms, num_steps=self.num_steps, global_scale=scale)
        for name in self._squares:
            rate = learning_rate * self._rates.get(name, 1.0)
            own = scales.get(name, scale)
            update = Update(rate, settings.beta1, settings.beta2, settings.epsilon, self.num_steps, own)
            self._move(name, update)
        self.clear()
        self.sync.gather_weights()
        if self._averages:
            self._averages.update(self._masters, num_steps=self.num_steps)

    def _move(self, name: str, update: Update) -> None:
        """Update what this rank has of a parameter."""
        weight, gradient = self.sync.weight(name), self.sync.gradient(name)
        if not weight.size:
            return
        if gradient is None:
            gradient = paddle.zeros(weight.shape, "float32")  # other ranks have one, of other rows
        decay = self.settings.weight_decay if decays(name) else 0.0
        state, master = self._fetched(name, weight)
        if name in self._matrices:
            muon(
                weight, gradient, momentum=state["momentum"], master=master, update=update, weight_decay=decay,
                num_parts=self._matrices[name],
            )  # fmt: skip
        else:
            first, second, start = state["moment1"], state["moment2"], self.sync.own(name).start
            adamw(
                weight, gradient, first=first, second=second, master=master, update=update, weight_decay=decay,
                start=start,
            )  # fmt: skip
        self._put(name, state, master)

    def _fetched(self, name: str, weight: paddle.Tensor) -> tuple[dict[str, paddle.Tensor], paddle.Tensor | None]:
        """The moments and the master of a parameter, on the device of its `weight`."""
        if name not in self._states:
            master = weight.astype("float32") if weight.dtype != paddle.float32 else None
            return {part: paddle.zeros(weight.shape, self._moments) for part in self._parts(name)}, master
        state, master = self._states[name], self._masters.get(name)
        if not self._offload:
            return state, master
        state = {part: to_device(tensor, weight) for part, tensor in state.items()}
        return state, None if master is None else to_device(master, weight)

    def _put(self, name: str, state: dict[str, paddle.Tensor], master: paddle.Tensor | None) -> None:
        """Keep the moments and the master of a parameter where they belong."""
        self._states[name] = {part: to_host(tensor) for part, tensor in state.items()} if self._offload else state
        if master is not None:
            self._masters[name] = to_host(master) if self._offload else master

    def _parts(self, name: str) -> tuple[str, ...]:
        return ("momentum",) if name in self._matrices else ("moment1", "moment2")

    def clear(self) -> None:
        """Forget the gradients and free their memory."""
        self._squares = {}
        self.sync.clear()

    def gradients(self) -> list[Piece]:
        """The gradients as `gradient_norm` left them: summed over ranks, each rank what it updates."""
        made = {name: self.sync.gradient(name) for name in self._squares}
        return [self._piece(name, "gradient", tensor) for name, tensor in made.items() if tensor is not None]

    def averages(self) -> dict[str, paddle.Tensor] | None:
        """The moving averages of what this rank updates in fp32, not copied; None if the run keeps none."""
        return self._averages.tensors if self._averages else None

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model holds the moving averages in place of its trained weights. All ranks enter together."""
        assert self._averages, "averages() says whether there are any"
        return self._averages.applied()

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within, every parameter of the rank's part of the model is there, for whoever reads or replaces them; at
        sharding stage 3 they are not, otherwise. All ranks enter together."""
        return self.sync.whole_weights()

    def ranges(self) -> dict[str, tuple[paddle.Tensor, tuple[int, int]]]:
        """What this rank has of the weights that live as own ranges (sharding stage 3): the numbers, not copied, and
        which of the weight they are. Whoever saves a model needs no others."""
        return self.sync.ranges()

    def state(self) -> dict[str, paddle.Tensor]:
        """`<parameter>.moment1` and `.moment2` (or `.momentum`), `.master`, `.ema`, not copied, and `.norm` of adaptive
        clipping; `num_steps` belongs to it. Where states are shared, of the own ranges."""
        out = {f"{name}.master": master for name, master in self._masters.items()}
        for name, parts in self._states.items():
            out |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        norms = self._clip.norms if self._clip else {}
        out |= {f"{name}.norm": paddle.to_tensor([norm]) for name, norm in norms.items()}
        return out | {f"{name}.ema": average for name, average in (self.averages() or {}).items()}

    def pieces(self) -> list[Piece]:
        """`state` with places, as far as it is cut like the parameters: everything but `.norm`, which is the same on
        all ranks."""
        split = [(*key.rsplit(".", 1), tensor) for key, tensor in self.state().items()]
        return [self._piece(name, part, tensor) for name, part, tensor in split if part != "norm"]

    def _piece(self, name: str, part: str, tensor: paddle.Tensor) -> Piece:
        return Piece(name, part, tensor, *self.held(name), self.sync.is_first(name))

    def held(self, name: str) -> tuple[int, int]:
        """Which numbers of the rank's block of a parameter the state of this rank is about: [start, stop). That is
        what `load_state` wants; equal where it is nothing."""
        own = self.sync.own(name)
        return own.start, own.stop

    def load_state(self, state: Mapping[str, np.ndarray], *, num_steps: int, source: str) -> None:
        """Take over what `state` of an equal optimizer returned: of every parameter the numbers that are `held` here.

        Raises CheckpointError if a name is unknown or lacks a part.
        """
        names = {key.rsplit(".", 1)[0] for key in state}
        unknown = names - set(self.parameters)
        problems = [f"{source}: optimizer state of '{name}', which is not trained." for name in unknown]
        moved = {key.rsplit(".", 1)[0] for key in state if not key.endswith((".ema", ".norm"))}
        moved = {name for name in moved if name not in self.parameters or self.sync.weight(name).size}
        for name in moved & set(self.parameters):
            missing = [part for part in self._parts(name) if f"{name}.{part}" not in state]
            problems += [f"{source}: the optimizer state of '{name}' has no {part}." for part in missing]
        if problems:
            raise CheckpointError(listed(sorted(problems)))
        self.num_steps = num_steps
        for name in moved:
            shape = self.sync.weight(name).shape
            arrays = {part: np.asarray(state[f"{name}.{part}"], np.float32) for part in self._parts(name)}
            made = {part: paddle.to_tensor(array.reshape(shape)) for part, array in arrays.items()}
            made = {part: tensor.astype(self._moments) for part, tensor in made.items()}
            master = state.get(f"{name}.master")
            self._put(name, made, None if master is None else paddle.to_tensor(np.asarray(master).reshape(shape)))
        if self._averages:
            self._averages.load({key[: -len(".ema")]: array for key, array in state.items() if key.endswith(".ema")})
        if self._clip:
            self._clip.norms = {key[: -len(".norm")]: a[0] for key, a in state.items() if key.endswith(".norm")}


def matrices_inside(model: ErnieForCausalLM) -> dict[str, int]:
    """The weights that Muon moves, and how many matrices stand side by side in each.

    All of the layers' projections, routed experts included; not the embedding, the head, norms, biases and routers.
    """
    found = {name: p for name, p in model.named_parameters() if p.ndim > 1 and not re.search(_NO_MATRICES, name)}
    return {name: 2 if name.endswith("experts.gate_up_proj") else 1 for name in found}

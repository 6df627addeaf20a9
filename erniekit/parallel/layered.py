"""Weights that live as own ranges (stage 3): a decoder layer is whole only while it computes.

Before a layer's forward and before its backward its weights are gathered, afterwards they are freed; the next layer's
are on their way meanwhile. A parameter that is freed stays the same tensor, without memory: what autograd and PyLayers
keep of it is that tensor, so freeing it frees the memory, and gathering gives it back to them. (That is so for leaves
alone. Copies and casts of weights that an operation keeps for its backward would stay: ours keep none.)

Which weights these are, styles.py says; the embedding and the head stay whole as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.models.decoder import DecoderLayer
from erniekit.parallel.collectives import Handle
from erniekit.parallel.flat import Block, Flat, lay_flat
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.styles import comes_and_goes


class _Unit:
    """The weights of one layer. `own` has this rank's range of every flat."""

    def __init__(self, parameters: Mapping[str, paddle.Tensor], flats: list[Flat], mesh: Mesh) -> None:
        self.parameters, self.flats = parameters, flats
        self._axes = [mesh.axis(flat.kind.shard) for flat in flats]
        self._coming: list[Handle] | None = None
        self._open = True
        self.own = [paddle.zeros([flat.each], flat.kind.dtype) for flat in flats]
        self.keep()

    @paddle.no_grad()
    def keep(self) -> None:
        """Take the own ranges from the whole weights."""
        for flat, own, axis in zip(self.flats, self.own, self._axes, strict=True):
            for name in flat.sizes:
                held = flat.own(name, axis.index)
                if held.start < held.stop:
                    numbers = self.parameters[name].detach().reshape([-1])[held.start : held.stop]
                    own[held.place : held.place + held.stop - held.start] = numbers

    def fetch(self) -> None:
        """Let the weights come."""
        if not self._open and self._coming is None:
            self._coming = [axis.start_all_gather(own) for axis, own in zip(self._axes, self.own, strict=True)]

    @paddle.no_grad()
    def open(self) -> None:
        """Have the weights whole."""
        self.fetch()
        for flat, coming in zip(self.flats, self._coming or (), strict=self._coming is not None):
            whole = coming.wait()
            for name, start in flat.starts.items():
                p = self.parameters[name]
                whole[start : start + flat.sizes[name]].reshape(p.shape)._share_buffer_to(p)
        self._open, self._coming = True, None

    def close(self) -> None:
        """Free them, and what is on its way."""
        for coming in self._coming or ():
            coming.wait()
        self._coming = None
        if self._open:
            for flat in self.flats:
                for name in flat.sizes:
                    self.parameters[name]._clear_data()
        self._open = False


class LayerShards:
    """The decoder layers of a model, each whole while it computes."""

    def __init__(self, model: nn.Layer, mesh: Mesh, *, blocks: Mapping[str, Block] | None = None) -> None:
        """Takes what others hold from the layers' weights and their forward in hand."""
        parameters = dict(model.named_parameters())
        layers = {path: layer for path, layer in model.named_sublayers() if isinstance(layer, DecoderLayer)}
        cut = [name for name, p in parameters.items() if comes_and_goes(name, num_dims=p.ndim)]
        self.names = [[name for name in cut if name.startswith(f"{path}.")] for path in layers]
        self._units = list[_Unit]()
        self._pinned = False
        for names in self.names:
            inside = {name: parameters[name] for name in names}
            flats = lay_flat(inside, mesh.layout, blocks=blocks or {}, most=0, together=[names])
            self._units.append(_Unit(inside, [flat for flat in flats if flat.shards > 1], mesh))
        places = [(unit, i, flat) for unit in self._units for i, flat in enumerate(unit.flats)]
        self._own = {name: (unit, i) for unit, i, flat in places for name in flat.sizes}
        self._shard = {name: mesh.axis(unit.flats[i].kind.shard).index for name, (unit, i) in self._own.items()}
        for place, layer in enumerate(layers.values()):
            layer.forward = self._forward(layer.forward, place)  # type: ignore[method-assign]
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._own

    def own(self, name: str) -> paddle.Tensor:
        """The own range of a weight, to be updated in place."""
        unit, i = self._own[name]
        held = unit.flats[i].own(name, self._shard[name])
        return unit.own[i][held.place : held.place + held.stop - held.start]

    def ranges(self) -> dict[str, tuple[paddle.Tensor, tuple[int, int]]]:
        """The own range of every weight that is cut, and which numbers of the weight it is."""
        held = {name: unit.flats[i].own(name, self._shard[name]) for name, (unit, i) in self._own.items()}
        return {name: (self.own(name), (part.start, part.stop)) for name, part in held.items()}

    def close(self) -> None:
        """Free what is still whole after a step."""
        if not self._pinned:
            for unit in self._units:
                unit.close()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, all weights are whole, for whoever reads or replaces them; all ranks enter and leave together."""
        for unit in self._units:
            unit.open()
        self._pinned = True
        try:
            yield
        finally:
            self._pinned = False
            for unit in self._units:
                unit.keep()
            self.close()

    # ------------------------------------------------------------------ around a layer

    def enter(self, place: int, *, next_place: int) -> None:
        """Layer number `place` is about to compute, and then `next_place`."""
        self._units[place].open()
        if 0 <= next_place < len(self._units):
            self._units[next_place].fetch()

    def leave(self, place: int) -> None:
        """It has computed."""
        if not self._pinned:
            self._units[place].close()

    def _forward(self, plain: Any, place: int) -> Any:
        def forward(x_BSD: paddle.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.enter(place, next_place=place + 1)
            if paddle.is_grad_enabled() and not x_BSD.stop_gradient:
                # Comes last in the backward pass. The first layer over a frozen embedding has none: it is closed after
                # the step.
                x_BSD = _InBackward.apply(x_BSD, functools.partial(self.leave, place))
            y_BSD, routing = plain(x_BSD, *args, **kwargs)
            self.leave(place)
            if not y_BSD.stop_gradient:
                y_BSD = _InBackward.apply(y_BSD, functools.partial(self.enter, place, next_place=place - 1))
            return y_BSD, routing

        return forward


class _InBackward(PyLayer):
    """x; `work` is done when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, work: Callable[[], None]) -> paddle.Tensor:
        ctx.work = work
        return x.detach().view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        ctx.work()
        return grad

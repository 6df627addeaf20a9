"""Frozen weights in few bits as layers without parameters, for the `packed` slots of models/layers.py and moe.py.

A layer starts empty and is given its weights one by one, so that no dense copy of it ever exists. It leaves no trace in
the model's state: a checkpoint names the folder that the weights came from. Knows no file.
Shapes: D inputs, F outputs, T rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import paddle
from paddle import nn

from erniekit.config.packing import Kind, Packing
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.layers import Linear
from erniekit.models.moe import Experts
from erniekit.ops import weight_only
from erniekit.ops.packed import packed_product, unpack
from erniekit.precision.quantize import KERNEL_KINDS, Greatest, code_rows, pack, require_finite

_SLOTS = {"gate_up_proj": "gate_up_packed", "down_proj": "down_packed"}  # of Experts


class Store(Protocol):
    """Weights of one shape [D, F] in few bits; `shape` says how many as well. How they come in is each store's own:
    those of this file are given fp32 weights, those of stored.py codes."""

    shape: tuple[int, int, int]

    def dense(self, index: int) -> paddle.Tensor:
        """A weight [D, F] again, in the model's number format."""

    def product(self, x_TD: paddle.Tensor, counts: list[int], *, bf16: bool) -> paddle.Tensor:
        """Rows times their weights, `counts` rows for each; `bf16` as in ops/mlp.py."""


Rounding = Callable[[paddle.Tensor, list[int]], paddle.Tensor]  # of rows, `counts` for each weight


class Codes:
    """Codes and scales as ops/packed.py reads them."""

    def __init__(
        self, kind: Kind, shape: tuple[int, int, int], *, group_size: int | None, dtype: str,
        greatest: Greatest | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.greatest = shape, greatest
        count, self.num_in, num_out = shape
        self.kind, self.group_size, self.dtype = kind, group_size, dtype
        rows, groups = code_rows(kind, self.num_in), self.num_in // (group_size or self.num_in)
        self.codes = paddle.empty([count, rows, num_out], "int8" if kind == "int8" else "uint8")
        self.scales = paddle.empty([count, groups, num_out], "float32")

    def put(self, index: int, weight_DF: np.ndarray, *, name: str) -> None:
        """Take an fp32 weight. Raises CheckpointError with its `name` if it holds NaN or infinity."""
        codes, scales = pack(weight_DF, self.kind, self.group_size, name=name, greatest=self.greatest)
        put(self.codes[index], codes)
        put(self.scales[index], scales)

    def dense(self, index: int) -> paddle.Tensor:
        """See Store."""
        kind = KERNEL_KINDS[self.kind]
        return unpack(self.codes[index], self.scales[index], num_in=self.num_in, kind=kind).astype(self.dtype)

    def product(self, x_TD: paddle.Tensor, counts: list[int], *, bf16: bool) -> paddle.Tensor:
        """See Store."""
        kind = KERNEL_KINDS[self.kind]
        return packed_product(x_TD, self.codes, self.scales, counts=counts, kind=kind, bf16=bf16)


def put(place: paddle.Tensor, numbers: np.ndarray) -> None:
    """Copy numbers into a part of a tensor; an assignment would copy once more."""
    place.copy_(paddle.to_tensor(numbers), True)


class GPUCodes:
    """Codes and scales as Paddle's GPU kernels read them. Not run: see ops/weight_only.py."""

    def __init__(self, kind: Kind, shape: tuple[int, int, int], *, group_size: int | None, dtype: str) -> None:
        self.shape, self.kind, self.group_size, self.dtype = shape, kind, group_size, dtype
        self.weights: dict[int, weight_only.WeightOnly] = {}

    def put(self, index: int, weight_DF: np.ndarray, *, name: str) -> None:
        """Take an fp32 weight, as Codes."""
        require_finite(weight_DF, name=name)
        weight = paddle.to_tensor(weight_DF).astype(self.dtype)
        self.weights[index] = weight_only.quantized(weight, self.kind, group_size=self.group_size)

    def dense(self, index: int) -> paddle.Tensor:
        """See Store."""
        return self.weights[index].dense()

    def product(self, x_TD: paddle.Tensor, counts: list[int], *, bf16: bool) -> paddle.Tensor:  # noqa: ARG002 - for CPUs
        """See Store."""
        weights = [self.weights[index] for index in range(self.shape[0])]
        return weight_only.weight_only_product(x_TD, weights, counts=counts)


def store_for(
    kind: Kind, shape: tuple[int, int, int], *, group_size: int | None, dtype: str, greatest: Greatest | None = None
) -> Codes | GPUCodes:
    """An empty store for fp32 weights, which it quantises."""
    on_gpu = paddle.device.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")
    own_scales = greatest is None or group_size is not None  # Paddle's kernels make theirs from what they see
    if on_gpu and dtype != "float32" and own_scales and weight_only.serves(kind, *shape[1:], group_size):
        return GPUCodes(kind, shape, group_size=group_size, dtype=dtype)
    return Codes(kind, shape, group_size=group_size, dtype=dtype, greatest=greatest)


class PackedExperts(nn.Layer):
    """The stacked weights of experts."""

    bf16_products = False  # precision/products.py

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.shape = store.shape
        self.store = store
        self.rounding: Rounding | None = None  # of the inputs

    def forward(self, x_TD: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """Rows sorted by expert times their expert's weight: [T, F]."""
        if self.rounding is not None:
            x_TD = self.rounding(x_TD, counts)
        return self.store.product(x_TD, counts, bf16=self.bf16_products)

    def dense(self, expert: int) -> paddle.Tensor:
        """The weight [D, F] of one expert."""
        return self.store.dense(expert)


class PackedLinear(nn.Layer):
    """The weight of a linear layer."""

    bf16_products = False  # precision/products.py

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.shape = store.shape[1:]
        self.store = store
        self.rounding: Rounding | None = None  # of the inputs

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """x @ weight: [..., D] -> [..., F]."""
        rows_TD = x.reshape([-1, x.shape[-1]])
        if self.rounding is not None:
            rows_TD = self.rounding(rows_TD, [rows_TD.shape[0]])
        y_TF = self.store.product(rows_TD, [rows_TD.shape[0]], bf16=self.bf16_products)
        return y_TF.reshape([*x.shape[:-1], y_TF.shape[-1]])

    def dense(self) -> paddle.Tensor:
        """The weight [D, F]."""
        return self.store.dense(0)


def use_packed_weights(
    model: ErnieForCausalLM, packing: Packing, *, dtype: str,
    greatest: Callable[[str], Greatest | None] = lambda _module: None,
) -> None:  # fmt: skip
    """Give every module that `packing` names empty packed weights in place of its parameter. Of a module that has some
    of its inputs only, `greatest` says how to look at all of them (quantize.py).

    Raises ConfigError where the group size does not fit.
    """
    packing.check({name: tuple(weight.shape) for name, weight in _weights(model).items()})

    def store(name: str, shape: tuple[int, int, int]) -> Store | None:
        kind = packing.kind_of(name)
        if kind is None:
            return None
        return store_for(kind, shape, group_size=packing.group_size, dtype=dtype, greatest=greatest(name))

    use_stores(model, store)


def use_stores(model: ErnieForCausalLM, store: Callable[[str, tuple[int, int, int]], Store | None]) -> None:
    """Put what `store` makes for a module's name and the shape of its weights in place of its parameter; None leaves
    it."""
    modules = dict(model.named_sublayers())
    for name, weight in _weights(model).items():
        count, num_in, num_out = weight.shape if name not in modules else (1, *weight.shape)
        made = store(name, (count, num_in, num_out))
        if made is None:
            continue
        if name in modules:
            modules[name].weight, modules[name].packed = None, PackedLinear(made)
        else:
            path, _, part = name.rpartition(".")
            setattr(modules[path], part, None)
            setattr(modules[path], _SLOTS[part], PackedExperts(made))


def _weights(model: ErnieForCausalLM) -> dict[str, paddle.Tensor]:
    """The parameters that may be kept in few bits, by the names of their modules; stacks under names of their own."""
    found: dict[str, paddle.Tensor] = {}
    for name, layer in model.named_sublayers():
        if isinstance(layer, Linear):
            found[name] = layer.weight
        elif isinstance(layer, Experts):
            found |= {f"{name}.{part}": getattr(layer, part) for part in _SLOTS}
    return found


def packed_weights(model: ErnieForCausalLM) -> dict[str, PackedLinear | PackedExperts]:
    """The packed weights of a model by the names of the parameters whose place they take."""
    found: dict[str, PackedLinear | PackedExperts] = {}
    for name, layer in model.named_sublayers():
        if isinstance(layer, Linear) and layer.packed is not None:
            found[f"{name}.weight"] = layer.packed
        elif isinstance(layer, Experts):
            slots = {part: getattr(layer, slot) for part, slot in _SLOTS.items()}
            found |= {f"{name}.{part}": packed for part, packed in slots.items() if packed is not None}
    return found

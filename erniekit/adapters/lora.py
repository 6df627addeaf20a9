"""Adapters on a model: put into its slots, drawn, switched off and on, and their parameters by name.

The base is frozen; its parameters keep their names. Those of adapters are `<module>.adapter.lora_A` [in, rank] and
`.lora_B` [rank, out] (with DoRA `.magnitude` [out]), for routed experts `<experts>.gate_up_adapter.lora_A` [experts,
in, rank] and so on; PiSSA adds `initial_A` and `initial_B`, which never change. Knows no file and no optimizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import paddle
from paddle import nn

from erniekit.adapters.layers import Adapter, DoraAdapter, ExpertsAdapter, LinearAdapter, dense_weight
from erniekit.adapters.targets import slot
from erniekit.base.errors import ConfigError
from erniekit.config.adapter import AdapterConfig
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.models.layers import Linear
from erniekit.models.moe import Experts

_KEY = "adapters"  # the model's sublayer that remembers what was added


class _Added(nn.Layer):
    """What the adapters of a model are, and the base's weights of the modules that are trained whole."""

    def __init__(self, config: AdapterConfig, base: dict[str, paddle.Tensor]) -> None:
        super().__init__()
        self.config, self.base = config, base


class Parts(Protocol):
    """How parameters lie where a model holds a part of itself (parallel/whole.py); arrays may be of all routed experts
    or of those held here."""

    def shape(self, name: str, held: list[int]) -> list[int]:
        """The shape of the whole parameter of which one of shape `held` is held."""

    def part(self, name: str, array: np.ndarray) -> np.ndarray:
        """What is held of a whole array."""

    def gathered(self, name: str, array: np.ndarray) -> np.ndarray:
        """The whole of what is held."""

    def adder(self, module: str) -> Callable[[paddle.Tensor], paddle.Tensor] | None:
        """What adds up sums over the inputs of a linear layer; None: all are held."""


class _Everything:
    """The parts of a model that is whole."""

    def shape(self, name: str, held: list[int]) -> list[int]:  # noqa: ARG002
        return held

    def part(self, name: str, array: np.ndarray) -> np.ndarray:  # noqa: ARG002
        return array

    def gathered(self, name: str, array: np.ndarray) -> np.ndarray:  # noqa: ARG002
        return array

    def adder(self, module: str) -> None:  # noqa: ARG002
        return None


def add_adapters(
    model: ErnieForCausalLM, config: AdapterConfig, *, seed: int, draw: bool = True, parts: Parts | None = None
) -> None:
    """Freeze the model and put adapters on `config.targets`, drawn from `seed` and each parameter's name; thaw
    `config.modules_to_save`. `draw=False` leaves A and B at zero: they will be loaded. Of a model that holds a part of
    itself, `parts` says which: what is drawn is drawn whole.
    """
    parts = parts or _Everything()
    assert adapter_config_of(model) is None, "the model has adapters"
    for p in model.parameters():
        p.stop_gradient = True
    dtype = "bfloat16" if model.model.embed_tokens.weight.dtype == paddle.bfloat16 else "float32"
    modules = dict(model.named_sublayers())
    for target in config.targets:
        path = slot(target)
        owner, _, name = path.rpartition(".")
        made = _adapter(modules[owner], name, config, dtype=dtype)
        setattr(modules[owner], name, made)
        if isinstance(made, DoraAdapter):
            made.add_up = parts.adder(owner)
        if draw:
            _draw(made, modules[owner], config, target=target, seed=seed, parts=parts)
    parameters = dict(model.named_parameters())
    whole = [name for name in parameters if name.startswith(tuple(f"{path}." for path in config.modules_to_save))]
    base = {name: parameters[name].detach().clone() for name in whole}
    for name in whole:
        parameters[name].stop_gradient = False
    model.add_sublayer(_KEY, _Added(config, base))


def adapter_config_of(model: ErnieForCausalLM) -> AdapterConfig | None:
    """What was added to the model; None if nothing was."""
    added = _added(model)
    return added.config if added else None


def adapter_parameters(model: ErnieForCausalLM) -> dict[str, paddle.Tensor]:
    """Every parameter that belongs to the adapter by its name in the model, in the order of the model: those of the
    layers in slots (PiSSA's frozen beginnings too) and those of modules that are trained whole."""
    added = _added(model)
    assert added, "the model has no adapters"
    inside = {id(p) for layer in model.sublayers() if isinstance(layer, Adapter) for p in layer.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in inside or name in added.base}


@contextmanager
def adapters_off(model: ErnieForCausalLM) -> Iterator[None]:
    """Within, the model is its base bit for bit; afterwards, what it was before, bit for bit."""
    added = _added(model)
    assert added, "the model has no adapters"
    modules, parameters = dict(model.named_sublayers()), dict(model.named_parameters())
    taken = []
    for target in added.config.targets:
        owner, _, name = slot(target).rpartition(".")
        taken.append((modules[owner], name, getattr(modules[owner], name)))
        setattr(modules[owner], name, None)
    trained = {name: parameters[name].detach().clone() for name in added.base}
    _put(added.base, parameters)
    try:
        yield
    finally:
        _put(trained, parameters)
        for owner_layer, name, adapter in taken:
            setattr(owner_layer, name, adapter)


@paddle.no_grad()
def _put(values: dict[str, paddle.Tensor], parameters: dict[str, paddle.Tensor]) -> None:
    for name, value in values.items():
        paddle.assign(value, parameters[name])


def _added(model: ErnieForCausalLM) -> _Added | None:
    return dict(model.named_children()).get(_KEY)


def _adapter(owner: nn.Layer, name: str, config: AdapterConfig, *, dtype: str) -> Adapter:
    if isinstance(owner, Experts):
        sizes = [owner.size, 2 * owner.width] if name == "gate_up_adapter" else [owner.width, owner.size]
        return ExpertsAdapter([owner.num_experts, *sizes], config, dtype=dtype)
    assert isinstance(owner, Linear), f"{type(owner).__name__} has no slot for an adapter"
    kind = DoraAdapter if config.dora else LinearAdapter
    return kind([owner.num_in, owner.num_out], config, dtype=dtype)


def _weight(owner: nn.Layer, name: str) -> paddle.Tensor:
    """The base's weight under an adapter, [in, out] or [experts, in, out], dense."""
    if not isinstance(owner, Experts):
        return dense_weight(owner)
    packed, weight = (getattr(owner, name.replace("adapter", kind)) for kind in ("packed", "proj"))
    return weight if packed is None else paddle.stack([packed.dense(e) for e in range(owner.num_experts)])


@paddle.no_grad()
def _draw(
    adapter: Adapter, owner: nn.Layer, config: AdapterConfig, *, target: str, seed: int, parts: Parts
) -> None:
    """A uniform within 1 / sqrt(in) (PEFT's Kaiming with a = sqrt(5)) and B zero; or PiSSA's singular vectors. Only who
    needs the weight makes it dense."""
    path = slot(target)
    if config.init == "pissa":
        weight = _weight(owner, path.rpartition(".")[2]).astype("float32").numpy()
        made = parts.gathered(target if isinstance(owner, Experts) else f"{target}.weight", weight)
        if config.rank > min(made.shape[-2:]):
            raise ConfigError(
                f"lora_rank: {config.rank} and lora_init: pissa exclude each other: the weight of {path} has "
                f"{min(made.shape[-2:])} singular vectors; lower lora_rank, or set lora_init to default"
            )
        u, sigma, v = np.linalg.svd(made, full_matrices=False)
        root = np.sqrt(sigma[..., : config.rank] / np.float32(config.scaling))
        for factor, name, first in (
            (u[..., : config.rank] * root[..., None, :], "lora_A", (adapter.lora_A, adapter.initial_A)),
            (v[..., : config.rank, :] * root[..., :, None], "lora_B", (adapter.lora_B, adapter.initial_B)),
        ):
            for p in first:
                _set(p, parts.part(f"{path}.{name}", factor))
    else:
        name = f"{path}.lora_A"
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        shape = parts.shape(name, adapter.lora_A.shape)
        drawn = generator.random(shape, np.float32) * np.float32(2.0) - np.float32(1.0)
        _set(adapter.lora_A, parts.part(name, drawn / np.float32(np.sqrt(shape[-2]))))
    if isinstance(adapter, DoraAdapter):
        assert isinstance(owner, Linear)
        _set(adapter.magnitude, paddle.sqrt(adapter.base_squares(owner)).numpy())


def _set(p: paddle.Tensor, array: np.ndarray) -> None:
    paddle.assign(paddle.to_tensor(np.ascontiguousarray(array)).astype(p.dtype), p)

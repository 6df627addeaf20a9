"""Memory of a training run on one device, or on one rank of many, by formula, before anything is allocated.

Weights, gradients and optimizer states follow from the parameters' names and shapes; what a step holds beside them is
found by walking through its operators on paper (activations.py, tape.py). On many ranks, what parallel/zero.py shares
counts by its share. Nothing is fitted, and nothing of a machine is read. On a CPU the operators are those of our
kernels in fp32. On a GPU (never run) the same operators are taken in the width of the run's number format: Paddle's
fused ones keep about as much.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from erniekit.adapters.targets import adapter_config, slot
from erniekit.base.errors import ConfigError
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.config.adapter import AdapterConfig
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut, size
from erniekit.config.families import family
from erniekit.config.fp8 import Fp8, fp8_of
from erniekit.config.layout import Layout
from erniekit.config.packing import Packing, packing_of
from erniekit.config.parallel import FLAT_BYTES
from erniekit.config.readiness import architecture_here
from erniekit.config.run import RunConfig
from erniekit.data.batch import ROW_MULTIPLE
from erniekit.parallel.styles import comes_and_goes, is_of_routed_experts
from erniekit.training.activations import Head, Load, Terms, Writer
from erniekit.training.selection import trained_names

MB = 1e6
CHUNK_TOKENS = 512  # of the head's kernels (ops/cross_entropy.py)
_NEVER_TRAINED = ".e_score_correction_bias"
_LAYER = re.compile(r"model\.(layers|mtp_block)\.\d+\.")
_ALWAYS_FP32 = (".gate.weight", _NEVER_TRAINED)


@dataclass(frozen=True)
class Budget:
    """Bytes. `activations` are kept between the passes of a micro-batch; `peak` is the most of tensors at once, which
    is less than the sum of its parts, for gradients come as activations go; `kernels` is what kernels take inside.
    `copies` are FP8 copies of weights; `host` is in host memory, not on the device. `numbers` counts
    the numbers of all parameters, `trained` of those that are trained."""

    weights: int
    gradients: int
    states: int
    activations: int
    peak: int
    kernels: int
    numbers: int
    trained: int
    copies: int = 0
    host: int = 0

    @property
    def text(self) -> str:
        """A line for people."""
        parts = {
            "weights": self.weights, "gradients": self.gradients, "optimizer states": self.states,
            "activations": self.activations, **({"FP8 copies": self.copies} if self.copies else {}),
        }  # fmt: skip
        told = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items())
        host = f"; optimizer states in host memory {megabytes(self.host)} MB" if self.host else ""
        return f"memory: budget {megabytes(self.peak)} MB ({told}), and {megabytes(self.kernels)} MB in kernels{host}"


def memory_text(*, budget: int, kernels: int, tensors: int, process: int) -> str:
    """A line for people: a budget's peak and kernels beside what was measured (memory.py)."""
    return (
        f"memory: budget {megabytes(budget)} MB, peak {megabytes(tensors)} MB in tensors; with kernels "
        f"{megabytes(budget + kernels)} MB, the process held {megabytes(process)} MB above the program"
    )


def megabytes(num_bytes: float) -> str:
    """A size for people."""
    return f"{num_bytes / MB:,.0f}" if num_bytes >= 10 * MB else f"{num_bytes / MB:.1f}"


@dataclass(frozen=True)
class Formats:
    """Bytes of a number of a weight (and its gradient and activations), and of the optimizer's states of a trained one,
    `offloaded` of them in host memory; `packing` keeps frozen weights in few bits."""

    weight: int = 4
    states: int = 8
    packing: Packing | None = None
    fp8: Fp8 | None = None
    offloaded: int = 0

    @classmethod
    def of(cls, cfg: RunConfig, *, on_gpu: bool) -> Formats:
        """As the run sets it: bf16 weights have fp32 masters; on a CPU everything is fp32."""
        keys = cfg.optimizer
        weight = 2 if on_gpu and cfg.model.compute_type != "fp32" else 4
        moments = 4 if keys.use_lowprecision_moment or keys.optim == "adamw_16bit_moment" else 8
        moved = moments + (4 if weight == 2 else 0)
        states, offloads = moved + (4 if keys.ema_decay is not None else 0), cfg.kernels.tensorwise_offload_optimizer
        return cls(weight, states, packing_of(cfg), fp8_of(cfg), offloaded=moved if on_gpu and offloads else 0)

    def copies(self, name: str) -> bool:
        """Whether there is an FP8 copy of a weight."""
        return self.fp8 is not None and self.fp8.covers(name.removesuffix(".weight"))

    def packs(self, name: str) -> bool:
        """Whether a module's weight, or a weight, is kept in few bits."""
        return self.packing is not None and self.packing.kind_of(name.removesuffix(".weight")) is not None


@dataclass(frozen=True)
class Parameters:
    """A model's parameters: shapes by name, which are trained, and the adapter on it."""

    shapes: Mapping[str, tuple[int, ...]]
    trained: Collection[str]
    adapter: AdapterConfig | None = None

    @classmethod
    def of(cls, cfg: RunConfig, arch: ErnieConfig, *, head_bias: bool, cut: Cut = WHOLE) -> Parameters:
        """Those that the run has, as far as `cut` holds them."""
        table = memory_table(arch, head_bias=head_bias, cut=cut).tensors
        shapes, names = {name: tensor.shape for name, tensor in table.items()}, list(table)
        if cfg.model.fine_tuning != "LoRA":
            return cls(shapes, trained_names(names, keys=cfg.optimizer))
        return cls.adapted(shapes, adapter_config(cfg.lora, names))

    @classmethod
    def adapted(cls, shapes: Mapping[str, tuple[int, ...]], adapter: AdapterConfig) -> Parameters:
        """Those of a frozen model with an adapter."""
        added, frozen = dict[str, tuple[int, ...]](), dict[str, tuple[int, ...]]()
        for target in adapter.targets:
            *experts, num_in, num_out = shapes.get(target) or shapes[f"{target}.weight"]
            path, rank = slot(target), adapter.rank
            added |= {f"{path}.lora_A": (*experts, num_in, rank), f"{path}.lora_B": (*experts, rank, num_out)}
            if adapter.dora:
                added[f"{path}.magnitude"] = (num_out,)
            if adapter.init == "pissa":
                frozen |= {f"{path}.initial_{side}": added[f"{path}.lora_{side}"] for side in "AB"}
        whole = {name: shape for name, shape in shapes.items() if _inside(name, adapter.modules_to_save)}
        frozen |= {f"{name}, as the base has it": shape for name, shape in whole.items()}
        return cls({**shapes, **added, **frozen}, {*added, *whole}, adapter)

    def num_bytes(self, name: str, formats: Formats) -> int:
        """What a parameter takes."""
        shape, module = self.shapes[name], name.removesuffix(".weight")
        if formats.packing and len(shape) > 1 and formats.packs(module):
            return formats.packing.num_bytes(module, shape)
        return math.prod(shape) * (4 if name.endswith(_ALWAYS_FP32) else formats.weight)


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in modules)


def run_budget(
    cfg: RunConfig, arch: ErnieConfig, *, head_bias: bool = False, lengths: Sequence[int] = (), labelled: float = 1.0,
    on_gpu: bool = False, cut: Cut = WHOLE,
) -> Budget:  # fmt: skip
    """What a rank takes that holds `cut`. `lengths` are those of the run's samples; without them, rows are as long as
    they may be. `labelled` is the share of positions that have a label."""
    train, length = cfg.train, _row_length(cfg, lengths)
    return budget(
        arch, Load(train.batch_size, length, labelled=math.ceil(train.batch_size * length * labelled)),
        Parameters.of(cfg, arch, head_bias=head_bias, cut=cut), formats=Formats.of(cfg, on_gpu=on_gpu),
        micro_batches=train.gradient_accumulation_steps, terms=_terms(cfg, arch),
        recompute=train.recompute_granularity if train.recompute else None, cut=cut,
        flat_bytes=flat_bytes_of(cfg),
    )  # fmt: skip


def flat_bytes_of(cfg: RunConfig) -> int:
    """How many bytes of fp32 gradients are reduced over ranks as one."""
    megabytes_wanted = cfg.parallel.sharding_comm_buffer_size_MB
    return megabytes_wanted * 2**20 if megabytes_wanted > 0 else FLAT_BYTES


def _terms(cfg: RunConfig, arch: ErnieConfig) -> Terms:
    weight = cfg.model.moe_aux_loss_lambda
    balance = bool(arch.extras.get("moe_aux_loss_lambda", 1e-5) if weight is None else weight)
    heads: dict[str, Head] = {"DPO": "answers", "KTO": "answers", "RM": "none"}
    return Terms(balance, heads.get(cfg.model.stage, "tokens"))


def disk_of(cfg: RunConfig, arch: ErnieConfig, needed: Budget) -> tuple[int, int]:
    """Bytes of a checkpoint, and of what a finished run leaves: all weights, or the adapter alone."""
    kept = needed.trained if cfg.model.fine_tuning == "LoRA" else needed.numbers
    states = Formats.of(cfg, on_gpu=False).states  # masters are what a checkpoint's weights are
    return kept * 4 + needed.trained * states, kept * (2 if arch.dtype == "bfloat16" else 4)


def architecture_of(cfg: RunConfig) -> ErnieConfig | None:
    """The architecture of the config's model: from its folder, else from its name; None if neither tells."""
    try:
        return architecture_here(cfg) or family(cfg.model.model_name_or_path or "")
    except ConfigError:
        return None


def _row_length(cfg: RunConfig, lengths: Sequence[int]) -> int:
    most = cfg.data.max_seq_len
    if not len(lengths):
        return most
    longest = sum(lengths) if cfg.data.packing else max(lengths)
    return min(-(-int(longest) // ROW_MULTIPLE) * ROW_MULTIPLE, most)


@dataclass(frozen=True)
class Shares:
    """What of a rank's part of the model lies with other ranks, as parallel/zero.py shares it. `layers` says of weights
    that are whole only while their layer computes which one that is. Sizes in bytes by parameter."""

    layout: Layout
    flat_bytes: int
    layers: Mapping[str, str]

    @classmethod
    def of(cls, layout: Layout, parameters: Parameters, *, formats: Formats, flat_bytes: int) -> Shares:
        """Those of a model's parameters."""
        layers = {}
        for name, shape in parameters.shapes.items() if layout.stage == 3 else ():
            found = _LAYER.match(name)
            if found and comes_and_goes(name, num_dims=len(shape)) and not formats.packs(name):
                layers[name] = found[0]
        return cls(layout, flat_bytes, layers)

    def ranks(self, name: str) -> int:
        """How many share the states of a parameter."""
        if not self.layout.stage:
            return 1
        return len(self.layout.groups("expert_shard" if is_of_routed_experts(name) else "shard")[0])

    def gradients(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """What is kept of gradients while others are made. A model that fits one flat keeps them to the end."""
        early = self.waiting(sizes) > 0
        return {name: -(-own // self.ranks(name)) if early else own for name, own in sizes.items()}

    def waiting(self, sizes: Mapping[str, int]) -> int:
        """Beside what is kept: the gradients of a flat that is not full yet."""
        flat = self._largest_flat(sizes)
        return flat if self.layout.stage >= 2 and sum(sizes.values()) > flat else 0

    def on_the_way(self, sizes: Mapping[str, int]) -> int:
        """The gradients of a flat, and once more laid end to end, to be added up over ranks."""
        return 2 * self._largest_flat(sizes) if self.layout.data > 1 else 0

    def _largest_flat(self, sizes: Mapping[str, int]) -> int:
        layers, others = Counter[tuple[str, bool]](), [0]
        for name, own in sizes.items():
            if name in self.layers:
                layers[self.layers[name], is_of_routed_experts(name)] += own
            else:
                others.append(own)
        return max(min(sum(others), max(self.flat_bytes, *others)), *layers.values(), 0)

    def weights(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """What is always there, and what comes and goes with the layers: the matrices of one and of the next."""
        layers = Counter[str]()
        for name in self.layers:
            layers[self.layers[name]] += sizes[name]
        stays = sum(-(-own // self.ranks(name)) if name in self.layers else own for name, own in sizes.items())
        return stays, sum(sorted(layers.values())[-2:])


def budget(
    arch: ErnieConfig, load: Load, parameters: Parameters, *, formats: Formats, terms: Terms, micro_batches: int = 1,
    recompute: str | None = None, cut: Cut = WHOLE, flat_bytes: int = FLAT_BYTES,
) -> Budget:  # fmt: skip
    """The same from plain values."""
    shares = Shares.of(cut.layout, parameters, formats=formats, flat_bytes=flat_bytes)
    sizes = {name: parameters.num_bytes(name, formats) for name in parameters.shapes}
    whole = {name: sizes[name] for name in parameters.trained if not name.endswith(_NEVER_TRAINED)}
    gradients, (weights, passing) = shares.gradients(whole), shares.weights(sizes)
    tape = Writer(
        arch, load, gradients, recompute=recompute, adapter=parameters.adapter, terms=terms, number=formats.weight,
        packed=formats.packs, cut=cut,
    ).step()  # fmt: skip
    own = [-(-math.prod(parameters.shapes[name]) // shares.ranks(name)) for name in whole]
    host = sum(own) * formats.offloaded
    states = sum(own) * formats.states - host + max(own, default=0) * formats.offloaded
    on_the_way, kept = shares.on_the_way(whole), sum(gradients.values())
    copied = on_the_way // 2 if micro_batches > 1 else 0  # else the first flat is laid out when activations have gone
    working = tape.walk(again=micro_batches > 1).total + shares.waiting(whole) + copied
    held = cut.layout.stage < 3  # a rank that gives weights away keeps no copies of them
    copies = sum(math.prod(shape) for name, shape in parameters.shapes.items() if held and formats.copies(name))
    chunk = min(CHUNK_TOKENS, load.labelled) * (arch.hidden_size + size(cut.part(arch.vocab_size))) * 4
    return Budget(
        weights=weights, gradients=kept, states=states, activations=tape.kept(),
        peak=weights + passing + states + copies + max(working, kept, on_the_way), kernels=chunk, copies=copies,
        host=host, trained=sum(math.prod(parameters.shapes[name]) for name in whole),
        numbers=sum(math.prod(shape) for shape in parameters.shapes.values()),
    )  # fmt: skip

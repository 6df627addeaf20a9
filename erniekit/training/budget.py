"""Memory of a training run on one device by formula, before anything is allocated.

Weights, gradients and optimizer states follow from the parameters' names and shapes; what a step holds beside them is
found by walking through its operators on paper (activations.py, tape.py). Nothing is fitted, and nothing of a machine
is read. On a CPU the operators are those of our kernels in fp32. On a GPU (never run) the same operators are taken in
the width of the run's number format: Paddle's fused ones keep about as much.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from erniekit.checkpoint.ernie45 import memory_table
from erniekit.config.architecture import ErnieConfig
from erniekit.config.run import RunConfig
from erniekit.data.batch import ROW_MULTIPLE
from erniekit.training.activations import CHUNK_TOKENS, Load, Writer
from erniekit.training.selection import trained_names

MB = 1e6
_ALWAYS_FP32 = (".gate.weight", ".e_score_correction_bias")


@dataclass(frozen=True)
class Budget:
    """Bytes. `activations` are kept between the passes of a micro-batch; `peak` is the most of tensors at once, which
    is less than the sum of its parts, for gradients come as activations go; `kernels` is what kernels take inside."""

    weights: int
    gradients: int
    states: int
    activations: int
    peak: int
    kernels: int

    @property
    def text(self) -> str:
        """A line for people."""
        parts = {
            "weights": self.weights, "gradients": self.gradients, "optimizer states": self.states,
            "activations": self.activations,
        }  # fmt: skip
        told = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items())
        return f"memory: budget {megabytes(self.peak)} MB ({told}), and {megabytes(self.kernels)} MB in kernels"

    def beside(self, *, tensors: int, process: int) -> str:
        """The same beside what was measured."""
        return (
            f"memory: budget {megabytes(self.peak)} MB, peak {megabytes(tensors)} MB in tensors; the process held "
            f"{megabytes(process)} MB above the program"
        )


def megabytes(num_bytes: float) -> str:
    """A size for people."""
    return f"{num_bytes / MB:,.0f}" if num_bytes >= 10 * MB else f"{num_bytes / MB:.1f}"


@dataclass(frozen=True)
class Formats:
    """Bytes of a number: weights and their gradients, activations, and of each trained one the optimizer's states."""

    weight: int = 4
    states: int = 8

    @classmethod
    def of(cls, cfg: RunConfig, *, on_gpu: bool) -> Formats:
        """As the run sets it: bf16 weights have fp32 masters; on a CPU everything is fp32."""
        keys = cfg.optimizer
        weight = 2 if on_gpu and cfg.model.compute_type == "bf16" else 4
        moments = 4 if keys.use_lowprecision_moment or keys.optim == "adamw_16bit_moment" else 8
        return cls(weight, moments + (4 if weight == 2 else 0) + (4 if keys.ema_decay is not None else 0))


def run_budget(
    cfg: RunConfig, arch: ErnieConfig, *, head_bias: bool = False, lengths: Sequence[int] = (), on_gpu: bool = False
) -> Budget:
    """What the run takes. `lengths` are those of its samples; without them, rows are as long as they may be."""
    shapes = {name: tensor.shape for name, tensor in memory_table(arch, head_bias=head_bias).tensors.items()}
    trained = trained_names(list(shapes), keys=cfg.optimizer)
    length = _row_length(cfg, lengths)
    load = Load(cfg.train.batch_size, length, labelled=cfg.train.batch_size * length)
    return budget(
        arch, load, shapes=shapes, trained=trained, formats=Formats.of(cfg, on_gpu=on_gpu),
        micro_batches=cfg.train.gradient_accumulation_steps,
        recompute=cfg.train.recompute_granularity if cfg.train.recompute else None,
    )  # fmt: skip


def _row_length(cfg: RunConfig, lengths: Sequence[int]) -> int:
    most = cfg.data.max_seq_len
    if not len(lengths):
        return most
    longest = sum(lengths) if cfg.data.packing else max(lengths)
    return min(-(-int(longest) // ROW_MULTIPLE) * ROW_MULTIPLE, most)


def budget(
    arch: ErnieConfig, load: Load, *, shapes: Mapping[str, tuple[int, ...]], trained: Collection[str],
    formats: Formats, micro_batches: int = 1, recompute: str | None = None,
) -> Budget:  # fmt: skip
    """The same from plain values."""
    numbers = {name: math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: count * (4 if name.endswith(_ALWAYS_FP32) else formats.weight) for name, count in numbers.items()}
    gradients = {name: sizes[name] for name in trained if not name.endswith("e_score_correction_bias")}
    tape = Writer(arch, load, gradients, recompute=recompute, number=formats.weight).step()
    states = sum(numbers[name] for name in gradients) * formats.states
    resident = sum(sizes.values()) + states
    working = max(tape.walk(again=micro_batches > 1).total, sum(gradients.values()))
    chunk = min(CHUNK_TOKENS, load.labelled) * (arch.hidden_size + arch.vocab_size) * 4
    return Budget(sum(sizes.values()), sum(gradients.values()), states, tape.kept(), resident + working, chunk)

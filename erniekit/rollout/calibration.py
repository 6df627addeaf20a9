"""What goes into every weight of a model over some tokens: the largest number, the mean square of each input, and the
largest number of each channel of keys and values, as a cache would keep them.

The model runs layer by layer: one is in memory at a time, and the hidden states of all tokens between two of them. So a
model that fits nowhere can be calibrated, in the time that its weights take to read. Text decides which expert sees
what; one that sees nothing takes what all experts of its layer saw together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import nn

from erniekit.checkpoint.ernie45 import EMBEDDING, Table, memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import fill_layer, host_array
from erniekit.checkpoint.quantise import Statistics
from erniekit.checkpoint.quantised import CACHE_SCALES
from erniekit.checkpoint.source import Source
from erniekit.config.architecture import ErnieConfig
from erniekit.models.attention import CoreAttention, Positions
from erniekit.models.decoder import DecoderLayer
from erniekit.models.layers import MLP, Linear, RMSNorm
from erniekit.models.moe import Experts, MoE
from erniekit.ops.rope import rotate


class _Seen:
    """Largest number and sum of squares of the rows that went into one weight."""

    def __init__(self) -> None:
        self.rows, self.largest, self.squares = 0, 0.0, np.zeros(1)

    def add(self, rows: np.ndarray) -> None:
        """Look at rows [T, in]."""
        if len(rows):
            self.rows += len(rows)
            self.largest = float(np.maximum(self.largest, np.abs(rows).max()))  # NaN stays NaN
            self.squares = self.squares + np.einsum("ti,ti->i", rows, rows, dtype=np.float64)

    def join(self, other: _Seen) -> None:
        """Count what another weight saw, too."""
        self.rows, self.largest = self.rows + other.rows, float(np.maximum(self.largest, other.largest))
        self.squares = self.squares + other.squares

    def mean_squares(self) -> np.ndarray:
        """Of each input."""
        return (self.squares / self.rows).astype(np.float32)


class _Rows(nn.Layer):
    """In an adapter's slot of stacked experts: looks at the rows of each and changes nothing."""

    def __init__(self, seen: Sequence[_Seen]) -> None:
        super().__init__()
        self._of = tuple(seen)

    def forward(self, rows: paddle.Tensor, made: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """See models/moe.py."""
        array, start = host_array(rows), 0
        for seen, count in zip(self._of, counts, strict=True):
            seen.add(array[start : start + count])
            start += count
        return made


class _Watch:
    """Hooks in a decoder layer whose weights are stored under `prefix`, in -Paddle layout."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.seen: dict[str, _Seen] = {}
        self.cache: dict[str, np.ndarray] = {}

    def look(self, layer: DecoderLayer) -> None:
        """Watch everything that goes into this layer's weights."""
        attention = layer.self_attn
        self.linear("self_attn.qkv_proj", attention.q_proj)
        self.linear("self_attn.o_proj", attention.o_proj)
        attention.core_attn.register_forward_pre_hook(self._core)
        if isinstance(layer.mlp, MLP):
            self._mlp("mlp.", layer.mlp)
            return
        mixture: MoE = layer.mlp
        self._experts(mixture.experts)
        if mixture.shared_experts is not None:
            self._mlp("mlp.shared_experts.", mixture.shared_experts)

    def linear(self, name: str, layer: Linear) -> None:
        """Watch the inputs of a linear layer."""
        seen = self._new(name)
        layer.register_forward_pre_hook(
            lambda _layer, inputs: seen.add(host_array(inputs[0]).reshape(-1, inputs[0].shape[-1]))
        )

    def _mlp(self, prefix: str, mlp: MLP) -> None:
        self.linear(prefix + "up_gate_proj", mlp.gate_proj)
        self.linear(prefix + "down_proj", mlp.down_proj)

    def _experts(self, experts: Experts) -> None:
        names = {"gate_up_adapter": "up_gate_proj", "down_adapter": "down_proj"}
        for slot, part in names.items():
            watched = [self._new(f"mlp.experts.{index}.{part}") for index in range(experts.num_experts)]
            setattr(experts, slot, _Rows(watched))

    def _new(self, name: str) -> _Seen:
        return self.seen.setdefault(f"{self.prefix}{name}.weight", _Seen())

    def _core(self, layer: CoreAttention, inputs: tuple[paddle.Tensor, ...]) -> None:
        _, keys, values, positions = inputs
        b, s, _ = keys.shape
        turned = rotate(keys.reshape([b, s, -1, layer.head_dim]), positions.cos_BSJ, positions.sin_BSJ)
        for scale, tensor in zip(CACHE_SCALES, (turned, values), strict=True):
            largest = np.abs(host_array(tensor).reshape(b * s, -1)).max(0)
            name = f"{self.prefix}self_attn.{scale}"
            self.cache[name] = np.maximum(self.cache.get(name, largest), largest)

    def settle(self) -> None:
        """Give an expert that saw nothing what the others saw."""
        for part in ("up_gate_proj", "down_proj"):
            experts = [name for name in self.seen if ".experts." in name and name.endswith(f".{part}.weight")]
            together = _Seen()
            for name in experts:
                together.join(self.seen[name])
            self.seen |= {name: together for name in experts if not self.seen[name].rows}


class _Model:
    """A model of which one part is in memory at a time."""

    def __init__(self, folder: Folder, source: Source) -> None:
        self.cfg: ErnieConfig = folder.disk_config.replace(num_nextn_predict_layers=folder.form.mtp_layers)
        self.source, self.stored = source, folder.table.atoms
        self.table: Table = memory_table(self.cfg, head_bias=folder.form.head_bias)
        self.seen: dict[str, _Seen] = {}
        self.cache: dict[str, np.ndarray] = {}

    def embedded(self, row: np.ndarray) -> paddle.Tensor:
        """Hidden states [1, S, D] of token ids."""
        return paddle.to_tensor(self.source.read(EMBEDDING)[row].astype(np.float32)).unsqueeze(0)

    def layer(self, name: str, made: nn.Layer) -> nn.Layer:
        """A part of the model with its weights."""
        fill_layer(made, name, self.source, table=self.table, stored=self.stored)
        made.eval()
        return made

    def norm(self, name: str) -> nn.Layer:
        """A norm of the model."""
        return self.layer(name, RMSNorm(self.cfg.hidden_size, eps=self.cfg.rms_norm_eps, dtype="float32"))

    def decoder_layer(self, block: str, index: int) -> tuple[nn.Layer, _Watch]:
        """A decoder layer that is watched."""
        name = f"{block}.{index}."
        layer = DecoderLayer(self.cfg, sparse=self.cfg.is_sparse(index), dtype="float32")
        watch = _Watch("ernie." + name)
        watch.look(layer)
        return self.layer(f"model.{name}", layer), watch

    def keep(self, watch: _Watch) -> None:
        """Take over what was seen."""
        watch.settle()
        self.seen |= watch.seen
        self.cache |= watch.cache


@paddle.no_grad()
def calibrate(
    folder: Folder, source: Source, rows: Sequence[np.ndarray], *, progress: Callable[[int, int], None]
) -> Statistics:
    """Run the model of `source` (its form as `folder` has it) over rows of token ids, and say what was seen.

    `progress` is called with the layers done and the layers in all.
    """
    model = _Model(folder, source)
    positions = [_positions(len(row), model.cfg) for row in rows]
    hidden = [model.embedded(row) for row in rows]
    depths, total = model.cfg.num_nextn_predict_layers, model.cfg.num_hidden_layers
    for index in range(total):
        layer, watch = model.decoder_layer("layers", index)
        hidden = [layer(x, where)[0] for x, where in zip(hidden, positions, strict=True)]
        model.keep(watch)
        progress(index + 1, total + depths)
    for depth in range(depths):
        hidden = _ahead(model, depth, rows, hidden, positions)
        progress(total + depth + 1, total + depths)
    return Statistics(
        sum(map(len, rows)),
        {name: seen.largest for name, seen in model.seen.items()},
        {name: seen.mean_squares() for name, seen in model.seen.items()},
        model.cache,
    )


def _ahead(
    model: _Model, depth: int, rows: Sequence[np.ndarray], hidden: Sequence[paddle.Tensor],
    positions: Sequence[Positions],
) -> list[paddle.Tensor]:  # fmt: skip
    """A depth of multi-token prediction; see models/decoder.py."""
    size, pad = model.cfg.hidden_size, model.cfg.pad_token_id
    norms = [model.norm(f"model.mtp_{kind}_norm.{depth}.") for kind in ("emb", "hidden")]
    project = Linear(2 * size, size, bias=False, dtype="float32")
    layer, watch = model.decoder_layer("mtp_block", depth)
    outer = _Watch("ernie.")
    outer.linear(f"mtp_linear_proj.{depth}", project)
    model.layer(f"model.mtp_linear_proj.{depth}.", project)
    out = []
    for row, x, where in zip(rows, hidden, positions, strict=True):
        ahead = np.append(row, np.full(depth + 1, pad))[depth + 1 :]
        joined = paddle.concat([norms[0](model.embedded(ahead)), norms[1](x)], -1)
        out.append(layer(project(joined), where)[0])
    model.keep(watch)
    model.keep(outer)
    return out


def _positions(length: int, cfg: ErnieConfig) -> Positions:
    count = paddle.arange(length, dtype="int64").unsqueeze(0)
    return Positions.of(count, paddle.full([1, length], length, dtype="int32"), cfg)

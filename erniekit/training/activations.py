"""The operators of a training step of an ERNIE model, as training/tape.py walks through them.

Each line says what one operator of `models/`, `ops/`, `adapters/` and `parallel/recompute.py` reads, makes and keeps on
a CPU; where one of them changes, its line here does, and tests/unit/training/test_budget.py measures both. A linear
layer keeps its input only for the gradient of its weight: under an adapter the low-rank product keeps it instead.

Of several ranks it is the pass of one: `cut` says which part of every matrix it has. As many rows are taken to come
from other ranks as go there, as if all experts were chosen equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from erniekit.adapters.targets import slot
from erniekit.config.adapter import AdapterConfig
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import WHOLE, Cut, size
from erniekit.config.sizes import expert_groups
from erniekit.training.tape import Tape, Value

Head = Literal["tokens", "answers", "none"]  # cross-entropy, log-probabilities of answers, rewards without a head

_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Load:
    """What a micro-batch brings: rows, their length, and the positions that have a label."""

    rows: int
    length: int
    labelled: int

    @property
    def tokens(self) -> int:
        """Positions in all, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Terms:
    """What a step computes beside the layers: the routers' balance loss, and what the head is there for."""

    balance: bool = True
    head: Head = "tokens"


@dataclass
class Writer:
    """Writes the operators of one model and one micro-batch to a tape. `gradients` are the bytes of the gradient of
    every parameter that is trained, `number` those of an activation; `cut` is what the rank holds."""

    arch: ErnieConfig
    load: Load
    gradients: Mapping[str, int]
    recompute: str | None = None
    adapter: AdapterConfig | None = None
    packed: Callable[[str], bool] = lambda _module: False
    terms: Terms = Terms()
    number: int = 4
    cut: Cut = WHOLE
    tape: Tape = field(default_factory=Tape, init=False)

    def __post_init__(self) -> None:
        self._vectors = self.load.tokens * self.number  # bytes of one number for every token
        self._ranks = self.cut.layout.tensor
        # How many ranks share a row between blocks.
        self._positions = self._ranks if self.cut.layout.sequence_parallel else 1
        self._slots = {slot(target) for target in self.adapter.targets} if self.adapter else set[str]()

    def step(self) -> Tape:
        """The whole pass, with the losses of the head and of multi-token prediction."""
        cfg = self.arch
        x = self._embedding()
        for i in range(cfg.num_hidden_layers):
            x = self._layer(f"model.layers.{i}", x, sparse=cfg.is_sparse(i))
        ahead = self._predict_ahead(x) if self.terms.head != "none" else []
        hidden = self._norm("model.norm", x)
        if self.terms.head == "tokens":
            self._cross_entropy(hidden)
        elif self.terms.head == "answers":
            self._log_probs(hidden)
        for hidden in ahead:
            self._cross_entropy(hidden)
        return self.tape

    # ------------------------------------------------------------------ inside a layer
    def _linear(self, name: str, x: Value, width: int) -> Value:
        trains = self._trained(f"{name}.weight", f"{name}.bias")
        needs_input = f"{name}.weight" in trains
        y = self.tape.add(x, makes=width * self._vectors, keeps=[x] if needs_input else [], trains=trains)
        return self._adapted(f"{name}.adapter", x, y, rows=self.load.tokens)

    def _adapted(self, path: str, x: Value, y: Value, *, rows: int) -> Value:
        """The product y of a base with the adapter's added, for so many rows of x."""
        if path not in self._slots or self.adapter is None:
            return y
        factors = self._trained(f"{path}.lora_A", f"{path}.lora_B")
        inside, doubled = rows * self.adapter.rank * self.number, 0
        if self.adapter.dropout:
            x = self.tape.add(x, makes=x.num_bytes, beside=x.num_bytes // self.number)  # the mask
        if self.adapter.init == "pissa":
            inside, doubled = 2 * inside, 2 * sum(factors.values())
        y = self.tape.add(y, x, makes=y.num_bytes, keeps=[x], beside=inside + doubled, trains=factors, passes=True)
        if self.adapter.dora:
            y = self.tape.add(y, makes=y.num_bytes, keeps=[y], trains=self._trained(f"{path}.magnitude"))
        return y

    def _norm(self, name: str, x: Value) -> Value:
        trains = self._trained(f"{name}.weight")
        roots = x.num_bytes // self.arch.hidden_size
        return self.tape.add(x, makes=x.num_bytes, keeps=[x], beside=roots, trains=trains)

    def _enter(self, x: Value) -> Value:
        """What a block that the tensor ranks share reads: all positions."""
        return x if self._positions == 1 else self.tape.add(x, makes=x.num_bytes * self._positions)

    def _leave(self, y: Value) -> Value:
        """The sum of what the tensor ranks have made, of which each goes on with its positions."""
        if self._ranks == 1:
            return y
        return self.tape.add(y, makes=y.num_bytes // self._positions, passes=self._positions == 1)

    def _summed(self, y: Value) -> Value:
        """The sum of what the tensor ranks have made, which each goes on with."""
        return y if self._ranks == 1 else self.tape.add(y, makes=y.num_bytes, passes=True)

    def _own_positions(self, y: Value) -> Value:
        """Of all positions, those that the rank goes on with."""
        return y if self._positions == 1 else self.tape.add(y, makes=y.num_bytes // self._positions)

    def _attention(self, name: str, x: Value) -> Value:
        cfg, (heads, kv_heads), x = self.arch, self.cut.heads_of(self.arch), self._enter(x)
        q = self._linear(f"{name}.q_proj", x, heads * cfg.head_dim)
        k, v = (self._linear(f"{name}.{part}", x, kv_heads * cfg.head_dim) for part in ("k_proj", "v_proj"))
        sums = heads * self._vectors
        out = self._again("core_attn", lambda *qkv: self.tape.add(
            *qkv, makes=q.num_bytes, keeps=qkv, product=True, beside=sums
        ), q, k, v)  # fmt: skip
        return self._leave(self._linear(f"{name}.o_proj", out, cfg.hidden_size))

    def _mlp(self, name: str, x: Value, whole_width: int) -> Value:
        """Without entering and leaving."""
        width = size(self.cut.part(whole_width))
        gate, up = (self._linear(f"{name}.{part}", x, width) for part in ("gate_proj", "up_proj"))
        act = self.tape.add(gate, up, makes=gate.num_bytes, keeps=[gate, up])
        return self._linear(f"{name}.down_proj", act, self.arch.hidden_size)

    def _moe(self, name: str, x: Value) -> Value:
        cfg, tape, layout = self.arch, self.tape, self.cut.layout
        x = x if layout.experts_over == "tensor" else self._enter(x)
        (experts, _), chosen = expert_groups(cfg)[0], cfg.moe_k
        vectors = x.num_bytes // cfg.hidden_size
        routed, indices = chosen * vectors, chosen * vectors // self.number * _INDEX
        logits = tape.add(x, makes=experts * vectors, keeps=[x], trains=self._trained(f"{name}.gate.weight"))
        probs = tape.add(logits, makes=logits.num_bytes, product=True)
        # Beside are kept the chosen, by what picks them, and by clip and division what they were before, and their sum.
        beside = indices + routed + 2 * vectors
        weights = tape.add(probs, makes=routed, keeps=[probs], product=True, beside=beside)
        # The router losses read the logits when all layers are done; the balance loss keeps a softmax of its own.
        tape.held += logits.num_bytes * (2 if self.terms.balance else 1)
        y = self._routed(f"{name}.experts", x, weights)
        if cfg.moe_num_shared_experts:
            entered = self._enter(x) if layout.experts_over == "tensor" else x
            shared = self._mlp(f"{name}.shared_experts", entered, cfg.shared_intermediate_size)
            y = self._added(y, self._leave(shared) if layout.experts_over == "tensor" else self._summed(shared))
        return y if layout.experts_over == "tensor" else self._own_positions(y)

    def _routed(self, name: str, x: Value, weights: Value) -> Value:
        """To the experts, wherever they are, and back."""
        tape, layout, whole = self.tape, self.cut.layout, x.num_bytes
        parts = layout.tensor if layout.experts_over == "tensor" and self._positions == 1 else 1
        if parts > 1:  # each tensor rank takes some of the tokens to the experts
            x, weights = (tape.add(value, makes=value.num_bytes // parts) for value in (x, weights))
        rows = tape.add(x, makes=self.arch.moe_k * x.num_bytes, beside=weights.num_bytes // self.number * _INDEX)
        if layout.expert > 1:
            rows = self._exchanged(rows)
            rows = tape.add(rows, makes=rows.num_bytes)  # sorted by expert once more
        made = self._experts(name, rows)
        if layout.expert > 1:
            made = self._exchanged(tape.add(made, makes=made.num_bytes))
        y = tape.add(made, weights, makes=x.num_bytes, keeps=[made, weights])
        if parts > 1:
            return tape.add(y, makes=whole)
        return y if layout.experts_over == "tensor" else self._summed(y)

    def _exchanged(self, rows: Value) -> Value:
        """Rows that have gone to other ranks. On a CPU everybody's go everywhere (parallel/collectives.py)."""
        everywhere = (self.cut.layout.expert + 1) * rows.num_bytes
        return self.tape.add(rows, makes=rows.num_bytes, forward=everywhere, backward=everywhere)

    def _experts(self, name: str, rows: Value) -> Value:
        width, routed = expert_groups(self.arch)[0][1], rows.num_bytes // self.arch.hidden_size // self.number
        width = size(self.cut.expert_part(width))
        gate_up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
        trains, inside = self._trained(gate_up, down), 2 * width * routed * self.number
        in_slots = self._slots & {f"{name}.gate_up_adapter", f"{name}.down_adapter"}
        if not in_slots and not self.packed(gate_up):
            return self.tape.add(rows, makes=rows.num_bytes, keeps=[rows], beside=inside, trains=trains)
        hidden = self.tape.add(rows, makes=inside, keeps=[rows] if trains else [], trains=self._trained(gate_up))
        hidden = self._adapted(f"{name}.gate_up_adapter", rows, hidden, rows=routed)
        act = self.tape.add(hidden, makes=inside // 2, keeps=[hidden])
        made = self.tape.add(act, makes=rows.num_bytes, keeps=[act] if trains else [], trains=self._trained(down))
        return self._adapted(f"{name}.down_adapter", act, made, rows=routed)

    def _added(self, x: Value, y: Value) -> Value:
        return self.tape.add(x, y, makes=x.num_bytes, passes=True)

    # ------------------------------------------------------------------ the model
    def _layer(self, name: str, x: Value, *, sparse: bool) -> Value:
        return self._again("full", lambda x: self._block(name, x, sparse=sparse), x)

    def _block(self, name: str, x: Value, *, sparse: bool) -> Value:
        normed = self._norm(f"{name}.input_layernorm", x)
        x = self._added(x, self._again("full_attn", lambda x: self._attention(f"{name}.self_attn", x), normed))
        normed = self._norm(f"{name}.post_attention_layernorm", x)
        if sparse:
            return self._added(x, self._moe(f"{name}.mlp", normed))
        made = self._mlp(f"{name}.mlp", self._enter(normed), self.arch.intermediate_size)
        return self._added(x, self._leave(made))

    def _again(self, kind: str, write: Callable[..., Value], *reads: Value) -> Value:
        """What `write` writes, recomputed in the backward pass if that is the kind of thing that is."""
        if self.recompute != kind:
            return write(*reads)
        outer, self.tape = self.tape, Tape()
        write(*reads)
        inner, self.tape = self.tape, outer
        return self.tape.add_recomputed(*reads, inner=inner)

    def _predict_ahead(self, x: Value) -> list[Value]:
        cfg, out = self.arch, []
        for i in range(cfg.num_nextn_predict_layers):
            token = self._norm(f"model.mtp_emb_norm.{i}", self._embedding())
            hidden = self._norm(f"model.mtp_hidden_norm.{i}", x)
            joined = self.tape.add(token, hidden, makes=2 * x.num_bytes)
            x = self._linear(f"model.mtp_linear_proj.{i}", joined, cfg.hidden_size)
            x = self._layer(f"model.mtp_block.{i}", x, sparse=cfg.is_sparse(i))
            out.append(self._norm("model.norm", x))
        return out

    def _embedding(self) -> Value:
        table = self._trained("model.embed_tokens.weight")
        return self._leave(self.tape.add(makes=self.arch.hidden_size * self._vectors, trains=table))

    # ------------------------------------------------------------------ losses
    def _cross_entropy(self, hidden: Value) -> None:
        """Its gradients are made in the forward pass and scaled in the backward pass."""
        trains = self._trained(*self._head)
        self.tape.add(hidden, makes=4, beside=hidden.num_bytes + sum(trains.values()), trains=trains)

    def _log_probs(self, hidden: Value) -> None:
        """Those of the labelled rows. The reference has run before, when there were no activations."""
        count, trains = self.load.labelled, self._trained(*self._head)
        rows = self.tape.add(
            hidden, makes=hidden.num_bytes // self.load.tokens * count, beside=2 * count * _INDEX
        )  # fmt: skip
        self.tape.add(rows, makes=4 * count, keeps=[rows], trains=trains)

    @property
    def _head(self) -> tuple[str, ...]:
        return "model.embed_tokens.weight" if self.arch.tie_word_embeddings else "lm_head.weight", "lm_head.bias"

    def _trained(self, *names: str) -> dict[str, int]:
        return {name: self.gradients[name] for name in names if name in self.gradients}

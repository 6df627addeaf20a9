"""The operators of a training step of an ERNIE model, as training/tape.py walks through them.

Each line says what one operator of `models/`, `ops/` and `parallel/recompute.py` reads, makes and keeps on a CPU; where
one of them changes, its line here does (tests/unit/training/test_budget.py measures both). Sizes count numbers of
`Sizes.number` bytes, written M for tokens, D hidden size, X and Y query and key width, N heads, E experts, K chosen, I
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from erniekit.config.architecture import ErnieConfig
from erniekit.config.sizes import expert_groups
from erniekit.training.tape import Tape, Value

CHUNK_TOKENS = 512


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


@dataclass
class Writer:
    """Writes the operators of one model and one micro-batch to a tape."""

    arch: ErnieConfig
    load: Load
    gradients: Mapping[str, int]  # bytes of the gradient of every parameter that is trained
    recompute: str | None = None
    balance: bool = True  # whether a router's balance loss is made
    number: int = 4

    def __post_init__(self) -> None:
        self.tape = Tape()
        self.vectors = self.load.tokens * self.number  # bytes of one number for every token

    def _trained(self, *names: str) -> dict[str, int]:
        """The gradients of those of the parameters that are trained."""
        return {name: self.gradients[name] for name in names if name in self.gradients}

    def _again(self, kind: str, write: Callable[..., Value], *reads: Value) -> Value:
        """What `write` writes, recomputed in the backward pass if that is the kind of thing that is."""
        if self.recompute != kind:
            return write(*reads)
        outer, self.tape = self.tape, Tape()
        write(*reads)
        inner, self.tape = self.tape, outer
        return self.tape.add_recomputed(*reads, inner=inner)

    # ------------------------------------------------------------------ pieces
    def _linear(self, name: str, x: Value, width: int) -> Value:
        trains = self._trained(f"{name}.weight", f"{name}.bias")
        return self.tape.add(x, makes=width * self.vectors, keeps=[x], trains=trains)

    def _norm(self, name: str, x: Value) -> Value:
        return self.tape.add(
            x, makes=x.num_bytes, keeps=[x], beside=self.vectors, trains=self._trained(f"{name}.weight")
        )  # fmt: skip

    def _attention(self, name: str, x: Value) -> Value:
        cfg = self.arch
        q = self._linear(f"{name}.q_proj", x, cfg.q_dim)
        k, v = (self._linear(f"{name}.{part}", x, cfg.kv_dim) for part in ("k_proj", "v_proj"))
        sums = cfg.num_attention_heads * self.vectors
        out = self._again("core_attn", lambda *qkv: self.tape.add(
            *qkv, makes=q.num_bytes, keeps=qkv, product=True, beside=sums
        ), q, k, v)  # fmt: skip
        return self._linear(f"{name}.o_proj", out, cfg.hidden_size)

    def _mlp(self, name: str, x: Value, width: int) -> Value:
        gate, up = (self._linear(f"{name}.{part}", x, width) for part in ("gate_proj", "up_proj"))
        act = self.tape.add(gate, up, makes=gate.num_bytes, keeps=[gate, up])
        return self._linear(f"{name}.down_proj", act, self.arch.hidden_size)

    def _moe(self, name: str, x: Value) -> Value:
        cfg, tape, d = self.arch, self.tape, self.arch.hidden_size
        (experts, width), chosen = expert_groups(cfg)[0], cfg.moe_k
        routed = chosen * self.vectors
        logits = tape.add(x, makes=experts * self.vectors, keeps=[x], trains=self._trained(f"{name}.gate.weight"))
        probs = tape.add(logits, makes=logits.num_bytes, product=True)
        # Indices are int64; the weights are kept by the division and by what combines, their sums by clip and division.
        weights = tape.add(probs, makes=routed, keeps=[probs], product=True, beside=3 * routed + 2 * self.vectors)
        tape.held += logits.num_bytes
        rows = tape.add(x, makes=routed * d, beside=2 * routed)
        parameters = self._trained(f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj")
        made = tape.add(rows, makes=routed * d, keeps=[rows], beside=2 * width * routed, trains=parameters)
        y = tape.add(made, weights, makes=x.num_bytes, keeps=[made, weights])
        if self.balance:  # its softmax and the product with the mask are kept
            tape.held += logits.num_bytes
        if cfg.moe_num_shared_experts:
            y = self._added(y, self._mlp(f"{name}.shared_experts", x, cfg.shared_intermediate_size))
        return y

    def _added(self, x: Value, y: Value) -> Value:
        return self.tape.add(x, y, makes=x.num_bytes, passes=True)

    # ------------------------------------------------------------------ the model
    def _layer(self, name: str, x: Value, *, sparse: bool) -> Value:
        normed = self._norm(f"{name}.input_layernorm", x)
        x = self._added(x, self._again("full_attn", lambda x: self._attention(f"{name}.self_attn", x), normed))
        normed = self._norm(f"{name}.post_attention_layernorm", x)
        if sparse:
            return self._added(x, self._moe(f"{name}.mlp", normed))
        return self._added(x, self._mlp(f"{name}.mlp", normed, self.arch.intermediate_size))

    def step(self) -> Tape:
        """The whole pass, with the losses of the head and of multi-token prediction."""
        cfg, tape = self.arch, self.tape
        x = self._embedding()
        for i in range(cfg.num_hidden_layers):
            x = self._again("full", lambda x, i=i: self._layer(f"model.layers.{i}", x, sparse=cfg.is_sparse(i)), x)
        ahead = self._predict_ahead(x)
        for hidden in (self._norm("model.norm", x), *ahead):
            self._head(hidden)
        return tape

    def _predict_ahead(self, x: Value) -> list[Value]:
        cfg, out = self.arch, []
        for i in range(cfg.num_nextn_predict_layers):
            token = self._norm(f"model.mtp_emb_norm.{i}", self._embedding())
            hidden = self._norm(f"model.mtp_hidden_norm.{i}", x)
            joined = self.tape.add(token, hidden, makes=2 * x.num_bytes)
            x = self._linear(f"model.mtp_linear_proj.{i}", joined, cfg.hidden_size)
            x = self._again(
                "full", lambda x, i=i: self._layer(f"model.mtp_block.{i}", x, sparse=cfg.is_sparse(i)), x
            )  # fmt: skip
            out.append(self._norm("model.norm", x))
        return out

    def _embedding(self) -> Value:
        return self.tape.add(
            makes=self.arch.hidden_size * self.vectors, trains=self._trained("model.embed_tokens.weight")
        )  # fmt: skip

    def _head(self, hidden: Value) -> None:
        """The loss: its gradients are made in the forward pass and scaled in the backward pass."""
        tied = self.arch.tie_word_embeddings
        trains = self._trained("model.embed_tokens.weight" if tied else "lm_head.weight", "lm_head.bias")
        self.tape.add(hidden, makes=4, beside=hidden.num_bytes + sum(trains.values()), trains=trains)

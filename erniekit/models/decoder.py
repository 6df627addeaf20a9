"""ERNIE 4.5 text models, dense and mixture of experts: the decoder, its head, and multi-token prediction.

Shapes: B batch, S positions, D hidden size, V vocabulary, M = B*S.
Parameter names equal the -PT checkpoints' (weights are [in, out]; the routed experts of a layer are stacked).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import paddle
from paddle import nn

from erniekit.base.errors import CheckpointError
from erniekit.config.architecture import ErnieConfig
from erniekit.models.attention import Attention, Positions
from erniekit.models.cache import KVCache, LayerCache
from erniekit.models.layers import MLP, Embedding, Linear, RMSNorm, parameter
from erniekit.models.moe import MoE, Routing
from erniekit.ops.attention import end_rows_from_mask, end_rows_from_segments, positions_in_segments
from erniekit.ops.cross_entropy import head_logits, linear_cross_entropy, token_scores
from erniekit.ops.dropout import dropout
from erniekit.ops.log_probs import linear_log_probs


class Trunk(NamedTuple):
    """What the decoder computes for a batch, before the head."""

    hidden_BSD: paddle.Tensor  # after the final norm
    mtp_hidden: list[paddle.Tensor]  # one [B, S, D] per prediction depth, after the shared final norm
    routings: list[Routing]  # one per sparse layer, in order


class DecoderLayer(nn.Layer):
    """Pre-norm attention and MLP (or MoE) with residuals."""

    def __init__(self, cfg: ErnieConfig, *, sparse: bool, dtype: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(cfg, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        self.sparse = sparse
        self.dropout, self.stream = 0.0, 0  # of what attention and MLP add, in training (ops/dropout.py); from outside
        if sparse:
            self.mlp = MoE(cfg, dtype=dtype)
        else:
            self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=cfg.use_bias, dtype=dtype)

    def forward(
        self, x_BSD: paddle.Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[paddle.Tensor, Routing | None]:
        """[B, S, D] -> ([B, S, D], the routing of a sparse layer)."""
        x_BSD = x_BSD + self._thinned(self.self_attn(self.input_layernorm(x_BSD), positions, cache))
        normed = self.post_attention_layernorm(x_BSD)
        y_BSD, routing = self.mlp(normed) if self.sparse else (self.mlp(normed), None)
        return x_BSD + self._thinned(y_BSD), routing

    def _thinned(self, added_BSD: paddle.Tensor) -> paddle.Tensor:
        return dropout(added_BSD, self.dropout, stream=self.stream) if self.dropout and self.training else added_BSD


class Decoder(nn.Layer):
    """Embedding, layers, final norm, and the blocks of multi-token prediction (arXiv 2404.19737, sequential form)."""

    def __init__(self, cfg: ErnieConfig, *, dtype: str) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, dtype=dtype)
        self.layers = nn.LayerList(
            [DecoderLayer(cfg, sparse=cfg.is_sparse(i), dtype=dtype) for i in range(cfg.num_hidden_layers)]
        )
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, dtype=dtype)
        depths = range(cfg.num_nextn_predict_layers)
        if depths:
            size, eps = cfg.hidden_size, cfg.rms_norm_eps
            self.mtp_block = nn.LayerList([DecoderLayer(cfg, sparse=cfg.is_sparse(i), dtype=dtype) for i in depths])
            self.mtp_emb_norm = nn.LayerList([RMSNorm(size, eps=eps, dtype=dtype) for _ in depths])
            self.mtp_hidden_norm = nn.LayerList([RMSNorm(size, eps=eps, dtype=dtype) for _ in depths])
            self.mtp_linear_proj = nn.LayerList([Linear(2 * size, size, bias=False, dtype=dtype) for _ in depths])

    def forward(
        self,
        input_ids_BS: paddle.Tensor,
        positions: Positions,
        *,
        cache: KVCache | None = None,
        predict_ahead: bool = False,
    ) -> Trunk:
        """Run all layers; `predict_ahead` also runs the multi-token-prediction blocks (training only)."""
        x = self.embed_tokens(input_ids_BS)
        routings: list[Routing] = []
        for i, layer in enumerate(self.layers):
            x, routing = layer(x, positions, cache.layers[i] if cache is not None else None)
            routings += [routing] if routing is not None else []
        ahead = self._predict_ahead(input_ids_BS, x, positions, routings) if predict_ahead else []
        return Trunk(self.norm(x), ahead, routings)

    def _predict_ahead(
        self, input_ids_BS: paddle.Tensor, hidden_BSD: paddle.Tensor, positions: Positions, routings: list[Routing]
    ) -> list[paddle.Tensor]:
        """Depth i joins the embedding of the token i + 1 ahead with the hidden state before the final norm.

        Behind a row comes padding, so that routers, which judge positions without a label too, see the same however
        wide the longest row of a batch is.
        """
        out, (rows, width), depths = [], input_ids_BS.shape, self.cfg.num_nextn_predict_layers
        behind = paddle.full([rows, depths], self.cfg.pad_token_id, input_ids_BS.dtype)
        padded_ids = paddle.concat([input_ids_BS, behind], 1)
        for depth in range(depths):
            ahead_ids = padded_ids[:, depth + 1 : depth + 1 + width]
            joined = paddle.concat(
                [self.mtp_emb_norm[depth](self.embed_tokens(ahead_ids)), self.mtp_hidden_norm[depth](hidden_BSD)], -1
            )
            hidden_BSD, routing = self.mtp_block[depth](self.mtp_linear_proj[depth](joined), positions)
            routings += [routing] if routing is not None else []
            out.append(self.norm(hidden_BSD))
        return out


class HeadKernels(NamedTuple):
    """What is made of hidden states and a head: each is called like the function of ops/ that stands here."""

    loss_sum: Callable[..., paddle.Tensor] = linear_cross_entropy
    log_probs: Callable[..., paddle.Tensor] = linear_log_probs
    token_scores: Callable[..., tuple[paddle.Tensor, paddle.Tensor]] = token_scores
    logits: Callable[..., paddle.Tensor] = head_logits


class Head(nn.Layer):
    """The language-model head. Tied models have no weight here (the embedding serves) and may still have a bias.

    `kernels` is a slot that is filled from outside where no device has the whole vocabulary.
    """

    bf16_products = False  # precision/products.py

    def __init__(self, cfg: ErnieConfig, embedding: Embedding, *, bias: bool, dtype: str) -> None:
        super().__init__()
        size = [cfg.hidden_size, cfg.vocab_size]
        self.weight = None if cfg.tie_word_embeddings else parameter(self, size, dtype=dtype)
        self.bias = parameter(self, [cfg.vocab_size], dtype=dtype) if bias else None
        self.kernels = HeadKernels()
        self._tied = (embedding,) if self.weight is None else ()  # in a tuple: it is no part of the head

    def loss_sum(self, hidden_MD: paddle.Tensor, labels_M: paddle.Tensor) -> paddle.Tensor:
        """Sum of -log softmax at the labels that are not ignored, an fp32 scalar."""
        weight, where = self._table()
        return self.kernels.loss_sum(hidden_MD, weight, labels_M, **where, bf16=self.bf16_products)

    def log_probs(self, hidden_MD: paddle.Tensor, labels_M: paddle.Tensor) -> paddle.Tensor:
        """log softmax at the labels, fp32 [M]; every row must have one."""
        weight, where = self._table()
        return self.kernels.log_probs(hidden_MD, weight, labels_M, **where, bf16=self.bf16_products)

    def token_scores(self, hidden_MD: paddle.Tensor, labels_M: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(loss [M], whether the label is the best token [M]), without gradients."""
        weight, where = self._table()
        return self.kernels.token_scores(hidden_MD, weight, labels_M, **where)

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """fp32 logits of hidden states [..., D] -> [..., V]."""
        weight, where = self._table()
        return self.kernels.logits(hidden, weight, **where)

    def _table(self) -> tuple[paddle.Tensor, dict[str, Any]]:
        weight = self._tied[0].weight if self._tied else self.weight
        return weight, {"vocab_first": bool(self._tied), "bias_V": self.bias}


class ErnieForCausalLM(nn.Layer):
    """The language model. `config` is its architecture; parameters start at zero and are filled from a checkpoint."""

    def __init__(self, config: ErnieConfig, *, dtype: str = "float32", lm_head_bias: bool = False) -> None:
        super().__init__()
        if config.is_vl:
            raise CheckpointError(
                "Vision-language models cannot be run yet: convert, verify and init handle their folders, "
                "train, eval and chat do not."
            )
        self.config = config
        self.model = Decoder(config, dtype=dtype)
        self.lm_head = Head(config, self.model.embed_tokens, bias=lm_head_bias, dtype=dtype)

    def trunk(
        self, input_ids_BS: paddle.Tensor, position_ids_BS: paddle.Tensor, end_rows_BS: paddle.Tensor
    ) -> Trunk:  # fmt: skip
        """The training forward up to the head, multi-token prediction included if the model has it."""
        positions = Positions.of(position_ids_BS, end_rows_BS, self.config)
        return self.model(input_ids_BS, positions, predict_ahead=bool(self.config.num_nextn_predict_layers))

    def step(self, input_ids_BS: paddle.Tensor, cache: KVCache) -> paddle.Tensor:
        """fp32 logits [B, V] of the last position, with everything before in the cache (generation)."""
        num_new = input_ids_BS.shape[1]
        positions = Positions.of(cache.open(num_new), None, self.config)
        trunk = self.model(input_ids_BS, positions, cache=cache)
        cache.close(num_new)
        return self.lm_head.logits(trunk.hidden_BSD[:, -1])

    def new_cache(self) -> KVCache:
        """An empty cache of one row."""
        return KVCache([layer.self_attn.kept for layer in self.model.layers])

    def forward(
        self,
        input_ids: paddle.Tensor,
        attention_mask: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        segment_ids: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """fp32 logits [B, S, V].

        `attention_mask` [B, S] is 1 for real tokens; `segment_ids` [B, S] numbers packed documents from 1 (0 =
        padding), which never see each other. Positions count from 0 in each document unless `position_ids` says
        otherwise.
        """
        if attention_mask is not None and segment_ids is not None:
            raise ValueError("give attention_mask or segment_ids, not both: segment_ids marks padding with 0")
        b, s = input_ids.shape
        count = paddle.arange(s, dtype="int64").unsqueeze(0).expand([b, s])
        if segment_ids is not None:
            end_rows = end_rows_from_segments(segment_ids)
            count = positions_in_segments(segment_ids)
        elif attention_mask is not None:
            end_rows = end_rows_from_mask(attention_mask)
        else:
            end_rows = paddle.full([b, s], s, dtype="int32")
        positions = Positions.of(count if position_ids is None else position_ids, end_rows, self.config)
        return self.lm_head.logits(self.model(input_ids, positions).hidden_BSD)

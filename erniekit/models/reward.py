"""A reward model: the decoder of a language model and, in the place of its head, one number for each position.

The number at the last token of an answer is the answer's reward. Names as in transformers' sequence classification:
`model.*` and `score.weight`. Shapes: B batch, S positions, D hidden size, M rows.
"""

from __future__ import annotations

import paddle
from paddle import nn

from erniekit.config.architecture import ErnieConfig
from erniekit.models.attention import Positions
from erniekit.models.decoder import Decoder, Trunk
from erniekit.models.layers import Linear


class ErnieForReward(nn.Layer):
    """`config` has `is_reward`; parameters start at zero and are filled from a checkpoint."""

    def __init__(self, config: ErnieConfig, *, dtype: str = "float32") -> None:
        super().__init__()
        assert config.is_reward, "this architecture is a language model's"
        self.config = config
        self.model = Decoder(config, dtype=dtype)
        self.score = Linear(config.hidden_size, 1, bias=False, dtype=dtype)

    def trunk(
        self, input_ids_BS: paddle.Tensor, position_ids_BS: paddle.Tensor, end_rows_BS: paddle.Tensor
    ) -> Trunk:  # fmt: skip
        """The forward up to the score."""
        return self.model(input_ids_BS, Positions.of(position_ids_BS, end_rows_BS, self.config))

    def rewards(self, hidden_MD: paddle.Tensor) -> paddle.Tensor:
        """fp32 rewards [M]."""
        return self.score(hidden_MD).squeeze(-1).astype("float32")

"""What one rank of a layout holds of the dimensions that are cut: attention heads, widths, the vocabulary, experts.

Plain arithmetic that the checkpoint's map, the budget and the model's shards have in common.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from erniekit.config.architecture import ErnieConfig
from erniekit.config.layout import Coordinates, Layout


@dataclass(frozen=True)
class Cut:
    """A rank's share of everything; of one rank, the whole. Divisions that leave a rest are our mistake here."""

    layout: Layout = field(default_factory=Layout)
    at: Coordinates = field(default_factory=lambda: Layout().coordinates(0))

    @classmethod
    def of(cls, layout: Layout, rank: int) -> Cut:
        """What `rank` holds."""
        return cls(layout, layout.coordinates(rank))

    def part(self, total: int) -> slice:
        """Its part of query heads, of an MLP's width or of the vocabulary, which the tensor ranks share."""
        return _part(total, self.layout.tensor, self.at.tensor)

    def kv_heads(self, total: int) -> slice:
        """Its key and value heads: those that its query heads attend to. Fewer than ranks: several hold the same."""
        ranks = self.layout.tensor
        if total >= ranks:
            return self.part(total)
        assert ranks % total == 0, (total, ranks)
        head = self.at.tensor * total // ranks
        return slice(head, head + 1)

    def experts(self, total: int) -> range:
        """Its routed experts."""
        held = _part(total, self.layout.expert, self.at.expert)
        return range(held.start, held.stop)

    def expert_part(self, total: int) -> slice:
        """Its part of the width of an expert: experts that the tensor ranks share are whole."""
        return slice(0, total) if self.layout.experts_over == "tensor" else self.part(total)

    def heads_of(self, cfg: ErnieConfig) -> tuple[int, int]:
        """How many query heads and key heads it has."""
        return size(self.part(cfg.num_attention_heads)), size(self.kv_heads(cfg.num_key_value_heads))


def _part(total: int, ranks: int, index: int) -> slice:
    assert total % ranks == 0, (total, ranks)
    each = total // ranks
    return slice(index * each, (index + 1) * each)


def size(held: slice) -> int:
    """How many things a part is."""
    return held.stop - held.start


WHOLE = Cut()

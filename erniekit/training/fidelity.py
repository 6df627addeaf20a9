"""How near a model's predictions stay to those of another: mean KL divergence, and how often both find the same token
the likeliest. And what a quantised folder costs and saves.

The two models are never in memory together: of the reference its last hidden states on the eval set stay, a row of fp32
for each trained token, and its head, which makes every log-probability of the vocabulary again when it is asked. So the
divergence is exact, over the whole vocabulary, and costs tokens x hidden size of memory, not tokens x vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F

from erniekit.base import resources
from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError, ConfigError
from erniekit.checkpoint.download import locate_model
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.load import answering_bytes, load_for_answers
from erniekit.checkpoint.quantised_figures import layer_errors, report_of, size_figures
from erniekit.checkpoint.quantised_folder import QuantisedFolder
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.run import RunConfig
from erniekit.data.build import EvalData
from erniekit.models.decoder import ErnieForCausalLM, Head
from erniekit.ops.attention import end_rows_from_segments
from erniekit.parallel.mesh import Mesh
from erniekit.precision.packed import packed_weights
from erniekit.precision.stored import StoredCodes

_TOKENS = 256  # whose log-probabilities are there at a time, twice


@dataclass(frozen=True)
class Rows:
    """The batches of an eval set that this rank looks at: of every source `most` (-1: all), in order."""

    data: EvalData
    batch_size: int
    most: int
    mesh: Mesh

    def hidden(self, model: ErnieForCausalLM) -> Iterator[tuple[paddle.Tensor, bool]]:
        """The last hidden states [M, D] at the trained positions of each batch, and whether it counts."""
        at = self.mesh.axis("data")
        for source in range(len(self.data.source_names)):
            batches = self.data.batches(self.batch_size, source=source, index=at.index, parts=at.size)
            for count, batch in enumerate(batches):
                if 0 < self.most <= count:
                    break
                ids, positions = paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.position_ids)
                trunk = model.trunk(ids, positions, end_rows_from_segments(paddle.to_tensor(batch.segment_ids)))
                trained = paddle.to_tensor(np.flatnonzero(batch.labels.reshape(-1) >= 0))
                yield trunk.hidden_BSD.flatten(0, 1)[trained], batch.counts


class Reference:
    """What remains of a model: its last hidden states on `rows`, and its head."""

    def __init__(self, model: ErnieForCausalLM, rows: Rows) -> None:
        model.eval()
        with paddle.no_grad():
            self.states = [hidden_MD for hidden_MD, _ in rows.hidden(model)]
        self.head: Head = model.lm_head
        self._rows = rows

    @paddle.no_grad()
    def against(self, model: ErnieForCausalLM) -> dict[str, float]:
        """eval_kl: the mean over trained tokens of KL(reference || model), in nats; eval_same_best_token: the share of
        them for which both find the same token the likeliest. All ranks call this."""
        model.eval()
        divergence, same, tokens = 0.0, 0.0, 0.0
        for theirs_MD, (mine_MD, counts) in zip(self.states, self._rows.hidden(model), strict=True):
            if not counts:
                continue
            tokens += len(mine_MD)
            for start in range(0, len(mine_MD), _TOKENS):
                part = slice(start, start + _TOKENS)
                exact_MV = F.log_softmax(self.head.logits(theirs_MD[part]), axis=-1)
                found_MV = F.log_softmax(model.lm_head.logits(mine_MD[part]), axis=-1)
                terms_M = (paddle.exp(exact_MV) * (exact_MV - found_MV)).sum(-1)
                divergence += float(terms_M.astype("float64").sum())
                same += int((exact_MV.argmax(-1) == found_MV.argmax(-1)).astype("int64").sum())
        divergence, same, tokens = self._over_ranks([divergence, same, tokens])
        return {"eval_kl": divergence / max(tokens, 1), "eval_same_best_token": same / max(tokens, 1)}

    def _over_ranks(self, sums: list[float]) -> list[float]:
        data = self._rows.mesh.axis("data")
        if data.size == 1:
            return sums
        self._rows.mesh.meet("compared")
        return data.all_reduce(paddle.to_tensor(sums, "float64")).tolist()


# ---------------------------------------------------------------------- of a model to evaluate
def reference_of(folder: Folder, cfg: RunConfig, asked: str | None, *, mesh: Mesh) -> Folder | None:
    """The high-precision folder with which `folder` is to be compared: the one that is asked for, else the one that a
    quantised folder was made from, if it is here and fits in memory. Raises an error if they cannot be compared. All
    ranks call this."""
    preferences = cfg.model.stage in PREFERENCE_STAGES
    if asked == "none" or (asked is None and preferences):
        return None
    if preferences:
        raise ConfigError(f"--reference compares predictions of the next token; stage {cfg.model.stage} has none.")
    found = Folder.open(locate_model(asked, cfg.model.download_hub)) if asked else _origin(folder, mesh=mesh)
    if found is None:
        return None
    if found.config.vocab_size != folder.config.vocab_size:
        raise CheckpointError(
            f"{found.path}: is no reference for {folder.path}: its vocabulary has {found.config.vocab_size} tokens, "
            f"not {folder.config.vocab_size}."
        )
    return found


def _origin(folder: Folder, *, mesh: Mesh) -> Folder | None:
    """The folder that a quantised one was made from, where every machine has it and memory for it."""
    report = report_of(folder) if isinstance(folder, QuantisedFolder) else None
    origin = Path(report.model) if report and report.model else None
    here = origin is not None and (origin / "config.json").is_file()
    if not all(mesh.words.collect("the origin", here)):
        if origin:
            notice(f"not compared with {origin}, from which it was made: it is gone; --reference DIR compares with DIR")
        return None
    assert origin is not None
    found = Folder.open(origin)
    needed, offered = _memory(mesh, answering_bytes(found, mesh=mesh))
    takes = f"{found.path}, from which it was made (in memory {needed / 1e6:,.1f} MB"
    if needed > offered:
        notice(f"not compared with {takes}, and {offered / 1e6:,.1f} are free); --reference DIR compares with DIR")
        return None
    notice(f"compared with {takes}); --reference none compares with nothing")
    return found


def _memory(mesh: Mesh, needed: int) -> tuple[int, int]:
    """Bytes that all ranks need and those that are free, where it is tightest: on one machine, or (not run) GPU. The
    same on all ranks."""
    place, offered = platform.node(), resources.memory()[1]
    if gpus := resources.gpus() if paddle.device.is_compiled_with_cuda() else []:
        place, offered = f"GPU of rank {mesh.rank}", max(gpu.num_bytes for gpu in gpus)
    told = mesh.words.collect("memory", [place, needed, offered])
    found = []
    for where in {place for place, _, _ in told}:
        here = [sizes for place, *sizes in told if place == where]
        found.append((sum(wants for wants, _ in here), min(free for _, free in here)))
    return max(found, key=lambda sizes: sizes[0] - sizes[1])


def kept_of(reference: Folder, rows: Rows) -> Reference:
    """What remains of the reference's model; the rest is let go before another model is loaded."""
    return Reference(load_for_answers(reference.path, mesh=rows.mesh), rows)


def quantised_figures(folder: Folder, model: ErnieForCausalLM, reference: Folder | None) -> dict[str, float]:
    """Size and errors of a quantised folder, and what its model takes in memory (on this rank)."""
    if not isinstance(folder, QuantisedFolder):
        return {}
    held = sum(int(p.size) * p.element_size() for p in model.parameters())
    stores = [layer.store for layer in packed_weights(model).values()]
    held += sum(store.num_bytes() for store in stores if isinstance(store, StoredCodes))
    return {**size_figures(folder), "memory_bytes": held, **layer_errors(folder, reference)}

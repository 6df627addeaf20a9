"""What is measured on held-out preferences, over all of them and over each of their sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from erniekit.data.batch import Batch, PreferenceBatch
from erniekit.data.build import EvalData
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.evaluate import short_names
from erniekit.training.preference import PreferenceObjective

_FIGURES = {
    "DPO": ("loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected"),
    "KTO": ("loss", "accuracy", "kl"),
    "RM": ("loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected"),
}  # fmt: skip
_OF_EACH_SOURCE = ("loss", "accuracy", "margin")


def preference_figures(stage: str, sources: Sequence[str]) -> list[str]:
    """The names of the figures that every evaluation of these sources gives."""
    own = short_names(sources) if len(sources) > 1 else []
    names = _FIGURES[stage]
    return [
        *(f"eval_{name}" for name in names),
        *(f"eval_{name}/{source}" for name in _OF_EACH_SOURCE if name in names for source in own),
    ]


def held_out(
    data: EvalData, *, batch_size: int, max_batches: int = -1, mesh: Mesh = Mesh.single()
) -> list[Iterator[PreferenceBatch]]:
    """The batches of each source that this rank measures: the first `max_batches` if that is positive."""
    most, at = max_batches if max_batches > 0 else None, mesh.axis("data")
    shares = [
        data.batches(batch_size, source=source, index=at.index, parts=at.size)
        for source in range(len(data.source_names))
    ]
    return [preferences(itertools.islice(share, most)) for share in shares]


def preferences(batches: Iterable[Batch]) -> Iterator[PreferenceBatch]:
    """The same batches, known to be made of preferences."""
    for batch in batches:
        assert isinstance(batch, PreferenceBatch), "data of this stage is made of preferences"
        yield batch


def measure_preferences(
    objective: PreferenceObjective, model: ErnieForCausalLM, data: EvalData, *, batch_size: int, max_batches: int = -1
) -> dict[str, float]:
    """The figures over all of `data`; with several sources loss, accuracy and margin of each as well."""
    batches = held_out(data, batch_size=batch_size, max_batches=max_batches, mesh=objective.mesh)
    whole, *each = objective.measure(model, batches)
    named = zip(short_names(data.source_names), each, strict=True) if len(each) > 1 else ()
    return whole | {
        f"eval_{name}/{short}": figures[f"eval_{name}"]
        for short, figures in named for name in _OF_EACH_SOURCE if f"eval_{name}" in figures
    }  # fmt: skip

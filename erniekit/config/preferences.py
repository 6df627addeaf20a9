"""What holds between the keys of preference training."""

from __future__ import annotations

from collections.abc import Iterator

from erniekit.config.align import ON_THE_MARGIN, REFERENCE_FREE, SMOOTHED
from erniekit.config.run import RunConfig

Finding = tuple[tuple[str, ...], str]  # the keys it is about, and what is wrong


def preference_problems(config: RunConfig) -> Iterator[Finding]:
    """Contradictions between the loss and the other keys."""
    keys, stage = config.align, config.model.stage
    if stage == "KTO" and keys.reference_free:
        yield ("reference_free", "stage"), "reference_free: stage KTO needs a reference; leave reference_free out"
    if stage != "DPO":
        return
    loss, place = keys.loss_type, config.origins["loss_type"]
    if keys.reference_free and keys.needs_reference:
        yield ("reference_free", "loss_type"), (
            f"reference_free: the loss {loss} ({place}) needs a reference. Leave reference_free out, or choose a loss "
            f"without one: {', '.join(REFERENCE_FREE)}"
        )
    e = keys.label_smoothing
    if loss == "exo" and not 0 < e < 1:
        yield ("label_smoothing", "loss_type"), (
            f"label_smoothing is {e:g}: the loss exo ({place}) needs a value between 0 and 1; its paper takes 0.001"
        )
    if loss == "robust" and e >= 0.5:
        yield ("label_smoothing", "loss_type"), (
            f"label_smoothing is {e:g}: the loss robust ({place}) needs less than 0.5, its estimate of the share of "
            "pairs that are labelled wrongly"
        )
    for name, losses in (("label_smoothing", SMOOTHED), ("offset_alpha", ON_THE_MARGIN)):
        if config.value(name) and loss not in losses:
            yield (name, "loss_type"), (
                f"{name} is {config.value(name):g}: the loss {loss} ({place}) does not know it, {', '.join(losses)} "
                f"do. Set {name}=0 or choose one of these"
            )

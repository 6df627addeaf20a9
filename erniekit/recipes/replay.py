"""`replay`: takes a step that was kept once more, forward and backward, and says where the trouble arises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import paddle

from erniekit.checkpoint.download import locate_model
from erniekit.checkpoint.folder import Folder
from erniekit.config.architecture import ErnieConfig
from erniekit.config.load import load_config
from erniekit.config.model import PREFERENCE_STAGES
from erniekit.config.run import RunConfig
from erniekit.data.batch import Batch
from erniekit.data.tokenizer import Tokenizer
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.training.assemble import architecture, assemble_fp8, loss_weights, step_hooks
from erniekit.training.objective import LanguageModelObjective
from erniekit.training.preference import preference_objective
from erniekit.training.probe import Probe, Seen, Size, broken_weights
from erniekit.training.replay import CONFIG_FILE, Kept, read_kept
from erniekit.training.step import Objective, Totals
from erniekit.training.weights import weights_of

_BEFORE, _AFTER = 24, 12  # tokens of a sample that are shown around a place


@dataclass(frozen=True)
class Finding:
    """Where the trouble arises: a layer, in which direction, and in which micro-batch."""

    layer: str
    direction: str  # forward or backward
    finite: bool
    micro_batch: int
    size: Size


def replay(folder: str | Path) -> Finding | None:
    """Repeat the step kept in `folder` and print what is found; returns the first value that is not finite, or the
    largest activation or gradient. Raises ErnieKitError if `folder` holds no kept step."""
    folder = Path(folder)
    kept = read_kept(folder)
    cfg = load_config(folder / CONFIG_FILE, ["recompute=false"])  # recomputing would run every layer twice
    base = Folder.open(folder if cfg.model.fine_tuning == "Full" else _base_of(cfg))
    tokenizer = Tokenizer.from_folder(base.path)
    arch = architecture(base, cfg)
    model = weights_of(cfg, base, arch).build(folder)
    fp8 = assemble_fp8(model, cfg)
    if fp8 and fp8.memory:
        fp8.memory.load_state(kept.scales)
    model.train()
    paddle.seed(kept.seed * 1_000_003 + kept.step)
    for prepare in step_hooks(model, cfg):
        prepare(kept.step)
    print(f"step {kept.step + 1} was kept: {kept.reason}")
    for line in broken_weights(model) or ["all weights are finite"]:
        print(f"  {line}")
    objective = _objective(cfg, arch, kept)
    totals = Totals.of(kept.batches, row_length=cfg.data.max_seq_len)
    objective.begin(model, kept.batches)
    passes = [_pass(model, batch, objective, totals) for batch in kept.batches]
    losses = [loss for loss, _ in passes]
    print(f"  its loss: {math.fsum(losses):.6g}; of each micro-batch: {', '.join(f'{loss:.6g}' for loss in losses)}")
    probes = [probe for _, probe in passes]
    found = first_broken(probes) or largest(probes)
    if found is not None:
        _print_layers(probes[found.micro_batch].seen, number=found.micro_batch)
        _print_finding(found, kept, tokenizer)
    return found


def _base_of(cfg: RunConfig) -> str | Path:
    """Where the model is that adapters stand on: a step is kept without it."""
    return locate_model(cfg.model.model_name_or_path or "", cfg.model.download_hub)


def _objective(cfg: RunConfig, arch: ErnieConfig, kept: Kept) -> Objective:
    if cfg.model.stage not in PREFERENCE_STAGES:
        return LanguageModelObjective(loss_weights(arch, cfg))
    known = {id(batch): logps for batch, logps in zip(kept.batches, kept.reference, strict=False)}
    reference = (lambda _, batch: paddle.to_tensor(known[id(batch)])) if known else None
    return preference_objective(cfg.model.stage, cfg.align, loss_weights(arch, cfg), reference=reference)


def _pass(model: ErnieForCausalLM, batch: Batch, objective: Objective, totals: Totals) -> tuple[float, Probe]:
    with Probe(model, positions=batch.input_ids.size) as probe:
        made = objective(model, batch, totals)
        made.total.backward()
    return float(made.total), probe


def first_broken(probes: list[Probe]) -> Finding | None:
    """The first value that is not finite, in the order of computing; None if there is none."""
    for number, probe in enumerate(probes):
        for seen in probe.seen:
            if not seen.output.finite:
                return Finding(seen.layer, "forward", False, number, seen.output)
        for seen in probe.back:
            if seen.gradient is not None and not seen.gradient.finite:
                return Finding(seen.layer, "backward", False, number, seen.gradient)
    return None


def largest(probes: list[Probe]) -> Finding | None:
    """The layer with the largest activations by their root mean square."""
    sizes = [
        Finding(seen.layer, "forward", True, number, seen.output)
        for number, probe in enumerate(probes)
        for seen in probe.seen
    ]
    return max(sizes, key=lambda finding: finding.size.rms, default=None)


def _print_layers(seen: list[Seen], *, number: int) -> None:
    print(f"\nmicro-batch {number}, layer by layer: largest and root mean square of activations and gradients")
    width = max(len(one.layer) for one in seen)
    for one in seen:
        back = _columns(one.gradient) if one.gradient else f"{'-':>10} {'-':>10}"
        mark = "" if one.gradient is None or one.gradient.finite else "  <- gradient not finite"
        mark = mark if one.output.finite else "  <- not finite"
        print(f"  {one.layer:{width}} {_columns(one.output)} {back}{mark}")


def _columns(size: Size) -> str:
    return f"{size.largest:10.3e} {size.rms:10.3e}"


def _print_finding(found: Finding, kept: Kept, tokenizer: Tokenizer) -> None:
    what = "largest activations" if found.finite else "first value that is not finite"
    verb = "are" if found.finite else "arises"
    passing = "" if found.finite else f", {found.direction}"
    print(f"\nThe {what} {verb} in {found.layer}{passing}, micro-batch {found.micro_batch}")
    if found.size.place is None:
        names = [name for row in kept.samples[found.micro_batch] for name in row]
        print(f"  samples of this micro-batch: {', '.join(names[:8])}")
        return
    batch = kept.batches[found.micro_batch]
    row, position = divmod(found.size.place, batch.input_ids.shape[1])
    segment = int(batch.segment_ids[row, position])
    if not segment:
        print(f"  row {row}, position {position}: padding")
        return
    span = [
        int(token)
        for at, token in enumerate(batch.input_ids[row])
        if position - _BEFORE <= at <= position + _AFTER and batch.segment_ids[row, at] == segment
    ]
    print(f"  row {row}, position {position}, sample {kept.samples[found.micro_batch][row][segment - 1]}")
    print(f"  around it: {tokenizer.decode(span)!r}")

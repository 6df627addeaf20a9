"""Which layouts a run may have: what its degrees ask for, and everything that they contradict.

`contradictions` needs the file alone, and `check` reports it; `world_misfits` knows how many ranks there are as well,
`optimizer_misfits` how many of them share states, and `model_misfits` the model's architecture. Nothing here changes a
setting: what degrees leave open is filled in by layout.layout_of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erniekit.config.values import text_of

if TYPE_CHECKING:
    from erniekit.config.architecture import ErnieConfig
    from erniekit.config.layout import Layout
    from erniekit.config.run import RunConfig

_STAGES = {"stage1": 1, "stage2": 2, "stage3": 3}


@dataclass(frozen=True)
class Degrees:
    """What the keys ask for; None stands for all ranks with rows of their own."""

    tensor: int
    sharding: int | None
    expert: int | None  # along the data axis
    stage: int
    experts_over_tensor: bool

    @property
    def least_ranks(self) -> int:
        """The smallest number of ranks that they allow; every multiple of it is allowed, too."""
        return self.tensor * math.lcm(self.sharding or 1, self.expert or 1)


def degrees_of(cfg: RunConfig, *, sparse: bool = True, verb: str = "train") -> Degrees:
    """What the keys of a run ask for; `sparse`: whether its model has experts to be shared. Only training shards."""
    parallel, tensor = cfg.parallel, max(cfg.parallel.tensor_parallel_degree, 1)
    stage = _STAGES.get(parallel.sharding or "", 0) if verb == "train" else 0
    sharding = None if parallel.sharding_parallel_degree == -1 else max(parallel.sharding_parallel_degree, 1)
    expert: int | None = max(parallel.expert_parallel_degree, 1)
    over_tensor = parallel.moe_group == "mp"
    if over_tensor:
        expert = 1
    elif expert == 1 and (parallel.use_expert_parallel or parallel.moe_group == "data"):
        expert = None
    if not sparse:
        expert = 1
    return Degrees(tensor, sharding if stage else 1, expert, stage, over_tensor and sparse and tensor > 1)


# ---------------------------------------------------------------------- what the file alone says
def contradictions(cfg: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Degrees that exclude each other, each with the keys concerned."""
    parallel, asked = cfg.parallel, degrees_of(cfg)
    expert = parallel.expert_parallel_degree
    if parallel.moe_group == "mp" and expert > 1 and expert != asked.tensor:
        yield ("moe_group", "expert_parallel_degree", "tensor_parallel_degree"), (
            f"{quote(cfg, 'moe_group')} shares the experts between the {asked.tensor} devices of "
            f"{quote(cfg, 'tensor_parallel_degree')}, and {quote(cfg, 'expert_parallel_degree')} between {expert}; "
            "delete expert_parallel_degree, or set moe_group=dummy to share them between devices with rows of their own"
        )
    both = (asked.expert or 1, asked.sharding or 1)
    if math.gcd(*both) != min(both):
        yield ("expert_parallel_degree", "sharding_parallel_degree"), (
            f"{quote(cfg, 'expert_parallel_degree')} and {quote(cfg, 'sharding_parallel_degree')} group the same "
            "devices; make one of them a multiple of the other"
        )


# ---------------------------------------------------------------------- what only the place of the run says
def world_misfits(cfg: RunConfig, world: int, *, verb: str = "train", cards: int = 0) -> Iterator[str]:
    """Whether so many ranks can be laid out as the degrees ask; `cards`: the GPUs of this machine, if it has any."""
    asked = degrees_of(cfg, verb=verb)
    if verb == "train" and cfg.parallel.sharding_parallel_degree > 1 and not asked.stage:
        yield (
            f"{quote(cfg, 'sharding_parallel_degree')} does not say what is sharded, and {quote(cfg, 'sharding')}; set "
            "sharding=stage1 (optimizer states), stage2 or stage3, or sharding_parallel_degree=1"
        )
    if world % asked.least_ranks == 0:
        return
    names = [
        name
        for name, size in (
            ("tensor_parallel_degree", asked.tensor), ("sharding_parallel_degree", asked.sharding),
            ("expert_parallel_degree", asked.expert),
        )
        if size is not None and size > 1
    ]  # fmt: skip
    keys, alone = " and ".join(quote(cfg, name) for name in names), ", ".join(f"{name}=1" for name in names)
    needs = asked.least_ranks
    need = "needs" if len(names) == 1 else "need"
    if 0 < cards < needs and world < needs:
        yield (
            f"{keys} {need} {needs} devices, and this machine shows {cards}. Start the command on "
            f"{-(-needs // cards)} like it (NNODES and NODE_RANK, see docs/parallel.md), or set {alone}"
        )
    elif world == 1:
        yield (
            f"{keys} {need} {needs} devices, and this is one process. Start {needs} of them: erniekit {verb} "
            f"{cfg.path or 'CFG'} --nproc {needs}; or set {alone}"
        )
    else:
        near = " or ".join(str(count) for count in (world // needs * needs, world // needs * needs + needs) if count)
        yield (
            f"{keys} {need} {needs} ranks or a multiple of that, and there are {world}; start {near} (--nproc on each "
            f"of NNODES machines), or set {alone}"
        )


def model_misfits(cfg: RunConfig, arch: ErnieConfig, data: int) -> Iterator[str]:
    """What of the model cannot be cut as the degrees ask, with `data` ranks that have rows of their own."""
    asked = degrees_of(cfg, sparse=arch.is_moe)
    uneven = _uneven(arch, asked.tensor, experts=asked.experts_over_tensor)
    if uneven:
        fitting = [str(n) for n in range(1, 65) if not _uneven(arch, n, experts=asked.experts_over_tensor)]
        yield (
            f"{quote(cfg, 'tensor_parallel_degree')}: {asked.tensor} devices cannot share evenly the model's "
            f"{', '.join(uneven)}; degrees that fit it: {', '.join(fitting)}{_larger_vocabulary(arch, asked.tensor)}"
        )
    if not arch.is_moe:
        if cfg.parallel.expert_parallel_degree > 1:
            yield f"{quote(cfg, 'expert_parallel_degree')}: the model has no experts to share; delete the key"
        return
    over, total = asked.expert or data, text_value(arch.moe_num_experts)
    if total % over:
        by = "moe_group" if cfg.parallel.moe_group == "data" else "use_expert_parallel"
        yield (
            f"{quote(cfg, 'expert_parallel_degree' if asked.expert else by)}: {over} devices cannot share evenly the "
            f"model's {total} experts; values that go with {data} ranks: {_divisors(math.gcd(data, total))}"
        )


def devices_text(cfg: RunConfig, degrees: Iterable[str]) -> str:
    """How many devices the `degrees` that a file sets ask for together, "" if it asks for one."""
    asked = {name: cfg.value(name) for name in degrees if cfg.value(name) > 1}
    data = math.lcm(*(asked.pop(name, 1) for name in ("sharding_parallel_degree", "expert_parallel_degree")))
    least = math.prod(asked.values()) * data
    if least == 1:
        return ""
    factors = [f"{name} {size}" for name, size in asked.items()] + [f"{data} with other rows"] * (data > 1)
    machines = f", {-(-least // 8)} machines of 8" if least > 8 else ""
    return f"{least} at least ({' x '.join(factors)}){machines}; any multiple, to see more rows in a step"


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)


def _larger_vocabulary(arch: ErnieConfig, ranks: int) -> str:
    return f" (resize-vocab --pad-to-multiple {ranks} enlarges a vocabulary)" if arch.vocab_size % ranks else ""


def _uneven(arch: ErnieConfig, ranks: int, *, experts: bool) -> list[str]:
    """The dimensions of a model that so many tensor ranks cannot share evenly; `experts`: they share these, too."""
    width = text_value(arch.moe_intermediate_size)
    sizes = {
        "attention heads": arch.num_attention_heads,
        "words (vocab_size)": arch.vocab_size,
        "width of MLPs (intermediate_size)": arch.intermediate_size,
        "width of shared experts": arch.shared_intermediate_size,
        "experts": text_value(arch.moe_num_experts) if experts else 0,
        "width of experts (moe_intermediate_size)": 0 if experts else width,
    }
    if len(arch.moe_layers) == arch.num_hidden_layers:
        del sizes["width of MLPs (intermediate_size)"]
    found = [f"{total} {name}" for name, total in sizes.items() if total % ranks]
    heads = arch.num_key_value_heads  # fewer than ranks: several ranks hold the same
    return [*found, f"{heads} key and value heads"] if heads % ranks and ranks % heads else found


def text_value(value: int | tuple[int, int]) -> int:
    """Of a pair, what counts for text."""
    return value if isinstance(value, int) else value[0]


def optimizer_misfits(cfg: RunConfig, shards: int) -> Iterator[str]:
    """What needs whole matrices, where ranks hold parts; `shards` hold parts of the states."""
    names = []
    if degrees_of(cfg).tensor > 1:
        names.append("tensor_parallel_degree")
    if shards > 1:
        names.append("sharding")
    if cfg.optimizer.optim == "muon" and names:
        yield (
            f"{quote(cfg, 'optim')} orthogonalises whole matrices, of which devices hold parts with "
            f"{' and '.join(quote(cfg, name) for name in names)}; set optim=adamw, or "
            f"{' and '.join(_off(name) for name in names)}"
        )
    if shards > 1 and cfg.parallel.sharding == "stage3":
        yield from _copies(cfg)


def _off(name: str) -> str:
    return "sharding=null" if name == "sharding" else f"{name}=1"


def _copies(cfg: RunConfig) -> Iterator[str]:
    """References that put other weights in the place of the trained ones, which lie in parts at stage 3."""
    if not cfg.align.compares(cfg.model.stage):
        return
    adapted, at_fault = cfg.model.fine_tuning == "LoRA", dict[str, str]()
    if cfg.align.ref_model_update_steps > 0:
        at_fault["ref_model_update_steps"] = "ref_model_update_steps=-1"
    if adapted and cfg.lora.lora_path:
        at_fault["lora_path"] = "lora_path=null"
    if adapted and cfg.lora.modules_to_save:
        at_fault["modules_to_save"] = "modules_to_save=null"
    for name, way_out in at_fault.items():
        yield (
            f"{quote(cfg, name)} makes the reference from a copy of weights, of which devices hold parts with "
            f"{quote(cfg, 'sharding')}; set sharding=stage2, or {way_out}"
        )


# ---------------------------------------------------------------------- what is to be told
def idle(cfg: RunConfig, layout: Layout) -> str:
    """A sentence about keys that ask for something to be shared where nobody is there to share it; empty if all do."""
    parallel = cfg.parallel
    without = {
        "sharding": parallel.sharding is not None and layout.sharding == 1,
        "sequence_parallel": parallel.sequence_parallel and layout.tensor == 1,
    }
    named = [quote(cfg, name) for name, is_idle in without.items() if is_idle]
    if not named:
        return ""
    ranks = "one rank" if layout.world == 1 else f"{layout.world} ranks laid out so"
    return f"on {ranks} nothing is shared by {' and '.join(named)}"


def quote(cfg: RunConfig, name: str) -> str:
    """A key with its value and where that stands."""
    return f"{name}: {text_of(cfg.value(name))} ({cfg.origins[name]})"

"""The form of quantised folders: which weight is kept in which format, under which names, and what config.json says.

Names and nesting are those that FastDeploy reads from published "-Paddle" folders: the tensors of that layout (q|k|v
and gate|up fused on the out axis, [in, out]), `X.weight` replaced by `X.quant_weight`, `X.weight_scale` and what else
the format has; `X.activation_scale` where inputs are rounded too, and `cachek_matmul` and `cachev_matmul` in a layer's
attention for the cache of keys and values. Codes lie in plain order, not permuted for one GPU's kernels: the
`erniekit` part of quantization_config says so, and a folder without it is not read. docs/quantisation.md has every
field, and which of them public code confirms. Knows names and settings; the numbers are precision/encoders.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from erniekit.base.errors import CheckpointError, ConfigError, did_you_mean, listed
from erniekit.config.architecture import ErnieConfig
from erniekit.ops.arrays.float8 import E4M3
from erniekit.ops.arrays.hadamard import SIZE
from erniekit.precision.ccq import EFFORTS, Search, Wint2, Wint25
from erniekit.precision.encoders import (
    ACTIVATION_SCALE,
    BLOCK,
    W4A8,
    Encoder,
    Float8,
    Float8Blocks,
    Float8Qat,
    Integers,
)

QuantKind = Literal["wint8", "wint4", "w4a8", "fp8", "fp8_blocks", "fp8_rotated", "fp8_plain", "wint2", "wint2.5"]
QUANTIZATION, OURS, VERSION = "quantization_config", "erniekit", 1
CACHE_SCALES = ("cachek_matmul." + ACTIVATION_SCALE, "cachev_matmul." + ACTIVATION_SCALE)  # of keys, of values
PUBLISHED_LAYERS, PUBLISHED_INT4_LAYERS = 54, 7  # of ERNIE-4.5-300B-A47B-2Bits: layers 0 to 6 of 54 are int4
CCQ_GROUP = 64
TRAINED = ("fp8_rotated", "fp8_plain")  # codes and scales that quantisation-aware training computed with
ROUNDS_INPUTS = ("w4a8", "fp8", *TRAINED)  # kinds with a static activation scale
WEIGHS_ERRORS = ("wint2", "wint2.5")  # kinds whose encoder asks which inputs count most

_LAYER = re.compile(r"ernie\.(layers|mtp_block)\.(\d+)\.(.+)\.weight")
_ATTENTION = re.compile(r"self_attn\.(qkv|o)_proj")
_MLP = re.compile(r"mlp\.(shared_experts\.)?(up_gate|down)_proj")
_EXPERT = re.compile(r"mlp\.experts\.\d+\.(up_gate|down)_proj")
_MTP_PROJECTION = re.compile(r"ernie\.mtp_linear_proj\.\d+\.weight")


@dataclass(frozen=True)
class Format:
    """A word behind --quantize. `experts` is the kind of routed experts (of MLPs, in a model without), `early` theirs
    in the first layers, `dense` that of all other linear layers."""

    name: str
    dense: QuantKind
    experts: QuantKind
    early: QuantKind | None = None
    int8_cache: bool = False
    groups: bool = False  # takes a group size


FORMATS = {
    form.name: form
    for form in (
        Format("wint8", "wint8", "wint8", groups=True),
        Format("wint4", "wint4", "wint4", groups=True),
        Format("w4a8", "wint8", "w4a8"),
        Format("w4a8c8", "wint8", "w4a8", int8_cache=True),
        Format("fp8", "fp8", "fp8", groups=True),
        Format("wint2", "wint8", "wint2", early="wint4"),
        Format("wint2.5", "wint8", "wint2.5", early="wint4"),
    )
}


def format_of(name: str) -> Format:
    """The format behind a word. Raises ConfigError if there is none."""
    if name not in FORMATS:
        near = did_you_mean(name, FORMATS)
        raise ConfigError(f"--quantize: '{name}' is not known.{near} Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


_ENCODERS: dict[QuantKind, Callable[[int | None], Encoder]] = {
    "wint8": lambda group_size: Integers("int8", group_size),
    "wint4": lambda group_size: Integers("int4", group_size),
    "w4a8": lambda _group_size: W4A8(),
    "fp8": lambda _group_size: Float8(),
    "fp8_blocks": lambda _group_size: Float8Blocks(),
    "fp8_rotated": lambda _group_size: Float8Qat(rotated=True),
    "fp8_plain": lambda _group_size: Float8Qat(rotated=False),
    "wint2.5": lambda _group_size: Wint25(),
}


def encoder_of(kind: QuantKind, *, group_size: int | None = None, search: Search = "full") -> Encoder:
    """The encoder of a kind; a group size is for wint8 and wint4, `search` for wint2."""
    return Wint2(search) if kind == "wint2" else _ENCODERS[kind](group_size)


@dataclass(frozen=True)
class Scheme:
    """A format as it is applied to one model."""

    format: Format
    group_size: int | None = None  # of wint8 and wint4; 128: fp8 by blocks
    int4_layers: int = 0  # the first layers, whose experts have the kind `early`
    sparse: bool = True  # whether the model has experts
    num_layers: int = 0
    search: Search = "full"  # of wint2: how long its encoder looks; the folder does not tell
    trained: QuantKind | None = None  # one of TRAINED: fp8 as a run of quantisation-aware training computed

    @classmethod
    def new(
        cls, name: str, cfg: ErnieConfig, *, group_size: int | None = None, int4_layers: int | None = None,
        search: str | None = None,
    ) -> Scheme:  # fmt: skip
        """The format `name` for a model. Raises ConfigError for what is unknown or does not belong to it."""
        form, layers = format_of(name), cfg.num_hidden_layers
        if group_size is not None and not form.groups:
            takers = ", ".join(known.name for known in FORMATS.values() if known.groups)
            raise ConfigError(f"--group-size is for {takers}; {name} has scales of its own. Leave it out.")
        if group_size is not None and name == "fp8" and group_size != BLOCK:
            raise ConfigError(
                f"--group-size {group_size}: fp8 has one scale for a weight, or with {BLOCK} one for every "
                f"{BLOCK} x {BLOCK} numbers."
            )
        if group_size is not None and group_size < 2:
            raise ConfigError(f"--group-size {group_size}: a group has at least 2 inputs.")
        if int4_layers is not None and form.early is None:
            raise ConfigError(f"--int4-layers is for wint2 and wint2.5; {name} treats all layers alike. Leave it out.")
        if int4_layers is not None and not 0 <= int4_layers <= layers:
            raise ConfigError(f"--int4-layers {int4_layers}: the model has {layers} layers.")
        if search is not None and (name != "wint2" or search not in EFFORTS):
            raise ConfigError(f"--search {search}: wint2 has {' and '.join(EFFORTS)}; other formats have one search.")
        if form.early is None:
            early = 0
        elif int4_layers is None:
            early = max(round(layers * PUBLISHED_INT4_LAYERS / PUBLISHED_LAYERS), 1)
        else:
            early = int4_layers
        return cls(form, group_size, early, bool(cfg.is_moe), layers, "fast" if search == "fast" else "full")

    def kind_of(self, tensor: str) -> QuantKind | None:
        """The kind of a tensor in -Paddle layout; None: it stays as it is (embedding, head, router, norm, bias)."""
        kind = self._kind(tensor)
        if kind == "fp8" and self.trained:
            return None if _MTP_PROJECTION.fullmatch(tensor) else self.trained  # which training leaves as it is
        return "fp8_blocks" if kind == "fp8" and self.group_size else kind

    def _kind(self, tensor: str) -> QuantKind | None:
        form = self.format
        if _MTP_PROJECTION.fullmatch(tensor):
            return form.dense
        if not (match := _LAYER.fullmatch(tensor)):
            return None
        block, layer, module = match[1], int(match[2]), match[3]
        if _EXPERT.fullmatch(module) or (not self.sparse and _MLP.fullmatch(module)):
            is_early = block == "layers" and layer < self.int4_layers
            return form.early if is_early and form.early else form.experts
        return form.dense if _ATTENTION.fullmatch(module) or _MLP.fullmatch(module) else None

    def as_trained(self, *, rotated: bool) -> Scheme:
        """The scheme fp8 with the codes and scales that quantisation-aware training computed with."""
        return replace(self, trained="fp8_rotated" if rotated else "fp8_plain")

    def encoder_of(self, tensor: str) -> Encoder | None:
        """The encoder of a tensor; None: it stays as it is."""
        kind = self.kind_of(tensor)
        return encoder_of(kind, group_size=self.group_size, search=self.search) if kind else None

    @property
    def needs_text(self) -> bool:
        """Whether scales depend on what goes through the model."""
        if self.trained:
            return False
        kinds = {self.format.dense, self.format.experts}
        return self.format.int8_cache or (bool(kinds & {*ROUNDS_INPUTS}) and not self.group_size)

    @property
    def wants_text(self) -> bool:
        """Whether the search for codes is better with it."""
        return self.format.experts in WEIGHS_ERRORS

    def rounds_inputs(self, tensor: str) -> bool:
        """Whether the tensor's inputs have a static scale."""
        return self.kind_of(tensor) in ROUNDS_INPUTS

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConfigError naming every weight [in, out] whose inputs are no multiple of what its format needs."""
        wrong = []
        for name, shape in shapes.items():
            encoder = self.encoder_of(name)
            if encoder and shape[0] % encoder.multiple:
                wrong.append(f"{name} has {shape[0]}; {self.kind_of(name)} takes a multiple of {encoder.multiple}.")
        if wrong:
            way = "Take another format: wint8 and wint4 fit all."
            if self.group_size:
                other = f"Leave --group-size {BLOCK} out: one scale for a weight fits all."
                way = other if self.format.name == "fp8" else "Take another --group-size."
            head = f"{self.format.name} does not fit the inputs of {len(wrong)} weights. {way}"
            raise ConfigError([head, *listed(wrong, limit=4)])

    # ------------------------------------------------------------------ config.json
    def settings(self) -> dict[str, Any]:
        """What config.json says under quantization_config."""
        ours = {
            "version": VERSION, "format": self.format.name, "group_size": self.group_size,
            "int4_layers": self.int4_layers, "codes": "plain", "trained": self.trained,
        }  # fmt: skip
        return {**self._published(), "is_quantized": True, OURS: ours}

    def _published(self) -> dict[str, Any]:
        form = self.format
        if form.early:
            late = {"quant_type": form.experts, "quant_granularity": "pp_acc", "quant_group_size": CCQ_GROUP}
            return {
                "quantization": "wint2", "dense_quant_type": form.dense, "moe_quant_type": "w4w2",
                "moe_quant_config": {
                    "moe_w4_quant_config": {
                        "quant_type": form.early, "quant_granularity": "per_channel",
                        **_layers(0, self.int4_layers),
                    },
                    "moe_w2_quant_config": {**late, **_layers(self.int4_layers, self.num_layers)},
                },
            }  # fmt: skip
        if form.dense == form.experts != "fp8":
            return {"quantization": form.dense}
        fp8 = "block_wise_fp8" if self.group_size else "tensor_wise_fp8"
        names = {kind: fp8 if kind == "fp8" else kind for kind in (form.dense, form.experts)}
        made: dict[str, Any] = {
            "quantization": "mix_quant", "dense_quant_type": names[form.dense], "moe_quant_type": names[form.experts],
            "is_permuted": False,
        }  # fmt: skip
        if self.group_size and form.name == "fp8":
            made["weight_block_size"] = [BLOCK, BLOCK]
        if self.trained:
            rotated = self.trained == "fp8_rotated"
            made |= {"weight_quantize_algo": "fp8linear", "apply_hadamard": rotated, "hadamard_block_size": SIZE}
        return made | ({"kv_cache_quant_type": "int8"} if form.int8_cache else {})

    @classmethod
    def found(cls, values: Mapping[str, Any], cfg: ErnieConfig, *, where: str) -> Scheme:
        """The scheme of a folder whose config.json holds `values`. Raises CheckpointError if it is not ours."""
        settings = values.get(QUANTIZATION)
        ours = settings.get(OURS) if isinstance(settings, dict) else None
        if not isinstance(ours, dict):
            raise CheckpointError(
                f"{where}: is a quantised model of another tool: its codes lie in the order of that tool's kernels, "
                f"which is not known here. `erniekit export CFG --quantize` makes folders that are read."
            )
        if ours.get("version") != VERSION or ours.get("format") not in FORMATS:
            raise CheckpointError(
                f"{where}: was quantised by another version (format {ours.get('format')!r}, version "
                f"{ours.get('version')!r}); this one reads version {VERSION}. Quantise the original again."
            )
        int4_layers = ours.get("int4_layers") if FORMATS[ours["format"]].early else None
        if (trained := ours.get("trained")) not in (None, *TRAINED) or (trained and ours["format"] != "fp8"):
            raise CheckpointError(f"{where}: its quantization_config is damaged: trained is {trained!r}.")
        try:
            made = cls.new(ours["format"], cfg, group_size=ours.get("group_size"), int4_layers=int4_layers)
            return replace(made, trained=trained)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{where}: its quantization_config is damaged: {error}") from error


def _layers(start: int, stop: int) -> dict[str, int]:
    return {"quant_start_layer": start, "quant_end_layer": stop - 1}


def input_scale(kind: QuantKind | None, largest: float) -> np.ndarray:
    """The static scale of inputs whose largest number was seen: that number for w4a8, as its published reader takes
    it, and for fp8 what codes are multiplied by. Inputs that were always zero have 1."""
    scale = largest / E4M3.largest if kind == "fp8" else largest  # of TRAINED, it is the scale
    return np.array([scale or 1.0], np.float32)


def stored_name(tensor: str, field: str) -> str:
    """Where a field of a weight `X.weight` lies: `X.field`."""
    return f"{tensor.removesuffix('.weight')}.{field}"

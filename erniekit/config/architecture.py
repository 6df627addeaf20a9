"""The architecture of a model: what its config.json says, as one frozen dataclass.

Reads both published forms (-Paddle and -PT, flat) and writes them again with every key that we do not know kept as it
was. Never falls back on a library's defaults where a published value differs: a key without which the mathematics is
unknown is required. Knows nothing of runs, files other than config.json, or paddle.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erniekit.base.errors import CheckpointError

TEXT_MODEL_TYPES = ("ernie4_5", "ernie4_5_moe")
VL_MODEL_TYPES = ("ernie4_5_moe_vl",)
_DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "bf16": "bfloat16", "fp32": "float32"}

_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
_REQUIRED_MOE = ("moe_k", "moe_intermediate_size")
_NOT_WRITTEN = ("extras", "dtype", "is_reward")  # under their own names
_SCORES = "ForSequenceClassification"  # how the class names of models end that score a text


@dataclass(frozen=True)
class ErnieConfig:
    """Shapes and constants of one ERNIE 4.5 model.

    Units: sizes count elements; `moe_layer_end_index` is inclusive and resolved (never -1); lists appear only in
    vision-language models (text value first, vision value second).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "ernie4_5"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_bias: bool = False
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    moe_num_experts: int | tuple[int, int] = 0
    moe_k: int = 0
    moe_intermediate_size: int | tuple[int, int] = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int | tuple[int, int] = 0
    moe_layer_end_index: int | tuple[int, int] = 0
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    num_nextn_predict_layers: int = 0
    dtype: str = "bfloat16"
    is_reward: bool = False  # a score in the place of the language model's head
    extras: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ what follows from the fields
    @property
    def is_moe(self) -> bool:
        """True if any layer routes tokens to experts."""
        return bool(self.moe_num_experts)

    @property
    def is_vl(self) -> bool:
        """True for the vision-language models (heterogeneous experts)."""
        return self.model_type in VL_MODEL_TYPES

    @property
    def q_dim(self) -> int:
        """Width of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts (0 if there are none)."""
        width = self.moe_intermediate_size
        return (width if isinstance(width, int) else width[0]) * self.moe_num_shared_experts

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` is a mixture of experts (models.md, "which layers")."""
        if not self.is_moe or (layer + 1) % self.moe_layer_interval:
            return False
        starts, ends = self.moe_layer_start_index, self.moe_layer_end_index
        start = starts if isinstance(starts, int) else min(starts)
        end = ends if isinstance(ends, int) else max(ends)
        return start <= layer <= end

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse decoder layers."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_sparse(i))

    def replace(self, **changes: Any) -> ErnieConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ reading
    @classmethod
    def from_folder(cls, folder: str | Path) -> ErnieConfig:
        """Read `folder`/config.json. Raises CheckpointError if it is missing, not JSON, or not ERNIE 4.5."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: missing. A model folder holds config.json beside its weights.")
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds {type(values).__name__}, not an object of settings.")
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> ErnieConfig:
        """Build from the content of a config.json; `source` names it in errors. All problems are reported at once."""
        reader = _Reader(values, source)
        model_type = reader.model_type()
        sparse = reader.experts() if model_type != "ernie4_5" else 0
        missing = [key for key in (*_REQUIRED, *(_REQUIRED_MOE if sparse else ())) if values.get(key) is None]
        reader.problems += [f"{source}: '{key}' is missing." for key in missing]
        if reader.problems:
            raise CheckpointError(reader.problems)

        layers, heads = reader.integer("num_hidden_layers"), reader.integer("num_attention_heads")
        hidden = reader.integer("hidden_size")
        fields: dict[str, Any] = dict(
            model_type=model_type,
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=reader.integer("num_key_value_heads"),
            head_dim=reader.integer("head_dim", hidden // max(heads, 1)),
            max_position_embeddings=reader.integer("max_position_embeddings", 131072),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-5),
            rope_theta=reader.rope_theta(),
            use_bias=bool(values.get("use_bias") or False),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", True)),
            hidden_act=values.get("hidden_act") or "silu",
            initializer_range=reader.number("initializer_range", 0.02),
            pad_token_id=reader.integer("pad_token_id", 0, least=0),
            bos_token_id=reader.integer("bos_token_id", 1, least=0),
            eos_token_id=reader.integer("eos_token_id", 2, least=0),
            num_nextn_predict_layers=reader.integer("num_nextn_predict_layers", 0, least=0),
            dtype=reader.dtype(),
            is_reward=reader.is_reward(),
        )
        if sparse:
            fields |= dict(
                moe_num_experts=sparse,
                moe_k=reader.integer("moe_k"),
                moe_intermediate_size=reader.pair("moe_intermediate_size", 0),
                moe_num_shared_experts=reader.integer("moe_num_shared_experts", 0, least=0),
                moe_layer_start_index=reader.pair("moe_layer_start_index", 0),
                moe_layer_end_index=reader.last_layer(layers),
                moe_layer_interval=reader.integer("moe_layer_interval", 1),
                moe_norm_min=reader.number("moe_norm_min", 1e-12),
            )
        reader.check(fields)
        if reader.problems:
            raise CheckpointError(reader.problems)
        known = {f.name for f in dataclasses.fields(cls)} - {"extras", "model_type", "dtype", "is_reward"}
        extras = {key: value for key, value in values.items() if key not in known}
        return cls(**fields, extras=extras)

    # ------------------------------------------------------------------ writing
    def to_dict(self, layout: str = "pt") -> dict[str, Any]:
        """The content of config.json for a folder in `layout` ("pt" or "paddle"); unknown keys are kept.

        "pt" writes `torch_dtype` and what transformers loads (no null head_dim, its class names); "paddle" writes
        `dtype`.
        """
        assert layout in ("pt", "paddle"), layout
        out = {k: v for k, v in self.extras.items() if k not in ("dtype", "torch_dtype", "rope_parameters")}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_WRITTEN}
        if not self.is_moe:
            values = {key: value for key, value in values.items() if not key.startswith("moe_")}
        if not self.num_nextn_predict_layers and "num_nextn_predict_layers" not in self.extras:
            values.pop("num_nextn_predict_layers")
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        out |= values
        if self.is_reward:
            out["num_labels"] = 1
        out["architectures"] = [self.class_name(layout)]
        out["torch_dtype" if layout == "pt" else "dtype"] = self.dtype
        return dict(sorted(out.items()))

    def class_name(self, layout: str) -> str:
        """The published class name of this architecture in `layout`."""
        if self.is_vl:
            return "Ernie4_5_VLMoeForConditionalGeneration"
        kind = _SCORES if self.is_reward else "ForCausalLM"
        if self.is_moe:
            return f"Ernie4_5_Moe{kind}"
        return f"Ernie4_5{kind}" if layout == "pt" else f"Ernie4_5_{kind}"


class _Reader:
    """Typed access to a config.json that collects problems instead of stopping at the first."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values, self.source = values, source
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.source}: {text}")

    def model_type(self) -> str:
        found = self.values.get("model_type")
        if "text_config" in self.values and found in ("ernie4_5_vl_moe", "ernie4_5_vl"):
            self.problem("is transformers' nested vision-language form, which is not read yet; use the flat form.")
            raise CheckpointError(self.problems)
        if found not in (*TEXT_MODEL_TYPES, *VL_MODEL_TYPES):
            self.problem(
                f"model_type is {found!r}, not an ERNIE 4.5 model ({', '.join((*TEXT_MODEL_TYPES, *VL_MODEL_TYPES))})."
            )
            raise CheckpointError(self.problems)
        # ERNIEKit saves dense models under the MoE type with no experts.
        return "ernie4_5" if found == "ernie4_5_moe" and not self.values.get("moe_num_experts") else found

    def is_reward(self) -> bool:
        classes = self.values.get("architectures") or []
        if not any(str(name).endswith(_SCORES) for name in classes):
            return False
        if (found := self.values.get("num_labels", 1)) != 1:
            self.problem(f"num_labels is {found!r}; a reward model has one number for a text.")
        return True

    def experts(self) -> int | tuple[int, int]:
        return self.pair("moe_num_experts", 0)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.problem(f"'{key}' is {value!r}; a whole number of at least {least} is needed.")
            return least
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            self.problem(f"'{key}' is {value!r}; a positive number is needed.")
            return default
        return float(value)

    def pair(self, key: str, default: int) -> int | tuple[int, int]:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
            return (value[0], value[1])
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.problem(f"'{key}' is {value!r}; a whole number (or a pair, in a vision-language model) is needed.")
            return default
        return value

    def last_layer(self, layers: int) -> int | tuple[int, int]:
        """moe_layer_end_index with -1 and "beyond the end" resolved to the last layer."""
        value = self.values.get("moe_layer_end_index")
        if isinstance(value, list) and len(value) == 2:
            return tuple(layers - 1 if v == -1 else v for v in value)  # type: ignore[return-value]
        value = -1 if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < -1:
            self.problem(f"'moe_layer_end_index' is {value!r}; a layer index or -1 is needed.")
            return layers - 1
        return layers - 1 if value == -1 else value

    def rope_theta(self) -> float:
        nested = self.values.get("rope_parameters") or {}
        if nested.get("rope_type", "default") != "default" or self.values.get("rope_scaling"):
            self.problem("asks for a scaled rotary embedding; ERNIE 4.5 has none and this version cannot compute it.")
        if self.values.get("rope_theta") is None and "rope_theta" in nested:
            return float(nested["rope_theta"])
        return self.number("rope_theta", 500000.0)

    def dtype(self) -> str:
        found = self.values.get("dtype") or self.values.get("torch_dtype") or "bfloat16"
        if found not in _DTYPES:
            self.problem(f"dtype is {found!r}; bfloat16 and float32 are known.")
        return _DTYPES.get(found, "bfloat16")

    def check(self, fields: dict[str, Any]) -> None:
        heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
        if heads % groups:
            self.problem(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}.")
        if fields["head_dim"] % 2:
            self.problem(f"head_dim {fields['head_dim']} is odd; rotary embeddings need pairs.")
        if fields["hidden_act"] != "silu":
            self.problem(f"hidden_act is {fields['hidden_act']!r}; ERNIE 4.5 uses silu.")
        experts = fields.get("moe_num_experts", 0)
        most = experts if isinstance(experts, int) else min(experts)
        if experts and fields["moe_k"] > most:
            self.problem(f"moe_k {fields['moe_k']} exceeds moe_num_experts {experts}.")
        if self.values.get("moe_group_experts"):
            self.problem("moe_group_experts is on: no released model selects experts by group, and it is not built.")

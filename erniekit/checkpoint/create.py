"""A random-weight model of any family, written in a stream: for tests, tiny models and sizing exercises.

Each atom has a random stream of its own, so the numbers do not depend on the layout, on shards or on the order of
writing. At most a few tensors are in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from erniekit.base.errors import ConfigError
from erniekit.base.files import write_json
from erniekit.checkpoint.ernie45 import DISK_LAYOUTS, Form, Table, layout_table
from erniekit.checkpoint.hf_files import BFLOAT16
from erniekit.checkpoint.save import BF16_TAG, MAX_SHARD_BYTES, Plan, finish, require_empty, staged, write_weights
from erniekit.config.architecture import ErnieConfig
from erniekit.config.families import SMALL_PRESETS, family, family_name
from erniekit.data.tokenizer import Tokenizer
from erniekit.data.tokenizer_training import train_tokenizer

_CHUNK = 1 << 22  # elements drawn at a time
_WORKERS = 2
_DTYPES = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}
# What the published generation_config.json says.
_SAMPLING = {
    "do_sample": True, "top_p": 0.8, "temperature": 0.8, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}  # fmt: skip


class RandomAtoms:
    """Atoms drawn from normal(0, initializer_range); norms are ones, biases and correction biases zeros."""

    def __init__(self, cfg: ErnieConfig, table: Table, *, seed: int, dtype: str) -> None:
        self.table, self.seed, self.scale = table, seed, np.float32(cfg.initializer_range)
        self.dtype = _DTYPES[dtype]

    def read(self, atom: str) -> np.ndarray:
        """The whole atom, always the same numbers for the same seed and name."""
        spec = self.table.atoms[atom]
        array = np.zeros(spec.shape, np.float32 if spec.fp32 else self.dtype)
        if len(spec.shape) == 1 and atom.endswith("weight"):
            array[...] = 1
        elif "bias" not in atom.rsplit(".", 1)[-1]:
            flat = array.reshape(-1)
            generator = np.random.Generator(np.random.PCG64([self.seed, *atom.encode()]))
            for start in range(0, flat.size, _CHUNK):
                part = flat[start : start + _CHUNK]
                part[...] = generator.standard_normal(part.size, dtype=np.float32) * self.scale
        return array

    def release(self, atom: str) -> None:
        """Nothing is kept."""


def create(
    name: str, out: str | Path, *, seed: int = 0, layout: str = "pt", dtype: str = "bfloat16",
    vocab_size: int | None = None, tokenizer: str | Path | None = None, tokenizer_texts: Sequence[str | Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a random model of family or preset `name` into `out` (absent or empty), in layout "pt" or "paddle".

    A tokenizer is copied from the folder `tokenizer` or trained on the files `tokenizer_texts`. A small preset takes
    its vocabulary size from a copied tokenizer unless `vocab_size` is given; else it must cover the tokenizer's ids.
    """
    key = family_name(name)
    cfg = family(key)
    wrong = {
        f"layout '{layout}' is unknown; {' and '.join(DISK_LAYOUTS)} are known.": layout not in DISK_LAYOUTS,
        f"dtype '{dtype}' is unknown; {' and '.join(_DTYPES)} are known.": dtype not in _DTYPES,
        f"a tokenizer is either copied from {tokenizer} or trained; name one.": bool(tokenizer and tokenizer_texts),
        f"vocab_size {vocab_size}: at least 1 is needed.": vocab_size is not None and vocab_size < 1,
        f"seed {seed} is negative.": seed < 0,
    }
    if any(wrong.values()):
        raise ConfigError([problem for problem, is_wrong in wrong.items() if is_wrong])
    require_empty(out)
    with staged(out) as stage:
        cfg = cfg.replace(vocab_size=vocab_size or cfg.vocab_size, dtype=dtype)
        found = _tokenizer(stage, folder=tokenizer, texts=tokenizer_texts, vocab_size=cfg.vocab_size)
        if found is not None:
            if tokenizer and key in SMALL_PRESETS and vocab_size is None:
                cfg = cfg.replace(vocab_size=found.vocab_size)
            found.check_vocab(cfg.vocab_size)
            cfg = cfg.replace(bos_token_id=found.bos_id, eos_token_id=found.eos_id, pad_token_id=found.pad_id)
        digests = _write(stage, cfg, seed=seed, layout=layout, max_shard_bytes=max_shard_bytes)
        ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.eos_token_id, "pad_token_id": cfg.pad_token_id}
        write_json(stage / "generation_config.json", ids | _SAMPLING)
        finish(stage, config=cfg.to_dict(layout), digests=digests)


def _tokenizer(
    stage: Path, *, folder: str | Path | None, texts: Sequence[str | Path], vocab_size: int
) -> Tokenizer | None:
    if folder is not None:
        found = Tokenizer.from_folder(folder)
        found.save(stage)
        return found
    return train_tokenizer([Path(text) for text in texts], stage, vocab_size=vocab_size) if texts else None


def _write(stage: Path, cfg: ErnieConfig, *, seed: int, layout: str, max_shard_bytes: int) -> dict[str, str]:
    table = layout_table(cfg, layout, Form.usual(cfg, layout, mtp_layers=cfg.num_nextn_predict_layers))
    tags = {
        name: "F32" if cfg.dtype == "float32" or table.atoms[tensor.parts[0][0]].fp32 else BF16_TAG[layout]
        for name, tensor in table.tensors.items()
    }
    plan = Plan.new(table, tags, layout=layout, max_shard_bytes=max_shard_bytes)
    return write_weights(stage, plan, RandomAtoms(cfg, table, seed=seed, dtype=cfg.dtype), workers=_WORKERS)

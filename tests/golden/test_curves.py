"""Loss curves of short runs as text: a change that moves numbers shows here, and says so by new files.

Eight steps of a micro model on the shipped example data, in one process each stage after the other. Made anew by

    python tests/golden/test_curves.py

What may differ without a change of ours is the order in which products are summed: other processors, thread counts and
kernels. Those in C++, those in numpy and Paddle's own operators sum in three such orders: their curves lie at most 8e-6
apart (RM; the others 2e-6), relative to the loss. TOLERANCE leaves room for ten times that, and is far below what a
change of mathematics does: in eight steps every loss moves by more than a hundredth.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
EXAMPLES = ROOT / "examples" / "data"
TOLERANCE = 1e-4

COMMON = {
    "compute_type": "fp32", "max_steps": 8, "batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 2, "seed": 5,
    "max_seq_len": 256, "save_strategy": "no", "report_samples": 0, "cache_data": False, "moe_health_steps": 0,
}  # fmt: skip
LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "learning_rate": 1e-2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft_lora": ("sft-train", {"stage": "SFT", **LORA}),
    "sft_wint48_lora": ("sft-train", {"stage": "SFT", **LORA, "compute_type": "wint4/8"}),
    "dpo": ("dpo-train", {"stage": "DPO", "fine_tuning": "Full"}),
    "dpo_lora": ("dpo-train", {"stage": "DPO", **LORA}),
    "kto": ("kto-train", {"stage": "KTO", "fine_tuning": "Full"}),
    "rm": ("dpo-train", {"stage": "RM", "fine_tuning": "Full"}),
}


def make_base(folder: Path) -> Path:
    """A random model, the same on every machine."""
    from erniekit.checkpoint.create import create

    create("micro-moe", folder / "base", seed=3, dtype="float32", tokenizer_texts=[EXAMPLES / "sft-train.jsonl"])
    return folder / "base"


def curve(name: str, base: Path, out: Path) -> list[float]:
    """The losses of a case."""
    import erniekit

    data, keys = CASES[name]
    config = out.with_suffix(".yaml")
    paths = {"model_name_or_path": str(base), "output_dir": str(out)}
    config.write_text(json.dumps(COMMON | keys | paths | {"train_dataset_path": str(EXAMPLES / f"{data}.jsonl")}))
    return [row["loss"] for row in erniekit.train(config).history if "loss" in row]


def stored(name: str) -> list[float]:
    """The losses of a file of ours, one a line."""
    return [float(line) for line in (HERE / f"{name}.txt").read_text(encoding="ascii").split()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("curves"))


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_as_it_was(name: str, base: Path, tmp_path: Path) -> None:
    assert curve(name, base, tmp_path / name) == pytest.approx(stored(name), rel=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls(name: str) -> None:
    losses = stored(name)
    assert len(losses) == COMMON["max_steps"]
    assert min(losses[-3:]) < losses[0]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    with tempfile.TemporaryDirectory() as place:
        model = make_base(Path(place))
        for case in CASES:
            text = "".join(f"{loss:.8f}\n" for loss in curve(case, model, Path(place, case)))
            (target / f"{case}.txt").write_text(text, encoding="ascii")

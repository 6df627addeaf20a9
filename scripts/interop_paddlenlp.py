"""Three steps of our model in `paddlenlp.trainer.Trainer`, and the same three in our own loop, on the same batches.

The model goes in as it is: a plain paddle.nn.Layer. Shown: the losses of both agree, the loss on the first batch falls,
and what the Trainer saves are the model's weights. Run it through interop_paddlenlp.sh, which makes the environment.

    python scripts/interop_paddlenlp.py [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from erniekit.base import runtime  # noqa: E402

runtime.prepare()  # before paddle is loaded

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from paddlenlp.trainer import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from erniekit.checkpoint.create import create  # noqa: E402
from erniekit.checkpoint.load import load_model  # noqa: E402
from erniekit.config.load import load_config  # noqa: E402
from erniekit.data.batch import Batch  # noqa: E402
from erniekit.data.build import build_train_data  # noqa: E402
from erniekit.data.tokenizer import Tokenizer  # noqa: E402
from erniekit.training.objective import LanguageModelObjective, LossWeights  # noqa: E402
from erniekit.training.optimizer import AdamWSettings, Optimizer  # noqa: E402
from erniekit.training.router import RouterUpkeep  # noqa: E402
from erniekit.training.step import train_step  # noqa: E402

STEPS, RATE, CLOSE = 3, 1e-3, 1e-4


def main() -> None:
    """Train in both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(Path(folder))
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if figures["largest_difference"] > CLOSE or not figures["loss_falls"]:
        raise SystemExit("the two loops disagree")


def compare(folder: Path) -> dict:
    """The losses of both loops, and what the Trainer saved beside what is in memory."""
    base = folder / "base"
    create("micro-moe", base, tokenizer_texts=[ROOT / "examples/data/sft-train.jsonl"], dtype="float32")
    batches = read_batches(base)
    theirs, order, trained = in_their_trainer(base, batches, folder / "out")
    ours = in_our_loop(base, [batches[index] for index in order])
    saved = paddle.load(str(folder / "out" / "model_state.pdparams"))
    return {
        "paddle": paddle.__version__, "paddlenlp": importlib.metadata.version("paddlenlp"), "numpy": np.__version__,
        "trainer_losses": theirs, "our_losses": ours,
        "largest_difference": max(abs(a - b) for a, b in zip(theirs, ours, strict=True)),
        "loss_falls": loss_of(trained, batches[order[0]]) < theirs[0],
        "saved_equals_memory": all(
            np.array_equal(saved[name].numpy(), value.numpy()) for name, value in trained.state_dict().items()
        ),
    }  # fmt: skip


def read_batches(base: Path) -> list[Batch]:
    """A few steps' worth of the example data, one micro-batch a step."""
    cfg = load_config({"train_dataset_path": str(ROOT / "examples/data/sft-train.jsonl"), "max_seq_len": 256})
    data = build_train_data(cfg.data, Tokenizer.from_folder(base), stage="SFT", seed=0, rows_per_step=2)
    return [data.micro_batches(step, batch_size=2)[0] for step in range(STEPS)]


def in_their_trainer(base: Path, batches: list[Batch], out: Path) -> tuple[list[float], list[int], paddle.nn.Layer]:
    """The loss of each step, which batch it had (their sampler shuffles), and the trained model."""
    model, order = load_model(base), list[int]()

    def collate(items: list[int]) -> dict[str, paddle.Tensor]:
        order.extend(items)
        batch = batches[items[0]]
        names = ("input_ids", "position_ids", "segment_ids", "labels")
        return {name: paddle.to_tensor(getattr(batch, name)) for name in names}

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", device="cpu", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, criterion=next_token_loss, args=arguments, data_collator=collate,
        train_dataset=Numbers(len(batches)), callbacks=[log := Log()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    return log.losses, order[:STEPS], model


class Log(TrainerCallback):
    """Keeps the losses that the Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
        """Called after every step."""
        self.losses += [logs["loss"]] if "loss" in logs else []


class Numbers(paddle.io.Dataset):
    """The numbers of the batches; the collator puts the batches in their place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return self.size


def next_token_loss(logits_BSV: paddle.Tensor, labels_BS: paddle.Tensor) -> paddle.Tensor:
    """The mean over trained positions; labels are already those of the next token. (Paddle's own mean counts the
    ignored positions, too, if their label is negative.)"""
    flat, labels = logits_BSV.reshape([-1, logits_BSV.shape[-1]]), labels_BS.reshape([-1])
    total = paddle.nn.functional.cross_entropy(flat, labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum()


def loss_of(model: paddle.nn.Layer, batch: Batch) -> float:
    """The loss on a batch as the model stands."""
    with paddle.no_grad():
        inputs = {name: paddle.to_tensor(getattr(batch, name)) for name in ("input_ids", "position_ids", "segment_ids")}
        return float(next_token_loss(model(**inputs), paddle.to_tensor(batch.labels)))


def in_our_loop(base: Path, batches: list[Batch]) -> list[float]:
    """The loss of each step."""
    model = load_model(base)
    optimizer = Optimizer(model.named_parameters(), AdamWSettings(beta2=0.95, weight_decay=0.1))
    upkeep = RouterUpkeep(model, bias_coefficient=0.0, orthogonal_lambda=0.0)
    return [
        train_step(
            model, optimizer, batches=[batch], objective=LanguageModelObjective(LossWeights()), upkeep=upkeep,
            learning_rate=RATE, row_length=batch.input_ids.shape[1],
        ).loss
        for batch in batches
    ]  # fmt: skip


if __name__ == "__main__":
    main()

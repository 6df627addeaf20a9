"""Keys of a training run: steps, logging, evaluation, saving, resuming."""

from dataclasses import dataclass

from erniekit.config.keys import SPEED, Alias, inert, key, later

_INTERVALS = {"choices": ("no", "steps", "epoch"), "spellings": {"false": "no"}, "resume": "free"}


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is written down."""

    output_dir: str | None = key(None, "Where checkpoints, logs and the final model go.", resume="free")
    overwrite_output_dir: bool = key(
        False, "Move another or a finished run in output_dir aside (to output_dir.old-N). An unfinished run of the "
        "same config is resumed all the same.", resume="free",
    )
    seed: int = key(42, "Seed of data order, initialisation and dropout.", least=0)

    batch_size: int = key(
        1, "Rows of a micro-batch on one device.", least=1, aliases=(Alias("per_device_train_batch_size"),),
    )
    per_device_eval_batch_size: int | None = key(
        None, "Rows of a batch in evaluation; null: batch_size.", there=8, least=1, resume="free",
    )
    gradient_accumulation_steps: int = key(1, "Micro-batches of a step.", least=1)
    num_train_epochs: float = key(1.0, "Passes over the data; a positive max_steps beats it.", above=0)
    max_steps: int = key(-1, "Steps of the run; -1: as many as num_train_epochs make.", least=-1, resume="free")

    logging_steps: int = key(
        1, "Steps between those that console and loggers show. (ERNIEKit's files all say 1.)", there=500, least=1,
        resume="free",
    )
    logging_dir: str | None = key(None, "Folder for TensorBoard; null: output_dir/runs.", resume="free")
    disable_tqdm: bool | None = key(
        None, "True: no progress bar; null: a bar where the output is a terminal.", resume="free"
    )
    evaluation_strategy: str = key("no", "When to evaluate.", **_INTERVALS)
    eval_steps: int = key(
        500, "Steps between evaluations. (ERNIEKit evaluates every logging_steps.)", there=None, least=1, resume="free"
    )
    max_evaluate_steps: int = key(
        -1, "Batches of an evaluation, of each file where there are several; -1: all.", least=-1, resume="free"
    )
    save_strategy: str = key("steps", "When to save a checkpoint.", **_INTERVALS)
    save_steps: int = key(500, "Steps between checkpoints.", least=1, resume="free")
    use_async_save: bool | None = key(
        False, "Save while training goes on, from a copy of weights and states in host memory.", resume="free"
    )
    save_total_limit: int | None = key(
        None, "Newest checkpoints to keep; null or 0: all. The last good one is never deleted.", least=0, resume="free"
    )
    save_layout: str | None = key(
        None, "Layout of the final model; null: the base model's.", choices=("pt", "paddle"), resume="free"
    )
    resume_from_checkpoint: str | None = key(
        None, "A checkpoint folder to resume from; null: the newest complete one in output_dir.", resume="free"
    )
    resume_anyway: bool = key(
        False, "Resume although the config or the data differ from the run's; the differences are listed.",
        resume="free",
    )

    recompute: bool = key(False, "Save memory: compute activations again in the backward pass.", effect=SPEED)
    recompute_granularity: str = key(
        "full", "What is computed again: whole layers, whole attention blocks, or the attention product only.",
        effect=SPEED, choices=("full", "full_attn", "core_attn"), only=("recompute", (True,)),
    )

    continue_training: bool = later(True, "False starts from random weights; here `erniekit init` makes such a model.")
    eval_iters: int = inert(-1, "max_evaluate_steps decides.")

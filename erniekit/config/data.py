"""Keys of the data: which files, how they are mixed, cut and packed.

Lists are written with commas or as YAML lists. Data of pictures and video is in vision.py.
"""

import re
from dataclasses import dataclass

from erniekit.config.keys import SPEED, Alias, inert, key, later, speed

FORMATS = {
    "choices": ("erniekit", "alpaca", "chatml", "text"),
    "spellings": {"messages": "chatml", "sharegpt": "chatml", "txt": "text"},
}
_RANDOM = ("mix_strategy", ("random",))
_DRAWN = ("mix_strategy", ("random", "interleave_under", "interleave_over"))

CHAT_TEMPLATES = ("base", "ernie_thinking", "ernie_vl", "ernie_vl_thinking")
_DATA_SET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.]+)?")
_FILE = re.compile(r"\.(json|jsonl|txt|csv|tsv|parquet|arrow|gz|zip|bz2|xz|zst|tar|xlsx)$")


def is_data_set(path: str) -> bool:
    """Whether an entry of `*_dataset_path` that is no file here can be the name of a data set: `owner/name[:split]`."""
    return bool(_DATA_SET.fullmatch(path)) and not _FILE.search(path)


@dataclass(frozen=True)
class DataConfig:
    """From files to rows of tokens."""

    train_dataset_path: list[str] | None = key(
        None, "Training files, patterns of files (`data/*.jsonl`) or data sets (`owner/name:split`)."
    )
    train_dataset_type: list[str] | None = key(
        None, "Format of each training file, or one for all; null: as its first row looks.", **FORMATS
    )
    train_dataset_prob: list[float] | None = key(
        None, "Share of each training file in the mixture; made to sum to 1.", only=_DRAWN, idle=([1.0],),
    )
    eval_dataset_path: list[str] | None = key(
        None, "Evaluation files; null: no evaluation. (ERNIEKit falls back on a demo file.)",
        there="examples/data/sft-eval.jsonl", resume="free",
    )
    eval_dataset_type: list[str] | None = key(
        None, "Format of each evaluation file, or one for all.", there="erniekit", resume="free", **FORMATS
    )
    eval_dataset_prob: list[float] | None = inert(
        None, "Share of each evaluation file; here every file is evaluated whole.", there="1.0", idle=([1.0],),
    )
    columns: dict | None = key(
        None, "Names of columns where the files have others: {our name: the file's name}, as `{prompt: question}`. "
        "Beside the columns of a format `prompt`, `query` and `response` are known.",
    )
    max_seq_len: int = key(4096, "Longest row in tokens.", least=2)
    mix_strategy: str | None = key(
        None, "How several files become one stream. concat: all rows of all files, an epoch is each row once. random: "
        "rows drawn by `train_dataset_prob`, an epoch is `num_samples_each_epoch` rows. interleave_under, "
        "interleave_over: drawn so, too, but an epoch ends when the first file has ended, or when every file has "
        "(those that end before start again). null: random for several files, concat for one.",
        choices=("random", "concat", "interleave_under", "interleave_over"),
    )
    num_samples_each_epoch: int = key(6000000, "Rows that make an epoch when rows are drawn.", least=1, only=_RANDOM)
    validation_split: float = key(
        0.0, "Share of the training rows of each file that is set aside and evaluated on, in place of "
        "`eval_dataset_path`.", least=0, most=0.9,
    )
    max_dropped_fraction: float = key(
        0.01, "Share of rows that may be unusable; the run stops if there are more.", least=0, most=1, resume="free",
    )
    check_leaks: bool = key(
        True, "Look before training for evaluation data in the training data, and warn.", resume="free",
    )
    random_shuffle: bool = key(True, "Shuffle the rows of every epoch.")
    packing: bool = key(
        True, "Pack several samples into a row; they never see each other.", aliases=(Alias("in_tokens_batching"),),
    )
    greedy_intokens: bool = key(
        True, "Pack by best fit over a buffer; False packs in order.", only=("packing", (True,)),
    )
    buffer_size: int = key(500, "Samples in the buffer of greedy packing.", least=1, only=("packing", (True,)))
    chat_template: str | None = key(
        None, "The format of dialogues, in place of the tokenizer's own: a name that comes with the program or a jinja "
        f"file. Names: {', '.join(CHAT_TEMPLATES)}.", there="ernie_vl",
    )
    allow_special_tokens_in_text: bool = key(
        False, "Let special-token strings inside user text become special tokens; else they are ordinary text.",
    )
    use_cls: bool = later(True, "Begin a dialogue with <|begin_of_sentence|>.")
    pad_to_max_seqlen: bool | int | None = speed(None, "Pad every row to full length; here to the longest of a batch.")
    split_multi_turn: bool = inert(
        False, "One sample for every turn. Here a dialogue is split where its format asks for an answer otherwise than "
        "it shows it later; elsewhere one sequence trains every turn after what came before it.",
    )
    input_dir: str | None = later(None, "Tokenised pre-training data and its weights.")
    split: str | None = later(None, "Shares of train, validation and test in `input_dir`.")
    offline_dataset_path: str | None = later(None, "A folder of tokenised data.")
    data_filelist: list[str] | None = later(None, "Files of pre-training data.")
    data_weights: list[float] | None = later(None, "Weights of `data_filelist`.")
    skip_data_intervals: list | None = later(None, "Ranges of steps whose data is passed over.")
    ignore_data_skip: bool = later(False, "Resume at the start of the data.")
    dataloader_drop_last: bool = later(False, "Drop the last incomplete batch.")
    dataset_type: str = inert("iterable", "How data is read: here a step's rows depend on the seed and the step only.")
    dataset_name: str = inert("KnowledgeBasedSFTReader", "Reader class; `stage` and the type of the data decide.")
    dataloader_shuffle: bool = inert(True, "`random_shuffle` decides.")
    sampling_wo_replacement_data_resuming: bool | None = inert(True, "Here a resumed run always goes on in its data.")
    same_data: bool | None = inert(None, "Whether a resumed run has the same data; here it is checked by a hash.")
    remove_unused_columns: bool = inert(True, "Columns that are not known are not read.")
    label_names: list[str] | None = inert(None, "Names of labels.")
    max_estimate_samples: int = inert(100000, "Rows read to estimate an epoch; here the epoch is counted.")
    tokenizer: str | None = later(None, "Another tokenizer than the model's.")
    tokenizer_name: str | None = later(None, "Another tokenizer than the model's.")
    dataloader_num_workers: int = key(
        0, "Processes that tokenise large files; 0: one for each core, 1: the run's own alone.", effect=SPEED, least=0,
    )
    cache_data: bool = key(True, "Keep tokenised data for the next run.", effect=SPEED)
    data_cache_dir: str | None = key(
        None, "Folder to keep tokenised data in; null: ~/.cache/erniekit/data.", effect=SPEED,
        only=("cache_data", (True,)),
    )
    prefetch_factor: int = speed(2, "Batches that a worker prepares ahead.")
    distributed_dataloader: bool = speed(False, "Read data on one rank and send it.")
    lazy_data_processing: bool = speed(True, "Tokenise while training.")

    @property
    def has_eval_data(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_dataset_path or self.validation_split)

"""The verbs of the command line: what each takes, what it says about itself, and where it lives.

A table only; importing it loads no verb. Plain classes, because start-up counts and dataclasses cost milliseconds.
"""

from __future__ import annotations


class Option:
    """`--name`, with a value if it has a metavar, with several if `many`."""

    def __init__(
        self, name: str, doc: str, *, metavar: str = "", many: bool = False, required: bool = False
    ) -> None:
        self.name, self.doc, self.metavar, self.many, self.required = name, doc, metavar, many, required

    @property
    def usage(self) -> str:
        """The option as it is written."""
        return f"--{self.name}{' ' * bool(self.metavar)}{self.metavar}{' ...' * self.many}"


class Verb:
    """One verb. `places` are its positional words; `home` is module:function, called with `Arguments`."""

    def __init__(
        self,
        name: str,
        summary: str,
        *,
        home: str,
        places: tuple[str, ...] = (),
        overrides: bool = False,
        options: tuple[Option, ...] = (),
        doc: str = "",
        needs_paddle: bool = False,
        takes_ranks: bool = False,
    ) -> None:
        self.name, self.summary, self.home, self.places = name, summary, home, places
        self.overrides, self.options, self.doc, self.needs_paddle = overrides, options, doc, needs_paddle
        self.takes_ranks = takes_ranks

    @property
    def usage(self) -> str:
        """The verb with everything it takes."""
        words = [self.name, *self.places]
        words += ["[key=value ...]"] if self.overrides else []
        words += [option.usage if option.required else f"[{option.usage}]" for option in self.options]
        return " ".join(words)

    def help(self) -> str:
        """What `erniekit VERB -h` prints."""
        lines = [f"usage: erniekit {self.usage}", "", self.summary[:1].upper() + self.summary[1:] + "."]
        lines += [self.doc] if self.doc else []
        lines += [""] if self.options else []
        width = max((len(option.usage) for option in self.options), default=0)
        lines += [f"  {option.usage:{width}}  {option.doc}" for option in self.options]
        return "\n".join(lines)


RANKS = (
    Option("nproc", "ranks on this machine (as many as it shows GPUs; 1 on a CPU)", metavar="N"),
    Option("patience", "seconds without a word between ranks after which the job counts as hung (1800)", metavar="S"),
)

VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "train", "train as the file says; the same command again resumes", home="runs:train", places=("CFG",),
            overrides=True, doc="Settings behind the file win over it: learning_rate=1e-4", needs_paddle=True,
            takes_ranks=True, options=RANKS,
        ),
        Verb(
            "eval", "loss, perplexity and token accuracy on the evaluation set; how good its answers are",
            home="runs:evaluate", places=("DIR_OR_CFG",), overrides=True, needs_paddle=True, takes_ranks=True,
            options=(
                Option("reference", "model to compare with (of a quantised folder: its origin)", metavar="DIR"),
                *RANKS,
            ),
            doc="eval_generate=N answers N prompts (-1: all) and compares them with their references. A folder wants "
            "eval_dataset_path=FILE. Of a quantised one its size and errors are shown; --reference none compares "
            "with nothing.",
        ),
        Verb(
            "export", "write the trained model of output_dir as a folder to deploy", home="runs:export",
            places=("CFG",), overrides=True, needs_paddle=True, takes_ranks=True,
            options=(
                Option("to", "layout to write: pt or paddle (pt)", metavar="LAYOUT"),
                Option("out", "folder to write (output_dir/export, or export-N)", metavar="DIR"),
                Option("checkpoint", "export checkpoint-N (fp32) instead of the finished model", metavar="N"),
                Option("adapter", "the adapter by itself, as PEFT has it (--to pt) or ERNIEKit (--to paddle)"),
                Option("merge", "merge these adapters, each with a weight, into one model", metavar="DIR=W", many=True),
                Option("method", "how several are merged: linear, ties, dare or dare_ties (linear)", metavar="NAME"),
                Option("density", "share of each adapter's changes that ties and dare keep (0.5)", metavar="X"),
                Option("quantize", "in few bits: wint8, wint4, w4a8, w4a8c8, fp8, wint2 or wint2.5", metavar="KIND"),
                Option("group-size", "inputs that share a scale (wint8, wint4); 128: fp8 by blocks", metavar="N"),
                Option("int4-layers", "first layers of wint2 whose experts are int4 (7 of 54)", metavar="N"),
                Option("search", "of wint2: full, or fast, with 2 % more error (full)", metavar="HOW"),
                Option("calibration", "text for scales of inputs (train_dataset_path)", metavar="FILE", many=True),
                Option("calibration-tokens", "tokens of it (4096)", metavar="N"),
                *RANKS,
            ),
            doc="An adapter is merged into its base, in its precision, and the merged model compared with base "
            "and adapter (merge_tolerance). max_shard_size=N sets the largest file in GB. With --quantize, CFG may be "
            "a model folder; an export that was cut goes on when it is asked for again.",
        ),
        Verb(
            "chat", "talk to a model; /help lists commands", home="runs:chat",
            places=("DIR_OR_CFG",), overrides=True, needs_paddle=True,
        ),
        Verb(
            "check", "everything wrong in a file: keys, types, conflicts", home="configs:check", places=("CFG",),
            overrides=True, options=(Option("files", "absent model and data files are errors, too"),),
            doc="What depends on the machine is listed as not checked here. Exit code 0: fine, 2: errors.",
        ),
        Verb(
            "show", "the resolved config, each value with its origin", home="configs:show", places=("CFG",),
            overrides=True, options=(Option("changed", "only what was set, not the defaults"),),
        ),
        Verb(
            "preview", "training samples as tokens, what counts in the loss in colour, and what was lost",
            home="looking:preview", places=("CFG",), overrides=True,
            options=(
                Option("step", "begin with this step (0), and name all its samples", metavar="N"),
                Option("rows", "how many rows to show (3)", metavar="N"),
                Option("html", "write a page instead", metavar="FILE"),
                Option("nproc", "of how many ranks the run will be: their rows make a step (1)", metavar="N"),
            ),
            doc="Needs the model's tokenizer and the data, no weights and no Paddle.",
        ),
        Verb(
            "convert", "write a checkpoint folder in the other layout", home="folders:convert", places=("IN", "OUT"),
            options=(Option("to", "layout to write: pt or paddle", metavar="LAYOUT", required=True),),
            doc="OUT must be absent or empty.",
        ),
        Verb(
            "split", "write a checkpoint folder in weight files of another size", home="folders:split",
            places=("DIR_OR_CFG",), overrides=True,
            options=(
                Option("max-shard-size", "largest file: 5GB, 500MB, ... (the config's max_shard_size)", metavar="SIZE"),
                Option("out", "folder to write, absent or empty (DIR/split_export)", metavar="DIR"),
            ),
            doc="Of a config, the trained model in output_dir is split. Never in place; every tensor keeps its bytes.",
        ),
        Verb(
            "resize-vocab", "add tokens to a model: tokenizer, embedding, head and config", home="folders:resize_vocab",
            places=("DIR",),
            options=(
                Option(
                    "add-tokens", "the tokens, or files with one a line", metavar="WORD", many=True, required=True
                ),
                Option("out", "folder to write, absent or empty (DIR-resized)", metavar="DIR"),
                Option("pad-to-multiple", "round the vocabulary size up to a multiple of N", metavar="N"),
            ),
            doc="A new token starts as the mean of the others. Unused rows of the embedding are used first.",
        ),
        Verb(
            "verify", "checksums, index, names and shapes of a checkpoint folder", home="folders:verify",
            places=("DIR",), doc="Exit code 2 if anything is missing, extra or corrupt.",
        ),
        Verb(
            "init", "a model with random weights, of any family or small preset", home="folders:init",
            options=(
                Option("family", "which model; an unknown name lists the known ones", metavar="NAME", required=True),
                Option("out", "folder to write", metavar="DIR", required=True),
                Option("seed", "seed of the weights (0)", metavar="N"),
                Option("tokenizer", "folder whose tokenizer is copied", metavar="DIR"),
                Option("train-tokenizer", "text files to train a tokenizer on", metavar="FILE", many=True),
                Option("vocab-size", "size of the vocabulary (the family's)", metavar="N"),
                Option("dtype", "bfloat16 or float32 (bfloat16)", metavar="NAME"),
                Option("layout", "layout to write: pt or paddle (pt)", metavar="LAYOUT"),
            ),
        ),
        Verb(
            "selftest", "the whole way of a tiny model on this machine: train, resume, export, chat",
            home="selftest:selftest", options=(Option("keep", "folder to keep everything in", metavar="DIR"),),
            doc="Needs no network. Exit code 2 if a check fails.", needs_paddle=True,
        ),
        Verb(
            "migrate", "the run file of another toolkit as one of ours, with an account of every key",
            home="migrate:migrate", places=("FILE",),
            options=(
                Option("from", "erniekit, paddleformers, llamafactory or swift (as the keys tell)", metavar="NAME"),
                Option("out", "file to write; without it the file is printed", metavar="FILE"),
            ),
            doc="Keys that are lost or change their meaning are listed with the reason, in the file's head, too.",
        ),
        Verb(
            "doctor", "what on this machine hinders a run, each with its cure", home="doctor:doctor",
            places=("[CFG]",), overrides=True,
            doc="With a config: whether its model fits into memory and its checkpoints onto the disk. Exit code 2 for "
            "a problem.",
        ),
        Verb(
            "replay", "repeat a step kept at a spike or a non-finite loss; where the trouble arises",
            home="looking:replay", places=("DIR",), needs_paddle=True,
            doc="DIR is output_dir/replay/step-N. Key spike_factor says what a spike is.",
        ),
        Verb(
            "reproduce", "repeat a run from its run.lock.yaml and compare the losses", home="looking:reproduce",
            places=("LOCK",), needs_paddle=True, takes_ranks=True,
            options=(
                Option("out", "folder of the repetition (output_dir-reproduced)", metavar="DIR"),
                Option("bound", "largest difference of a loss, as a share (0.001)", metavar="X"),
                *RANKS,
            ),
            doc="Other data or another model is an error, other packages or another machine a warning. Exit code 2: "
            "the losses differ by more than the bound.",
        ),
        Verb("env", "the versions and settings that matter for a bug report", home="environment:env"),
        Verb("version", "the version", home="front:version"),
        Verb("help", "this text, or that of a verb", home="front:help", places=("[VERB]",)),
    )
}  # fmt: skip

LATER = ("server", "webui", "plan")

"""`chat`: answers in the terminal or through a pipe, streamed, over several turns."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from erniekit.base import runtime
from erniekit.base.console import notice
from erniekit.base.errors import CheckpointError, DataError, ErnieKitError, MeshError
from erniekit.checkpoint.adapter_forms import is_adapter
from erniekit.checkpoint.chosen import adapter_of, base_of
from erniekit.checkpoint.download import locate_model
from erniekit.checkpoint.load import load_for_answers
from erniekit.checkpoint.quantised_folder import open_to_answer
from erniekit.config.packing import packing_of
from erniekit.config.parallel import DEVICE_DEGREES
from erniekit.config.readiness import require_built, require_ready
from erniekit.config.run import RunConfig
from erniekit.data.rendering import choose_template, fitted
from erniekit.data.tokenizer import Tokenizer
from erniekit.rollout.generate import prompt_text, stream_answer
from erniekit.rollout.sampling import Sampling, eos_ids, read_generation_config
from erniekit.rollout.sections import ANSWER, CALL, THOUGHT, Piece, Sections, said
from erniekit.rollout.talk import Commands, Talk

_PROMPT = "> "
_STYLES = {THOUGHT: ("\x1b[2m", "\x1b[0m\n"), CALL: ("\x1b[36m", "\x1b[0m\n"), ANSWER: ("", "\n")}  # on a terminal
_TAGS = {THOUGHT: ("<think>\n", "\n</think>\n"), CALL: ("<tool_call>\n", "\n</tool_call>\n"), ANSWER: ("", "\n")}


def chat(cfg: RunConfig, *, folder: str | Path | None = None, lines: Iterable[str] | None = None) -> None:
    """Talk to the model in `folder`, or to the one that the config names, until the input ends.

    `lines` replaces the keyboard. A config with a finished run is answered by the trained model; an adapter answers
    beside its base. One process has the whole model, whatever the degrees of training are.
    """
    require_built(cfg, "chat")
    if (world := runtime.rank_place().world) > 1:
        raise MeshError(
            f"`chat` is one process, and this is one of {world} (PADDLE_TRAINERS_NUM). Start it by itself; `eval` "
            "answers the prompts of an eval set on several ranks (eval_generate)."
        )
    for text in (*cfg.notices, *_unused(cfg)):
        notice(text)
    path, adapter = _model_of(cfg) if folder is None else _model_in(Path(folder), cfg)
    _Chat(cfg, path, adapter).run(_typed() if lines is None else iter(lines))


def _unused(cfg: RunConfig) -> list[str]:
    """One line that names the degrees of a file that is for several devices."""
    degrees = ", ".join(f"{name}: {cfg.value(name)}" for name in DEVICE_DEGREES if cfg.value(name) > 1)
    return [f"chat answers with the whole model in one process; {degrees} without effect"] if degrees else []


class _Chat:
    """A model, what it is told, and the lines that come in."""

    def __init__(self, cfg: RunConfig, path: Path, adapter: Path | None) -> None:
        self.tokenizer = Tokenizer.from_folder(open_to_answer(path).path)
        self.defaults = read_generation_config(path)
        self.stops = eos_ids(self.defaults)
        self.template = choose_template(self.tokenizer, cfg.data.chat_template)
        seed = cfg.train.seed if cfg.given("seed") else secrets.randbelow(1 << 31)
        self.talk = Talk(cfg.generate, seed)
        beside = f" with the adapter {adapter}" if adapter else ""
        notice(f"{path}{beside}: {self._sampling()}")
        self.model = load_for_answers(path, adapter=adapter, pack=packing_of(cfg))
        if self.model.config.is_reward:
            raise CheckpointError(
                f"{path}: is a reward model: it gives an answer a number and says nothing. `erniekit eval` with stage: "
                "RM measures it on pairs."
            )
        self.tokenizer.check_vocab(self.model.config.vocab_size)
        self.styles = _STYLES if sys.stdout.isatty() else _TAGS
        self.num_answers = 0

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line."""
        commands = Commands(self.talk)
        for line in lines:
            text = line.rstrip("\n")
            if not text.strip():
                continue
            before = list(self.talk.messages)
            try:
                if text.startswith("/") and not text.startswith("//"):
                    reply = commands.run(text)
                    self._check()
                    if reply.text:
                        notice(reply.text)
                    if not reply.answer:
                        continue
                else:
                    self.talk.say("user", text.removeprefix("/"))
                self._converse(lines)
            except ErnieKitError as error:  # the chat goes on as if the line had not come
                self.talk.messages = before
                print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr, flush=True)

    def _check(self) -> None:
        """Tell at once what a command has set that makes no sense with this model."""
        self._sampling()
        try:
            fitted([], self.talk.tools, self.template)
        except DataError:
            self.talk.tools = []
            raise

    def _converse(self, lines: Iterator[str]) -> None:
        """Let the model answer, and answer again when the functions that it called have given their results."""
        while calls := self._answer():
            for call in calls:
                notice(f"{call['name']} was called; the next line is its result.")
                result = next(lines, None)
                if result is None:
                    return
                self.talk.say("tool", result.rstrip("\n"), name=call["name"])

    def _answer(self) -> list[dict]:
        """One answer, shown as it comes; returns the calls in it. Ctrl-C ends it, and what was said stays."""
        talk, variables = self.talk, {"enable_thinking": self.talk.keys.enable_thinking}
        prompt = prompt_text(
            self.tokenizer, talk.messages, template=self.template, tools=talk.tools, variables=variables
        )
        sections = Sections(self.template, prompt, calls=bool(talk.tools))
        shown, calls = _Shown(self.styles), []
        try:
            for piece in stream_answer(
                self.model, self.tokenizer, talk.messages, max_new_tokens=talk.keys.max_new_tokens,
                template=self.template, tools=talk.tools, variables=variables, sampling=self._sampling(),
                further_stops=self.stops, number=self.num_answers,
            ):  # fmt: skip
                shown.show(sections.push(piece))
            shown.show(sections.finish())
            calls = said(shown.pieces).calls
        except KeyboardInterrupt:
            notice("stopped.")
        finally:
            shown.end()
        if not shown.pieces:
            print(flush=True)  # an answer of nothing is an empty line
        self.num_answers += 1
        found = said(shown.pieces)
        talk.say("assistant", found.answer, reasoning_content=found.thought, tool_calls=calls)
        return calls

    def _sampling(self) -> Sampling:
        return Sampling.of(self.talk.keys, self.defaults, seed=self.talk.seed)


class _Shown:
    """Prints an answer as it comes, its parts apart, and keeps the pieces."""

    def __init__(self, styles: dict[str, tuple[str, str]]) -> None:
        self.pieces: list[Piece] = []
        self._styles = styles

    def show(self, pieces: Iterable[Piece]) -> None:
        """Print further pieces."""
        for piece in pieces:
            if piece.opens:
                if self.pieces:
                    self._close()
                print(self._styles[piece.part][0], end="")
            self.pieces.append(piece)
            print(piece.text, end="", flush=True)

    def end(self) -> None:
        """Close the last part."""
        if self.pieces:
            self._close()

    def _close(self) -> None:
        print(self._styles[self.pieces[-1].part][1], end="", flush=True)


def _model_of(cfg: RunConfig) -> tuple[Path, Path | None]:
    """The model that a config stands for, and the adapter beside it."""
    if adapter := adapter_of(cfg):
        return base_of(adapter, cfg), adapter
    trained = Path(cfg.train.output_dir) if cfg.train.output_dir else None
    if trained and (trained / "config.json").is_file():
        return trained, None
    require_ready(cfg, "chat")
    assert cfg.model.model_name_or_path  # require_ready saw to it
    notice(f"no finished run in output_dir; answering with {cfg.model.model_name_or_path}.")
    return locate_model(cfg.model.model_name_or_path, cfg.model.download_hub), None


def _model_in(folder: Path, cfg: RunConfig) -> tuple[Path, Path | None]:
    """A folder that was named, with the adapter of lora_path; an adapter folder stands beside the base it names."""
    return (base_of(folder, cfg), folder) if is_adapter(folder) else (folder, adapter_of(cfg))


def _typed() -> Iterator[str]:
    """Lines from the keyboard or a pipe; Ctrl-D ends."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - imported, it gives `input` a line editor and a history

    notice("one line is one message; /help lists commands; Ctrl-C stops an answer; Ctrl-D ends.")
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print()
            return

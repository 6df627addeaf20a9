"""Keys of answering: how the verbs `eval` and `chat` generate. Answers are greedy in this version."""

from dataclasses import dataclass

from erniekit.config.keys import inert, key, later


@dataclass(frozen=True)
class GenerateConfig:
    """Length and choice of generated tokens. None of it touches training."""

    max_new_tokens: int = key(1024, "Longest answer in tokens.", least=1, resume="free")
    eval_generate: int = key(0, "Prompts of the evaluation set that `eval` answers.", least=0, resume="free")
    temperature: float | None = later(
        None, "Sampling temperature; null or 0: greedy.", there=0.95, idle=(0,), least=0, resume="free"
    )
    top_p: float | None = inert(None, "Nucleus of sampling; greedy answers need none.", there=0.7, idle=(1,))
    min_tokens: int = later(0, "Shortest answer in tokens.", least=0, resume="free")
    frequency_penalty: float = later(0.0, "Penalty on tokens by how often they came.", resume="free")
    presence_penalty: float = later(0.0, "Penalty on tokens that came.", resume="free")
    repetition_penalty: float = later(1.0, "Factor against tokens that came.", resume="free", above=0)
    enable_thinking: bool = later(False, "Let a thinking model think.", resume="free")
    stream: bool = inert(True, "`chat` always prints an answer while it is made.")
    stream_options: dict | None = inert(None, "Options of a streaming server.")

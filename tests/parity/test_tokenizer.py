"""A tokenizer folder that is written here means the same to transformers: ids, text, and prompts."""

from __future__ import annotations

from pathlib import Path

import chatterbot_corpus
import pytest
import yaml

from erniekit.data.chat import encode_prompt
from erniekit.data.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    folder = Path(chatterbot_corpus.__file__).parent / "data"
    files = [*sorted((folder / "english").glob("*.yml")), *sorted((folder / "chinese").glob("*.yml"))]
    talks = [talk for file in files for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]]
    return [str(line) for talk in talks for line in talk]


@pytest.mark.parametrize("model_type", ["ernie4_5", "ernie4_5_moe", None])
def test_ids_text_and_prompts(corpus: list[str], model_type: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer  # an optional oracle

    ours = train_tokenizer(corpus, tmp_path, vocab_size=4096)
    if model_type is not None:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*corpus, "a  b\n\n c\t", "0123456789 1+1=2", "😀 ünï 罕", " x ", "\r\n"]:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    marked = "a<|im_start|>b</s> c"
    assert theirs(marked).input_ids == ours.encode(marked, allow_special=True)
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id)
    assert roles == (ours.bos_id, ours.eos_id, ours.pad_id, ours.cls_id, ours.sep_id)
    messages = [{"role": "system", "content": "Be brief."}]
    for query, answer in zip(corpus[:20:2], corpus[1:20:2], strict=True):
        messages.append({"role": "user", "content": query})
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert prompt == encode_prompt(ours, messages)
        messages.append({"role": "assistant", "content": answer})

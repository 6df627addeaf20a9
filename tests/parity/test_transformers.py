"""What we write is what transformers reads: logits, tokens and chat text of exported folders (extra `parity`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import erniekit
from erniekit.checkpoint.convert import convert
from erniekit.checkpoint.create import create
from erniekit.data.chat import choose_template, render

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TEXTS = ["Hello, world!\n  two  spaces", "你好，世界。第一行\n第二行", "1+1=2 <|end_of_sentence|>x"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "第一行\n第二行"},
]

# torch lives in a process of its own: two OpenMP runtimes in one process slow each other down.
_ORACLE = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, request, answer = sys.argv[1:]
ask = json.load(open(request))
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
out = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}
with torch.no_grad():
    out["logits"] = model.eval()(torch.tensor(ask["ids"])).logits.tolist()
if ask["texts"]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out["tokens"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ask["texts"]]
    out["chat"] = tokenizer.apply_chat_template(ask["messages"], tokenize=False, add_generation_prompt=True)
json.dump(out, open(answer, "w"))
"""


def oracle(folder: Path, tmp_path: Path, *, ids: np.ndarray, texts: list[str] = ()) -> dict:
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps({"ids": ids.tolist(), "texts": list(texts), "messages": MESSAGES}))
    subprocess.run([sys.executable, "-c", _ORACLE, str(folder), str(request), str(answer)], check=True)
    return json.loads(answer.read_text())


def largest_difference(found: dict, expected: np.ndarray) -> float:
    assert found["missing"] == [], found["missing"]
    return float(np.abs(np.array(found["logits"], np.float32) - expected).max())


@pytest.mark.parametrize("preset", ["micro-moe", "micro-dense", "tiny-moe"])
def test_a_written_pt_folder_gives_the_same_logits(preset, tmp_path, record_property):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 3))
    create(preset, tmp_path / "model", layout="pt", tokenizer_texts=[text], seed=3)
    ids = np.random.default_rng(0).integers(3, 300, (2, 17))
    expected = erniekit.load_model(tmp_path / "model")(paddle.to_tensor(ids)).numpy()
    found = oracle(tmp_path / "model", tmp_path, ids=ids, texts=TEXTS)
    difference = largest_difference(found, expected)
    record_property("max_logit_difference", difference)
    print(f"{preset}: max|d logits| {difference:.2e}")
    assert difference <= 2e-5 and found["unexpected"] == []
    tokenizer = erniekit.load_tokenizer(tmp_path / "model")
    assert [tokenizer.encode(text, allow_special=True) for text in TEXTS] == found["tokens"]
    assert render(MESSAGES, choose_template(tokenizer)) == found["chat"]


@pytest.mark.parametrize("case", ["dense_mha", "dense_tied", "moe_shared", "moe_mtp", "moe_shared_bf16_sharded"])
def test_a_converted_erniekit_folder_gives_the_same_logits(case, tmp_path):
    convert(GOLDEN / "paddle_real" / case, tmp_path / "pt", to="pt")
    ids = np.random.default_rng(1).integers(3, 160, (2, 20))
    expected = erniekit.load_model(tmp_path / "pt")(paddle.to_tensor(ids)).numpy()
    difference = largest_difference(oracle(tmp_path / "pt", tmp_path, ids=ids), expected)
    print(f"{case}: max|d logits| {difference:.2e}")
    assert difference <= 2e-5

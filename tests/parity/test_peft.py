"""What we write is what PEFT and transformers read: adapter folders, merged models (extra `parity`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.adapters.lora import adapter_parameters, add_adapters
from erniekit.adapters.targets import resolve_targets
from erniekit.checkpoint.adapter_folder import AdapterFolder
from erniekit.checkpoint.adapter_io import save_adapter
from erniekit.checkpoint.convert import write_converted
from erniekit.checkpoint.ernie45 import memory_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.merge import Merged, Recipe
from erniekit.checkpoint.model_io import build_model
from erniekit.config.adapter import AdapterConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft: bash scripts/run_tests.sh --parity"),
]
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
IDS = np.arange(3, 43).reshape(2, 20)

# torch lives in a process of its own: two OpenMP runtimes in one process slow each other down.
_ORACLE = """
import json, sys, warnings
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
cases, ids = json.load(open(sys.argv[1]))
ids = torch.tensor(ids)
def of(model):
    with torch.no_grad():
        return model.eval()(ids).logits.tolist()
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
answer = {}
for name, (base, adapter, merged) in cases.items():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(base), adapter)
    answer[name] = {
        "said": [str(w.message) for w in said if "adapter" in str(w.message)], "adapter": of(model),
        "merged": of(load(merged)),
    }
json.dump(answer, open(sys.argv[2], "w"))
"""

CASES = {
    "everything": ("moe/shared_tied/pt", {}, None),
    "rslora, no shared": ("moe/noshared_untied/pt", {"rslora": True}, ["experts.gate_up_proj", "o_proj"]),
    "down alone": ("moe/shared_tied/pt", {}, ["experts.down_proj"]),
    "dora": ("dense/untied_bias/pt", {"dora": True}, None),
    "dora, experts": ("moe/shared_tied/pt", {"dora": True}, ["attention"]),
    "pissa": ("dense/tied/pt", {"init": "pissa"}, None),
    "whole modules": ("dense/tied/pt", {"modules_to_save": ("model.embed_tokens", "model.norm")}, ["attention"]),
    "whole head": ("dense/untied_bias/pt", {"modules_to_save": ("lm_head",)}, ["mlp"]),
}


def drawn(base: Folder, config: AdapterConfig):
    """The base with an adapter of random numbers beside it."""
    model = build_model(base, base.config)
    add_adapters(model, config, seed=3)
    for i, p in enumerate(adapter_parameters(model).values()):
        if not p.stop_gradient:
            paddle.seed(i)
            p.set_value(p + 0.05 * paddle.randn(p.shape))
    model.eval()
    return model


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> dict[str, tuple[np.ndarray, dict]]:
    """Our logits of each case, and what PEFT and transformers make of the folders: one process for all."""
    folder, expected, folders = tmp_path_factory.mktemp("peft"), {}, {}
    for number, (case, (path, settings, asked)) in enumerate(CASES.items()):
        base, adapter, merged = Folder.open(GOLDEN / path), folder / f"{number}-adapter", folder / f"{number}-merged"
        names = list(memory_table(base.config, head_bias=base.has_head_bias).tensors)
        config = AdapterConfig(rank=4, alpha=8, targets=resolve_targets(names, asked), **settings)
        model = drawn(base, config)
        with paddle.no_grad():
            expected[case] = model(paddle.to_tensor(IDS)).numpy()
        save_adapter(model, adapter, config=config, form="peft", base=base, dtype="float32")
        source = Merged(base, [AdapterFolder.open(adapter).on(base.disk_config)])
        write_converted(merged, base, to="pt", source=source)
        folders[case] = str(base.path), str(adapter), str(merged)
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps([folders, IDS.tolist()]))
    subprocess.run([sys.executable, "-c", _ORACLE, str(request), str(answer)], check=True)
    found = json.loads(answer.read_text())
    return {case: (expected[case], found[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_peft_and_transformers_compute_what_we_do(case, computed, record_property):
    expected, found = computed[case]
    differences = {
        kind: float(np.abs(np.array(found[kind], np.float32) - expected).max()) for kind in ("adapter", "merged")
    }
    record_property("max_logit_difference", differences)
    print(case, differences)
    assert found["said"] == []
    assert max(differences.values()) <= 2e-5


_METHODS = """
import json, sys
import torch
from peft.utils.merge_utils import dare_linear, task_arithmetic, ties
deltas, weights, density = json.load(open(sys.argv[1]))
deltas, weights = [torch.tensor(d) for d in deltas], torch.tensor(weights)
out = {"linear": task_arithmetic(deltas, weights), "ties": ties(deltas, weights, density),
       "dare": dare_linear(deltas, weights, 1.0)}
json.dump({name: value.tolist() for name, value in out.items()}, open(sys.argv[2], "w"))
"""


def test_methods_are_pefts(tmp_path):
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((24, 36)).astype(np.float32) for _ in range(3)]
    weights, density = (0.7, 0.4, -0.2), 0.3
    (tmp_path / "request.json").write_text(json.dumps([[d.tolist() for d in deltas], weights, density]))
    words = [str(tmp_path / "request.json"), str(tmp_path / "answer.json")]
    subprocess.run([sys.executable, "-c", _METHODS, *words], check=True)
    found = json.loads((tmp_path / "answer.json").read_text())
    for method, wanted in found.items():
        recipe = Recipe(weights, method, 1.0 if method == "dare" else density)
        np.testing.assert_allclose(recipe.combined(deltas, "atom"), wanted, rtol=0, atol=1e-6)

"""`verify` names everything that is missing, extra or corrupt, and loads no paddle to do so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from erniekit.checkpoint.create import create
from erniekit.checkpoint.verify import verify

ROOT = Path(__file__).parents[3]


@pytest.fixture
def sound(tmp_path):
    create("micro-moe", tmp_path / "model", layout="paddle", max_shard_bytes=100_000)
    assert verify(tmp_path / "model") == []
    return tmp_path / "model"


def test_a_flipped_bit_in_the_weights(sound):
    shard = sorted(sound.glob("model-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    (problem,) = verify(sound)
    assert shard.name in problem
    assert "not what was written" in problem


def test_a_lost_shard_is_named_by_manifest_and_index(sound):
    shard = sorted(sound.glob("model-*.safetensors"))[0]
    shard.unlink()
    problems = "\n".join(verify(sound))
    assert f"{shard}: missing" in problems
    assert f"{shard.name} is named in model.safetensors.index.json and missing" in problems


def test_a_config_that_does_not_belong_to_the_weights(sound):
    config = json.loads((sound / "config.json").read_bytes())
    (sound / "config.json").write_text(json.dumps(config | {"moe_num_experts": 5}))
    problems = verify(sound)
    assert any("config.json" in problem for problem in problems)  # the manifest
    assert any("experts.4.down_proj.weight' [32, 64] is missing" in problem for problem in problems)
    assert any("mlp.gate.weight' has shape [64, 4]; config.json asks for [64, 5]" in problem for problem in problems)


def test_a_published_folder_without_a_manifest(golden):
    for case in ("paddle_real/moe_mtp", "dense/tied/pt", "vl/vl_moe/paddle"):
        assert verify(golden / case) == []


def test_no_folder(tmp_path):
    assert "no such model folder" in verify(tmp_path / "absent")[0]


def test_converting_verifying_and_creating_load_no_paddle(tmp_path):
    code = (
        "import sys\n"
        "from erniekit.checkpoint.convert import convert\n"
        "from erniekit.checkpoint.create import create\n"
        "from erniekit.checkpoint.verify import verify\n"
        "create('micro-moe', sys.argv[1] + '/a'); convert(sys.argv[1] + '/a', sys.argv[1] + '/b', to='paddle')\n"
        "assert verify(sys.argv[1] + '/b') == []\n"
        "assert 'paddle' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)

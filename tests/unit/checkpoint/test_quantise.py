"""Quantised folders as they are written: what is in them, that a stop costs nothing, and that errors leave nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint import hf_files, quantise
from erniekit.checkpoint.create import create
from erniekit.checkpoint.ernie45 import Table, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.journal import Journal
from erniekit.checkpoint.quantise import Statistics, write_quantised
from erniekit.checkpoint.quantised import CACHE_SCALES, Scheme, input_scale
from erniekit.checkpoint.quantised_folder import QuantisedFolder, layout_fields
from erniekit.checkpoint.save import JOURNAL, REPORT_FILE, STAGE
from erniekit.checkpoint.source import made
from erniekit.checkpoint.verify import verify
from erniekit.config import families
from erniekit.precision.encoders import ACTIVATION_SCALE

CASES = {
    "wint8": {}, "wint8 by groups": {"group_size": 16}, "wint4": {}, "wint4 by groups": {"group_size": 32},
    "w4a8": {}, "w4a8c8": {}, "fp8": {},
}  # fmt: skip


def drawn(folder: Folder, scheme: Scheme) -> Statistics:
    """Scales for everything that could have one."""
    random = np.random.default_rng(3)
    opened = layout_fields(_table(folder), scheme, folder.disk_config)
    cache = [name for fields in opened.values() for name in fields if name.endswith(CACHE_SCALES)]
    width = folder.disk_config.num_key_value_heads * folder.disk_config.head_dim
    return Statistics(
        100,
        {name: float(random.uniform(1, 5)) for name in opened},
        {name: random.uniform(1, 5, _table(folder).tensors[name].shape[0]).astype("float32") for name in opened},
        {name: random.uniform(1, 5, width).astype("float32") for name in cache},
    )


def _table(folder: Folder) -> Table:
    return layout_table(folder.disk_config, "paddle", folder.form.in_layout(folder.disk_config, "paddle"))


def write(source: Path, target: Path, case: str, *, max_shard_bytes: int = 10**9, every: float = 5.0, progress=None):
    folder = Folder.open(source)
    scheme = Scheme.new(case.partition(" ")[0], folder.disk_config, **CASES[case])
    return write_quantised(
        target, folder, scheme, source=folder, statistics=lambda: drawn(folder, scheme), identity={"of": str(source)},
        max_shard_bytes=max_shard_bytes, progress=progress or (lambda *_: None), every=every,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_decoded_weights_are_what_the_encoder_said(model, tmp_path, case):
    """And the report is true, scales are those that were seen, and what is not quantised has its own numbers."""
    source, target = model("micro-moe"), tmp_path / "out"
    report = write(source, target, case).report
    assert verify(target) == []
    found, folder = QuantisedFolder.open(target), Folder.open(source)
    seen, table = drawn(folder, found.scheme), _table(folder)
    rows = {row["tensor"]: row for row in report["tensors"]}
    assert json.loads((target / REPORT_FILE).read_bytes()) == report and len(rows) == 28
    errors = squares = 0.0
    for name, tensor in table.tensors.items():
        weight, encoder = made(tensor, np.dtype(np.float32), folder), found.scheme.encoder_of(name)
        decoded = found.read_tensor(name)
        if encoder is None:
            assert name not in rows
            np.testing.assert_array_equal(decoded.astype(np.float32), weight)
            continue
        expected = encoder.decode(encoder.encode(weight, name=name), num_in=len(weight))
        assert decoded.tobytes() == expected.tobytes()
        error = float(np.square(decoded.astype(np.float64) - weight).sum())
        assert rows[name]["mse"] == pytest.approx(error / weight.size, rel=1e-5)
        assert rows[name]["kind"] == found.scheme.kind_of(name)
        errors, squares = errors + error, squares + float(np.square(weight.astype(np.float64)).sum())
        if found.scheme.rounds_inputs(name):
            scale = found.arrays(name)[ACTIVATION_SCALE]
            np.testing.assert_array_equal(scale, input_scale(found.scheme.kind_of(name), seen.largest[name]))
    assert report["relative_error"] == pytest.approx((errors / squares) ** 0.5, rel=1e-5)
    stored = sum(len(file.read(name).tobytes()) for name, file in found.stored.items())
    numbers = sum(int(np.prod(tensor.shape)) for tensor in table.tensors.values())
    assert report["bytes"] == stored and report["bits_per_weight"] == pytest.approx(8 * stored / numbers)
    if case == "w4a8c8":
        keys = found.cache_scales(2)[0]
        np.testing.assert_array_equal(keys, seen.cache["ernie.layers.2.self_attn.cachek_matmul.activation_scale"])
    for atom in folder.table.atoms:  # the folder reads as any other, atom by atom
        assert found.read(atom).shape == folder.read(atom).shape


@pytest.mark.parametrize("family", ["micro-dense", "micro-moe"])
def test_both_layouts_make_the_same_bytes(model, tmp_path, family):
    for layout in ("pt", "paddle"):
        write(model(family, layout=layout, name=layout), tmp_path / f"{layout}-out", "wint4", max_shard_bytes=40_000)
    one, other = (content(tmp_path / f"{layout}-out") for layout in ("pt", "paddle"))
    shards = [name for name in one if name.endswith(".safetensors")]
    assert len(shards) > 2 and {name: one[name] for name in shards} == {name: other[name] for name in shards}


class Stop(BaseException):
    """What a signal raises."""


@pytest.mark.parametrize("after", [1, 7, 30, 38])
def test_an_export_that_was_stopped_goes_on(model, tmp_path, capsys, monkeypatch, after):
    """Bit for bit, and nothing that is done is done again."""
    source, target = model("micro-moe"), tmp_path / "out"
    write(source, tmp_path / "straight", "w4a8c8", max_shard_bytes=60_000)

    def stop(_done: int, _total: int, note: str) -> None:
        if note.startswith(f"{after}/"):
            raise Stop

    with pytest.raises(Stop):
        write(source, target, "w4a8c8", max_shard_bytes=60_000, every=0, progress=stop)
    assert os.listdir(target) == [STAGE]
    with open(target / STAGE / ".journal", "a") as journal:
        journal.write('{"rows": [{"tensor": "cut sho')  # as a kill would leave it
    again: list[str] = []
    real = quantise._Work._tensor
    monkeypatch.setattr(
        quantise._Work, "_tensor", lambda self, name, shared: again.append(name) or real(self, name, shared)
    )
    write(source, target, "w4a8c8", max_shard_bytes=60_000)
    assert content(target) == content(tmp_path / "straight")
    assert f"going on with an export that was interrupted; {after} tensors" in capsys.readouterr().err
    assert len(again) == len(_table(Folder.open(source)).tensors) - after


def test_a_line_that_a_kill_cut_hides_none_behind_it(tmp_path):
    journal = Journal(tmp_path, "one")
    journal.begin()
    for name in ("a", "b"):
        journal.add(rows=[{"tensor": name}])
        with open(journal.path, "a") as file:
            file.write('{"rows": [{"tensor": "cut sho')
    again = Journal(tmp_path, "one")
    assert again.goes_on and list(again.rows) == ["a", "b"]
    other = Journal(tmp_path, "another")
    assert other.is_other and not other.rows


def test_an_export_that_was_stopped_while_it_appeared_goes_on(model, tmp_path, monkeypatch):
    """Before each of the steps by which a folder appears: the moves, and the removal of what was hidden."""
    source = model("micro-moe")
    write(source, tmp_path / "straight", "wint8", max_shard_bytes=60_000)
    straight = content(tmp_path / "straight")
    endings = {"goes on": 0, "is whole": 0}
    for number in itertools.count():
        target, steps = tmp_path / str(number), itertools.count()

        def counted(real, path, target=target, steps=steps, number=number):
            def step(*args, **kwargs):
                if target in Path(path(*args)).parents and next(steps) == number:
                    raise Stop
                return real(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace, lambda _src, dst, **_: dst))
            patch.setattr(os, "unlink", counted(os.unlink, lambda path, **_: path))
            patch.setattr(os, "rmdir", counted(os.rmdir, lambda path, **_: path))
            try:
                write(source, target, "wint8", max_shard_bytes=60_000)
                break
            except Stop:
                pass
        if (target / STAGE / JOURNAL).exists():
            endings["goes on"] += 1
            write(source, target, "wint8", max_shard_bytes=60_000)
            assert content(target) == straight
        else:
            endings["is whole"] += 1
            (target / STAGE).rmdir()
            assert content(target) == straight
    assert endings["goes on"] > len(straight) and endings["is whole"] == 1


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.quantise import Statistics, write_quantised
from erniekit.checkpoint.quantised import Scheme
from erniekit.checkpoint.save import JOURNAL, STAGE

def export(target):
    folder = Folder.open(sys.argv[1])
    scheme = Scheme.new("wint4", folder.disk_config)
    write_quantised(
        Path(target), folder, scheme, source=folder, statistics=Statistics, identity={}, max_shard_bytes=60_000,
        progress=lambda *_: None, every=0.0,
    )

def seconds_of(target, patience):
    started = time.monotonic()
    if not (child := os.fork()):
        export(target)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    target = Path(target)
    through = (target / "config.json").exists() and not (target / STAGE / JOURNAL).exists()
    assert through or status, "an export that ended without an error is not there"
    return time.monotonic() - started, through

whole, _ = seconds_of(sys.argv[2] + "/straight", None)
kills = 0
for number in range(3):
    patience = 0.0
    while not seconds_of(f"{sys.argv[2]}/killed-{number}", random.uniform(0, patience))[1]:
        kills, patience = kills + 1, patience + whole / 4
print(kills)
"""


def test_kill_9_at_any_moment_costs_nothing(model, tmp_path):
    """Exports that are killed again and again, each time after longer, until they are through."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, model("micro-moe"), tmp_path],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    straight = content(tmp_path / "straight")
    assert len(straight) > 5 and int(done.stdout) > 6
    assert "going on with an export that was interrupted" in done.stderr
    for number in range(3):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / f"killed-{number}" / STAGE).rmdir()  # empty, if the last kill came just before the end
        assert content(tmp_path / f"killed-{number}") == straight


def test_other_settings_begin_anew(model, tmp_path, capsys):
    source, target = model("micro-moe"), tmp_path / "out"

    def stop(done: int, _total: int, _note: str) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        write(source, target, "wint8", every=0, progress=stop)
    write(source, target, "wint4")
    assert "with other settings was not finished there" in capsys.readouterr().err
    assert QuantisedFolder.open(target).scheme.format.name == "wint4"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.experts.3.down_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_leaves_nothing(model, change, tmp_path, bad, name):
    def spoil(tensors):
        tag, array = tensors[name]
        array = array.copy()
        array[3, 5] = bad
        tensors[name] = (tag, array)

    source, target = model("micro-moe", dtype="float32"), tmp_path / "new" / "out"
    change(source, spoil)
    with pytest.raises(CheckpointError, match=f"{source / 'model.safetensors'}: '{name}' holds NaN or infinity"):
        write(source, target, "wint4")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("which", ["largest", "cache"])
def test_a_calibration_that_is_not_finite_is_told(model, tmp_path, monkeypatch, which):
    sound = drawn

    def spoilt(folder: Folder, scheme: Scheme) -> Statistics:
        seen = sound(folder, scheme)
        return replace(seen, **{which: {name: value * np.nan for name, value in getattr(seen, which).items()}})

    monkeypatch.setattr(sys.modules[__name__], "drawn", spoilt)
    with pytest.raises(CheckpointError, match=r"the calibration of .* ernie.layers.* holds NaN or infinity"):
        write(model("micro-moe"), tmp_path / "new" / "out", "w4a8c8")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_told_and_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_files.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(model("micro-moe"), tmp_path / "new" / "out", "wint8")
    assert not (tmp_path / "new").exists()


def test_only_an_empty_folder_is_written_into(model, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        write(model("micro-moe"), target, "wint8")
    assert os.listdir(target) == ["mine.txt"]


def test_a_quantised_folder_is_not_quantised_again(model, tmp_path):
    write(model("micro-moe"), tmp_path / "out", "wint8")
    with pytest.raises(CheckpointError, match="is a quantised model"):
        write(tmp_path / "out", tmp_path / "again", "wint8")


def test_damage_is_seen(model, tmp_path, read_raw):
    write(model("micro-moe"), tmp_path / "out", "wint4")
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert any("sha256" in problem for problem in verify(tmp_path / "out"))
    file.write_bytes(whole.replace(b"qkv_proj.weight_scale", b"qkv_proj.weight_scald"))
    said = "\n".join(verify(tmp_path / "out"))
    assert "weight_scale' is missing" in said and "weight_scald' does not belong" in said


WIDE = families.FAMILIES["micro-moe"] | dict(
    vocab_size=2048, hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, num_hidden_layers=4, moe_num_experts=16, moe_intermediate_size=512, moe_layer_start_index=1,
    moe_layer_end_index=3,
)  # fmt: skip

EXPORT = """
import sys
from pathlib import Path
from erniekit.checkpoint.create import create
from erniekit.checkpoint.ernie45 import Table, layout_table
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.quantise import Statistics, write_quantised
from erniekit.checkpoint.quantised import Scheme

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

def export(source, target):
    folder = Folder.open(source)
    scheme = Scheme.new("wint4", folder.disk_config)
    write_quantised(
        Path(target), folder, scheme, source=folder, statistics=Statistics, identity={}, max_shard_bytes=8_000_000,
        progress=lambda *_: None,
    )

export(sys.argv[1], sys.argv[2] + "-first")  # libraries and threads come to life
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
export(sys.argv[3], sys.argv[2])
print((status("VmHWM:") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
def test_peak_memory_is_a_few_times_the_largest_tensor(model, tmp_path, monkeypatch):
    """A model of 94 MB in bf16, whose largest tensors have 6 MB in fp32."""
    monkeypatch.setitem(families.FAMILIES, "wide", WIDE)
    create("wide", tmp_path / "wide", dtype="bfloat16", max_shard_bytes=16_000_000)
    largest = 512 * 2 * 1536 * 4
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXPORT, model(), tmp_path / "out", tmp_path / "wide"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 6 * largest < sum(file.stat().st_size for file in (tmp_path / "wide").iterdir()) / 2

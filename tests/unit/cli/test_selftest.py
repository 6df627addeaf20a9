"""What the self-test does when a check fails."""

import subprocess

import pytest

from erniekit.cli import selftest
from erniekit.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("erniekit.base.runtime.prepare", lambda **_: None)

    def run(*words, code):
        assert main(["selftest", *map(str, words)]) == code
        return capsys.readouterr()

    return run


def test_the_first_failure_ends_it_with_what_the_verb_said(run, monkeypatch):
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="first line\nthe disk melted\n")
    monkeypatch.setattr(selftest.subprocess, "run", lambda *_, **__: broken)
    found = run(code=2)
    assert found.out.splitlines()[1].split()[-1] == "FAILED" and len(found.out.splitlines()) == 2
    assert "error: init: tokenizer and model: `erniekit init` ended with exit code 1" in found.err
    assert "the disk melted" in found.err


def test_weights_that_differ_after_a_resume_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest, "_erniekit", lambda *_, **__: "")
    checks = selftest._Checks(tmp_path)
    for folder, content in ((checks.whole, b"a"), (checks.stopped, b"b")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(selftest.CheckFailed, match="the weights differ"):
        checks._resume()
    with pytest.raises(selftest.CheckFailed, match=r"in place of 'The sky is blue\.'"):
        checks._chat()


def test_preferences_that_start_elsewhere_or_teach_nothing_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest, "_erniekit", lambda *_, **__: "")
    checks = selftest._Checks(tmp_path)
    checks.preferred.mkdir()
    log = checks.preferred / "train_log.jsonl"
    for losses, told in (((0.7, 0.1), "begins at 0.7000 in place of ln 2"), ((0.693147, 0.69), "to 0.690 only")):
        log.write_text("".join(f'{{"step": 1, "loss": {loss}}}\n' for loss in losses))
        with pytest.raises(selftest.CheckFailed, match=told):
            checks._prefer()


def test_a_verb_that_hangs_is_a_failure(monkeypatch):
    def hang(*_, **__):
        raise subprocess.TimeoutExpired("erniekit", 1)

    monkeypatch.setattr(selftest.subprocess, "run", hang)
    with pytest.raises(selftest.CheckFailed, match="`erniekit verify` was not done"):
        selftest._erniekit("verify")


def test_keep_wants_a_new_folder(run, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is there already and not empty" in run("--keep", tmp_path, code=2).err

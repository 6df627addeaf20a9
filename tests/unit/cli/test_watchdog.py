"""A rank that hangs is named with the line where it stands: stand-in programs that note what ranks would note."""

import pytest

from tests.unit.cli.test_supervisor import ROOT, run, textwrap

NOTE = f"""
sys.path.insert(0, {str(ROOT)!r})
from erniekit.cli.watchdog import answer_watchdog
from erniekit.parallel.pulse import Pulse
def note(rank):
    global pulse
    answer_watchdog(folder, rank)
    pulse = Pulse(folder, rank=rank)
"""
WAITS = NOTE + "note({}); pulse.step(4); pulse.enter('all_reduce', 'world'); mark(); time.sleep(60)"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The supervisor of test_supervisor.py, with a watchdog of little patience."""
    from tests.unit.cli import test_supervisor

    program = textwrap.dedent(test_supervisor.SUPERVISOR)
    program = program.replace("import Rank", "import Watchdog, Rank")
    watched = program.replace("world=len(ranks))", "world=len(ranks), watch=Watchdog(folder, seconds=1))")
    assert watched != program
    monkeypatch.setattr(test_supervisor, "SUPERVISOR", watched)


def test_the_rank_that_hangs_is_named_and_where_it_stands(tmp_path):
    hangs = NOTE + "def computes_for_ever():\n time.sleep(60)\nnote(1); computes_for_ever()"
    code, _, err = run(tmp_path, WAITS.format(0), hangs)
    assert code == 1
    assert "rank 1 stands at:" in err and "in computes_for_ever" in err
    assert "rank 1, before the first step: no collective yet" in err
    assert "rank 0, step 4: waits in all_reduce 'world' (number 1)" in err
    assert "error: nothing has happened between ranks for 1 seconds: the others wait for rank 1." in err


def test_a_stopped_process_is_named_though_it_is_not_behind(tmp_path):
    code, _, err = run(tmp_path, WAITS.format(0), WAITS.format(1).replace("time.sleep", "os.kill(os.getpid(), 19)#"))
    assert code == 1
    assert "the others wait for rank 1." in err
    assert "rank 1 does not answer at all" in err


def test_a_collective_that_gave_up_names_the_late_rank(tmp_path):
    gives_up = WAITS.format(0).replace("time.sleep(60)", "say(0, 'TIMEOUT\\n'); sys.exit(1)")
    code, _, err = run(tmp_path, gives_up, NOTE + "note(1); time.sleep(60)")
    lines = err.splitlines()
    assert code == 1
    assert lines[0].startswith("rank 1, before the first step: no collective yet")
    assert lines[0].endswith("the others wait for it")
    assert lines[2:] == ["TIMEOUT", "error: rank 0 of 2 ended with exit code 1."]


def test_who_notes_something_does_not_hang(tmp_path):
    busy = NOTE + "note({})\nfor _ in range(25): pulse.leave(pulse.enter('meet', 'data')); time.sleep(.1)"
    assert run(tmp_path, busy.format(0), busy.format(1)) == (0, "", "")

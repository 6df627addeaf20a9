"""A rank that hangs is named with the line where it stands, on whatever machine; one that works is left alone.
Stand-in programs note what ranks would note."""

import time

import pytest

from erniekit.cli.watchdog import Sign, Watchdog
from erniekit.parallel.pulse import Beat
from tests.unit.cli.test_machines import ends, pair  # noqa: F401 - pair is a fixture
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
WAITS = NOTE + "note({})\nwith pulse.step(4):\n pulse.enter('all_reduce', 'world'); mark(); time.sleep(60)"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The supervisors of test_supervisor.py and test_machines.py, with watchdogs of little patience."""
    from tests.unit.cli import test_machines, test_supervisor

    for module, name, end in (
        (test_supervisor, "SUPERVISOR", "world=len(ranks)"), (test_machines, "MACHINE", "machines=machines"),
    ):  # fmt: skip
        program = textwrap.dedent(getattr(module, name)).replace("import Rank", "import Watchdog, Rank")
        watched = program.replace(f"{end})", f"{end}, watch=Watchdog(folder, seconds=1))")
        assert watched != program
        monkeypatch.setattr(module, name, watched)


def test_the_rank_that_hangs_is_named_and_where_it_stands(tmp_path):
    hangs = NOTE + "def computes_for_ever():\n time.sleep(60)\nnote(1); computes_for_ever()"
    code, _, err = run(tmp_path, WAITS.format(0), hangs)
    assert code == 1
    assert "rank 1 stands at:" in err and "in computes_for_ever" in err
    assert "rank 1, before the first step, getting ready: no collective yet" in err
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
    assert lines[0].startswith("rank 1, before the first step, getting ready: no collective yet")
    assert lines[0].endswith("the others wait for it")
    assert lines[2:] == ["TIMEOUT", "error: rank 0 of 2 ended with exit code 1."]


def test_who_notes_something_does_not_hang(tmp_path):
    busy = NOTE + "note({})\nfor _ in range(25): pulse.leave(pulse.enter('meet', 'data')); time.sleep(.1)"
    assert run(tmp_path, busy.format(0), busy.format(1)) == (0, "", "")


HANGS = NOTE + "def computes_for_ever():\n time.sleep(60)\nnote({}); computes_for_ever()"


def test_a_rank_of_another_machine_that_hangs_is_named_on_both(pair):  # noqa: F811 - the fixture
    first, second = pair(WAITS.format(0).replace("mark();", ""), HANGS.format(1))
    for code, _, err in (ends(first), ends(second)):
        assert code == 1
        assert "in computes_for_ever" in err and "the others wait for rank 1." in err
        assert "rank 0, step 4: waits in all_reduce 'world' (number 1)" in err


def test_a_rank_that_waits_on_machine_0_for_a_late_one_elsewhere_says_so(pair):  # noqa: F811 - the fixture
    """A gloo collective gives up after 30 seconds; here sooner."""
    gives_up = WAITS.format(0).replace("mark(); time.sleep(60)", "time.sleep(.7); sys.exit(1)")
    first, second = pair(gives_up, HANGS.format(1))
    code, _, err = ends(first)
    assert code == 1
    assert err.startswith("rank 1, before the first step") and "rank 0 of 2 ended with exit code 1" in err
    assert ends(second)[2] == "error: stopped by a failure of machine 0, which machine 0 tells of.\n"


WORKS = """
note({0})
if {0}:
    with pulse.phase("reading"):
        end = time.time() + 4
        while time.time() < end:
            sum(range(1_000_000)), time.sleep(.01)
    pulse.enter("meet", "data"); mark()
else:
    pulse.enter("meet", "data"); follow(0)
"""


def test_who_works_alone_outside_steps_does_not_hang(tmp_path):
    assert run(tmp_path, NOTE + WORKS.format(0), NOTE + WORKS.format(1)) == (0, "", "")


@pytest.mark.parametrize(
    ("phase", "worked", "stopped", "late"),
    [
        ("reading", 1, False, None),  # seconds ago
        ("reading", 9, False, [1]),
        ("", 1, False, [1]),  # in a step nobody works alone for so long
        ("reading", 1, True, [1]),
    ],
)
def test_who_hangs(tmp_path, phase, worked, stopped, late):
    now = time.time()
    watch = Watchdog(tmp_path, seconds=5)
    watch._began = now - 60
    waits = Sign(0, Beat(0, 3, 7, now - 6, True, "meet", "data"), now)
    other = Sign(1, Beat(1, 2, 7, now - 6, False, "meet", "data", phase), now - worked, stopped)
    assert watch.late([waits, other]) == late
    travelled = Sign.of(other.message(), time.time())
    assert watch.late([waits, travelled]) == late and travelled.beat.text(now) == other.beat.text(now)
    assert watch.late([Sign(0, None, now - worked, stopped)]) == ([0] if stopped or worked > 5 else None)

"""Ranks that die, hang, are killed, say what is wrong, and are interrupted: stand-in programs, no Paddle."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from erniekit.cli import supervisor
from erniekit.cli.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[3]
SLEEP = "import time; time.sleep(60)"
SUPERVISOR = """
    import os, sys
    from pathlib import Path
    from erniekit.cli.supervisor import Rank, supervise
    folder, programs = Path(sys.argv[1]), sys.argv[2:]
    head = "import os, pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]); "
    head += "mark = lambda: (folder / 'mark').touch()\\n"
    head += "def follow(seconds):\\n while not (folder / 'mark').exists(): time.sleep(.01)\\n time.sleep(seconds)\\n"
    head += "say = lambda rank, text: (folder / f'rank-{rank}.words').write_text(text)\\n"
    ranks = [
        Rank(number, [sys.executable, "-c", head + program, str(folder)], environment=os.environ,
             log=folder / "logs" / f"rank-{number}.log" if number else None)
        for number, program in enumerate(programs)
    ]
    sys.exit(supervise(ranks, folder=folder, world=len(ranks)))
"""


def start(folder, *programs):
    """A supervisor in a process of its own, with one Python program a rank."""
    words = [sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(folder), *programs]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder, *programs):
    process = start(folder, *programs)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def is_alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_well(tmp_path):
    code, out, err = run(tmp_path, "print('zero')", "print('one')", "print('two', file=sys.stderr)")
    assert (code, out, err) == (0, "zero\n", "")
    assert (tmp_path / "logs" / "rank-1.log").read_text().splitlines()[1:] == ["one"]
    assert (tmp_path / "logs" / "rank-2.log").read_text().splitlines()[1:] == ["two"]


def test_the_first_failure_is_told_and_the_others_end(tmp_path):
    """Rank 0 fails because rank 1 has, and is seen first."""
    started = time.monotonic()
    first = "say(1, 'Traceback of one\\n'); mark(); time.sleep(.3); sys.exit(3)"
    follows = "follow(.1); say(0, 'Traceback of zero\\n'); sys.exit(1)"
    stubborn = f"(folder / 'pid').write_text(str(os.getpid())); signal.signal(15, signal.SIG_IGN); {SLEEP}"
    code, out, err = run(tmp_path, follows, first, stubborn)
    log = tmp_path / "logs" / "rank-1.log"
    assert (code, out) == (3, "")
    assert err == f"Traceback of one\nerror: rank 1 of 3 ended with exit code 3. Its log: {log}.\n"
    assert time.monotonic() - started < 10
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_rank_without_last_words_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_text("of an earlier life\n")
    code, _, err = run(tmp_path, SLEEP, "print(*range(100), sep='\\n'); sys.stdout.flush(); os._exit(255)")
    assert code == 255
    assert err.splitlines()[:-1] == [str(number) for number in range(80, 100)]
    assert (tmp_path / "logs" / "rank-1.log").read_text().startswith("of an earlier life\n== rank 1")


def test_what_the_user_can_mend_is_said_once(tmp_path):
    late, *others = (f"say({rank}, 'error: no such key\\n'); mark(); sys.exit(2)" for rank in range(3))
    assert run(tmp_path, f"follow(.8); {late}", *others) == (2, "", "error: no such key\n")


def test_the_rank_that_differs_is_named(tmp_path):
    code, _, err = run(tmp_path, SLEEP, "say(1, 'error: no such file\\n'); sys.exit(2)")
    assert code == 2
    assert err.startswith("error: no such file\nerror: rank 1 of 2 ended with exit code 2. Its log: ")


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("os.kill(os.getpid(), 9)", 137, "was killed by signal 9 (SIGKILL), as the system does when memory runs out"),
        ("os.abort()", 134, "was killed by signal 6 (SIGABRT)"),
        ("say(1, 'Traceback\\nMemoryError\\n'); sys.exit(1)", 1, "ran out of memory (exit code 1)"),
    ],
)
def test_how_a_rank_died_is_said_in_words(tmp_path, program, code, words):
    follows = "follow(.3); say(0, 'connection lost'); sys.exit(1)"
    found, _, err = run(tmp_path, follows, f"mark(); {program}")
    assert found == code
    assert f"rank 1 of 2 {words}" in err
    assert "connection lost" not in err


def test_a_rank_that_the_system_killed_for_memory(tmp_path, monkeypatch, capsys):
    """The system counts such kills; and how much the rank held is told."""
    kills = iter([4, 5])
    monkeypatch.setattr(supervisor, "kills_for_memory", lambda: next(kills))
    monkeypatch.setattr(supervisor, "memory", lambda: (16 * 2**30, 0))
    monkeypatch.setattr(supervisor, "memory_of", lambda _: 12 * 2**30)
    program = [sys.executable, "-c", "import os, time; time.sleep(.3); os.kill(os.getpid(), 9)"]
    rank = supervisor.Rank(0, program, environment=os.environ, log=None)
    watch = Watchdog(tmp_path, seconds=9)
    assert supervisor.supervise([rank], folder=tmp_path, world=1, watch=watch) == 137
    err = capsys.readouterr().err
    assert "was killed by the system (SIGKILL): memory ran out (it held 12.0 GiB of the 16.0 that there are)." in err
    assert "recompute: true needs less" in err


PATIENT = """
def ask(number, frame):
    print('saving', flush=True); time.sleep(.2); print('saved', flush=True); sys.exit(130)
signal.signal(2, ask); signal.signal(15, ask); print('ready', flush=True); time.sleep(60)
"""


def ready(process, tmp_path):
    """Wait until both ranks can be asked to stop; returns the log of the second."""
    assert process.stdout.readline() == "ready\n"
    log = tmp_path / "logs" / "rank-1.log"
    while "ready" not in log.read_text():
        time.sleep(0.01)
    return log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_request_to_stop_lets_all_ranks_save(tmp_path, number):
    process = start(tmp_path, PATIENT, PATIENT)
    log = ready(process, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + number, "saving\nsaved\n", "")
    assert log.read_text().endswith("ready\nsaving\nsaved\n")


def test_the_second_request_stops_at_once(tmp_path):
    process = start(tmp_path, PATIENT.replace(".2", "60"), PATIENT.replace(".2", "60"))
    ready(process, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (130, "stopped at once; what was saved last stands.\n")


def test_ranks_die_with_their_supervisor(tmp_path):
    process = start(tmp_path, f"print(os.getpid(), flush=True); {SLEEP}", SLEEP)
    rank = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=5)
    deadline = time.monotonic() + 5
    while is_alive(rank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(rank)

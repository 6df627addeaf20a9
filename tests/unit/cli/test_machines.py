"""Supervisors of two machines, both here: they find together, bad news and Ctrl-C travel, and a lost one is missed.
Ranks are stand-in programs, as in test_supervisor.py."""

import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from erniekit.base.errors import MeshError
from erniekit.base.ports import free_port
from erniekit.cli import machines
from erniekit.cli.machines import find, gather, join

ROOT = Path(__file__).resolve().parents[3]
HOME = "127.0.0.1"
SLEEP = "print('ready', flush=True); time.sleep(60)"
MACHINE = """
    import os, sys
    from pathlib import Path
    from erniekit.cli.machines import gather, join
    from erniekit.cli.supervisor import Rank, supervise
    number, port, folder, program = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if number:
        machines = join("127.0.0.1", port, node=number, nodes=2, nproc=1)
    else:
        machines = gather("127.0.0.1", port, nodes=2, nproc=1)
    head = "import os, pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1])\\n"
    words = [sys.executable, "-c", head + program, str(folder)]
    rank = Rank(number, words, environment=os.environ, log=None)
    sys.exit(supervise([rank], folder=folder, world=2, machines=machines))
"""


@pytest.fixture
def pair(tmp_path):
    """pair(program of rank 0, program of rank 1) starts a machine for each."""
    started = []

    def start(*programs):
        port = free_port()
        for number, program in enumerate(programs):
            folder = tmp_path / str(number)
            folder.mkdir()
            words = [sys.executable, "-c", textwrap.dedent(MACHINE), str(number), str(port), str(folder), program]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(words, cwd=ROOT, text=True, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(process):
    """Exit code, stdout and stderr of a machine, within the time that a failure may take."""
    out, err = process.communicate(timeout=10)
    return process.returncode, out, err


def test_all_well(pair):
    first, second = pair("print('zero')", "print('one')")
    assert ends(first) == (0, "zero\n", "")
    assert ends(second) == (0, "one\n", "")


def test_the_cause_on_another_machine_is_told_first(pair):
    """Rank 0 fails because rank 1 has, and is seen first."""
    words, mark = "(folder / 'rank-{0}.words').write_text('Traceback of {0}\\n')\n", "folder.parent / 'mark'"
    cause = words.format(1) + f"({mark}).touch(); time.sleep(.3); sys.exit(3)"
    follows = f"while not ({mark}).exists(): time.sleep(.01)\ntime.sleep(.1)\n" + words.format(0) + "sys.exit(1)"
    first, second = pair(follows, cause)
    told = "Traceback of 1\nerror: rank 1 of 2 ended with exit code 3.\n"
    assert ends(first) == (3, "", told)
    assert ends(second) == (3, "", told)


def test_ctrl_c_reaches_all_machines(pair):
    saving = "signal.signal(2, lambda *_: (print('saved', flush=True), sys.exit(130)))\n"
    first, second = pair(saving + SLEEP, saving + SLEEP)
    assert (first.stdout.readline(), second.stdout.readline()) == ("ready\n", "ready\n")
    second.send_signal(signal.SIGINT)
    assert ends(first) == (130, "saved\n", "")
    assert ends(second) == (130, "saved\n", "")


def test_a_machine_that_is_lost_ends_the_job(pair):
    first, second = pair(SLEEP, SLEEP)
    assert (first.stdout.readline(), second.stdout.readline()) == ("ready\n", "ready\n")
    second.kill()
    assert ends(first) == (1, "", "error: machine 1 is gone: its launcher has closed the connection.\n")


def test_a_machine_that_is_silent_ends_the_job(pair):
    first, second = pair(SLEEP, SLEEP)
    assert (first.stdout.readline(), second.stdout.readline()) == ("ready\n", "ready\n")
    second.send_signal(signal.SIGSTOP)
    code, _, err = ends(first)
    assert code == 1
    assert err.startswith("error: machine 1 has been silent for ")


def test_different_numbers_of_ranks_are_refused_on_both():
    port, problems = free_port(), []

    def call():
        try:
            join(HOME, port, node=1, nodes=2, nproc=3)
        except MeshError as error:
            problems.append(str(error))

    caller = threading.Thread(target=call)
    caller.start()
    with pytest.raises(MeshError, match="machine 1 starts 3 ranks and machine 0 2; all start as many"):
        gather(HOME, port, nodes=2, nproc=2)
    caller.join(5)
    assert "machine 1 starts 3 ranks and machine 0 2" in problems[0]


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(machines, "_COMING", 0.2)
    with pytest.raises(MeshError, match=r"machine 0 does not answer at 127.0.0.1:\d+ .*refused.*NODE_RANK=0"):
        join(HOME, free_port(), node=1, nodes=2, nproc=1)


def test_a_name_that_nobody_knows(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(machines, "_NAMES", 0.2)  # and _COMING is 300
    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(MeshError, match=r"nowhere:7 \(Name or service not known\).*MASTER_ADDR=nowhere"):
        find("nowhere", 7, node=None, nodes=2, nproc=1)


def test_machines_without_a_number_are_given_one():
    """The first is the one that MASTER_ADDR names and that was there first."""
    port, found = free_port(), []

    def come():
        found.append(find(HOME, port, node=None, nodes=3, nproc=1))

    callers = [threading.Thread(target=come) for _ in range(3)]
    for caller in callers:
        caller.start()
        time.sleep(0.1)
    for caller in callers:
        caller.join(10)
    assert sorted(each.number for each in found) == [0, 1, 2]
    assert len({each.master for each in found}) == 1


def test_not_all_come_and_a_stranger_is_ignored(monkeypatch):
    monkeypatch.setattr(machines, "_COMING", 0.5)
    port = free_port()

    def knock():
        time.sleep(0.1)
        with socket.create_connection((HOME, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    threading.Thread(target=knock).start()
    with pytest.raises(MeshError, match="machines 1, 2 did not come within 0 seconds"):
        gather(HOME, port, nodes=3, nproc=1)

"""What the system tells of processes, about processes that do what is to be told."""

import os
import signal
import subprocess
import sys
import time

from erniekit.cli import processes


def started(code):
    process = subprocess.Popen([sys.executable, "-c", f"print(flush=True); {code}"], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def done_by(process, seconds):
    """Seconds of computing, and bytes, that a process adds in so much time."""
    before = processes.work_of(process.pid)
    time.sleep(seconds)
    return [after - first for after, first in zip(processes.work_of(process.pid), before, strict=True)]


def test_work_counts_with_that_of_processes_it_has_started():
    busy = "import time; end = time.time() + 30\nwhile time.time() < end: open('/proc/self/exe', 'rb').read(100_000)"
    parent = started(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])")
    sleeper = started("import time; time.sleep(30)")
    try:
        seconds, moved = done_by(parent, 1)
        assert seconds > 0.03 and moved > 2**20
        seconds, moved = done_by(sleeper, 0.3)
        assert seconds < 0.03 and moved < 2**20
    finally:
        for process in (parent, sleeper):
            for child in processes._family(process.pid):
                os.kill(child, signal.SIGKILL)
            process.communicate()
    assert processes.work_of(sleeper.pid) == (0, 0)


def test_stopped_and_what_it_holds():
    process = started("x = bytearray(50_000_000); print(flush=True); import time; time.sleep(30)")
    process.stdout.readline()
    try:
        assert not processes.is_stopped(process.pid)
        assert processes.memory_of(process.pid) > 50_000_000
        process.send_signal(signal.SIGSTOP)
        while not processes.is_stopped(process.pid):
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert not processes.is_stopped(process.pid) and processes.memory_of(process.pid) == 0


def test_processes_killed_for_memory(tmp_path, monkeypatch):
    (tmp_path / "events").write_text("low 0\noom 2\noom_kill 3\n")
    (tmp_path / "control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    monkeypatch.setattr(processes, "_KILLS", (tmp_path / "events", tmp_path / "control", tmp_path / "absent"))
    assert processes.kills_for_memory() == 7

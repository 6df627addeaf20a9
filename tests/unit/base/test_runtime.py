"""What the process environment does to Paddle."""

import signal
import subprocess
import sys


def test_paddle_does_not_answer_sigterm(root):
    code = """
import os, signal, sys
from erniekit.base import runtime
runtime.prepare()
with runtime.keeping_sigterm():
    import paddle
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")

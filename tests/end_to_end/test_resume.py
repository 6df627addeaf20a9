"""kill -9 anywhere, the same command again: the run ends bit-equal. The short version of scripts/prove_resume.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_killed_run_ends_bit_equal(tmp_path: Path) -> None:
    # So many steps that no life reaches the end before its kill, even if this process sleeps for seconds.
    figures = tmp_path / "figures.json"
    command = [sys.executable, "scripts/prove_resume.py", "--kills", "3", "--steps", "160", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    proved = json.loads(figures.read_text())
    assert proved["kills"] == 3
    assert proved["rows_compared"] > 160  # both lives' rows were looked at
    assert any(name.startswith("run/model") for name in proved["files_compared"])

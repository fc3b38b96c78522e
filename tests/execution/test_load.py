"""The benchmark of many programs, in small: every end as expected, and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_programs_of_every_kind_leave_nothing_behind():
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "sandbox.py"
    command = [sys.executable, str(script), "--programs=36", "--preload=none"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    result = json.loads(done.stdout)
    assert (result["wrong"], result["left"]) == ({}, {})
    assert done.returncode == 0, done.stderr
    assert result["programs"] == 36

"""Operations split over a mesh match one device, forward and backward, also if rows and tokens do not divide evenly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_four_devices_match_one():
    script = Path(__file__).with_name("spread_program.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 33
    for case, error in found.items():
        assert error < 1e-6, case

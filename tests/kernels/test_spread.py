"""What is spread over a mesh gives what one device gives, forward and backward, whether rows and tokens divide or not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_is_spread_over_four_devices_computes_the_same():
    script = Path(__file__).with_name("spread_program.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 15
    for case, error in found.items():
        assert error < 1e-6, case

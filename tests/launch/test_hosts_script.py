"""hosts.sh starts two real processes on this host."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_LAUNCH = Path(__file__).parents[2] / "launch"
_FAULTS = Path(__file__).parents[1] / "faults"


@pytest.mark.slow
def test_hosts_script_runs_two_local_processes(tmp_path):
    sys.path.insert(0, str(_FAULTS))
    from phrase_model import write_phrase_model

    write_phrase_model(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = [f"--config={_FAULTS / 'phrase_config.py'}:{tmp_path / 'model'}", "--config.train.steps=1", f"--workdir={tmp_path / 'run'}"]
    mesh = ["--config.mesh.data=2", "--config.train.rows=2"]
    variables = {
        "COORDINATOR": f"127.0.0.1:{port}",
        "PYTHON": sys.executable,
        "LOGS": str(tmp_path / "logs"),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [_LAUNCH / "hosts.sh", "localhost,localhost", *config, *mesh],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(Everything is ready|Ready, with warnings)", done.stdout, re.MULTILINE)  # the preflight
    assert re.search(r"\b2 processes\b", done.stdout)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes().count(b"\n") == 6
    assert [log.name for log in (tmp_path / "logs").iterdir()] == ["process-1.txt"]
    # The script exits with the code of a failing process.
    done = subprocess.run(
        [_LAUNCH / "hosts.sh", "localhost,localhost", *config, "--config.mesh.data=4", "--config.train.rows=4"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables, "PREFLIGHT": "0"},
    )
    assert done.returncode == 2
    assert re.search(r"config\.mesh\b.*\b4 x 1 x 1 = 4\b", done.stderr)

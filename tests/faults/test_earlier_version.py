"""Run directories of an earlier version of this project resume, with the results that this version had.

`version_0_runs.tar.gz` has two runs of `phrase_config.py` by commit 7ef98d7: a training run and a search. Each was killed in its third
step. Reports, event files and older checkpoints are omitted. It also has the journals of the runs when that commit finished them,
and their competition `remainders.py`.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_run
from phrase_model import write_phrase_model

from discover_jax.runs.metrics import read_metrics

_HERE = Path(__file__).parent
_COMMANDS = {"train": [str(_HERE / "tiny_main.py")], "search": ["-m", "discover_jax.search"]}


@pytest.mark.parametrize("kind", ["train", pytest.param("search", marks=pytest.mark.slow)])
def test_run_directory_of_an_earlier_version_resumes(kind, root, tmp_path):
    with tarfile.open(_HERE / "version_0_runs.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    write_phrase_model(tmp_path / "model", pandas="import pandas as pd\n")  # as then
    metrics = read_metrics(tmp_path / kind / "metrics.jsonl")

    command = [sys.executable, *_COMMANDS[kind], f"--config={_HERE / 'phrase_config.py'}:model"]
    options = ["--config.task.competition=remainders.py", "--config.checkpoint.keep=2", f"--workdir={kind}"]
    done = subprocess.run(command + options, cwd=tmp_path, env=tiny_run.environment(root), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / kind / "journal.jsonl").read_bytes() == (tmp_path / f"{kind}-journal.jsonl").read_bytes()
    after = read_metrics(tmp_path / kind / "metrics.jsonl")
    assert after[:2] == metrics
    assert [row["step"] for row in after] == [0, 1, 2, 3]

"""Run directories of an earlier version of this project resume, with the results that this version had.

`version_0_runs.tar.gz` has two runs of `phrase_config.py` by commit 7ef98d7: a training run and a search. Each was killed in its third
step. Reports, event files and older checkpoints are omitted. It also has the journals of the runs when that commit finished them,
and their competition `remainders.py`.
"""

import tarfile
from pathlib import Path

import pytest
from phrase_config import get_config
from phrase_model import write_phrase_model

from discover_jax import main
from discover_jax.config import validate
from discover_jax.runs.console import QuietConsole
from discover_jax.runs.metrics import read_metrics
from discover_jax.types import RunKind

_HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["train", pytest.param("search", marks=pytest.mark.slow)])
def test_run_directory_of_an_earlier_version_resumes(kind, in_this_process, tmp_path, monkeypatch):
    with tarfile.open(_HERE / "version_0_runs.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    write_phrase_model(tmp_path / "model", pandas="import pandas as pd\n")  # as then
    metrics = read_metrics(tmp_path / kind / "metrics.jsonl")

    monkeypatch.chdir(tmp_path)
    config = get_config("model")
    config.task.competition, config.checkpoint.keep = "remainders.py", 2
    main.run(validate(config), Path(kind), kind=RunKind(kind), console=QuietConsole())

    assert (tmp_path / kind / "journal.jsonl").read_bytes() == (tmp_path / f"{kind}-journal.jsonl").read_bytes()
    after = read_metrics(tmp_path / kind / "metrics.jsonl")
    assert after[:2] == metrics
    assert [row["step"] for row in after] == [0, 1, 2, 3]

"""Whole runs whose update takes the groups in waves: killed between two waves, and on two processes."""

import shutil
import signal
import subprocess

import pytest
from test_hosts import Hosts, check_results
from tiny_run import STEPS, command, environment, finish, results, start, unbroken

from discover_jax.runs.metrics import read_metrics

WAVES = "--config.train.waves=2"


@pytest.fixture(scope="module")
def waves_run(root, tmp_path_factory):
    """An uninterrupted run in two waves of one group. It runs its programs."""
    unbroken(root)  # writes the model
    workdir = tmp_path_factory.mktemp("waves") / "run"
    finish(start(root, workdir, STEPS, WAVES))
    return workdir


@pytest.mark.slow
def test_metrics_say_how_long_the_waves_waited(waves_run):
    rows = read_metrics(waves_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert 0 <= row["time/execute_first_s"] <= row["time/execute_s"]
        assert row["time/programs_s"] >= 0
        assert row["kl_base/mean"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("place", ["running programs:4", "learning:5"])
def test_run_killed_between_two_waves_resumes_to_the_bit(root, waves_run, tmp_path, place):
    """In the second step: while it waits for the second wave, and before it learns from the first."""
    workdir = tmp_path / "run"
    killed = subprocess.run(
        [*command(root, workdir), WAVES], env=environment(root, DISCOVER_TEST_KILL_IN=place), capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert len(read_metrics(workdir / "metrics.jsonl")) == 1
    finish(start(root, workdir, STEPS, WAVES))
    assert results(workdir) == results(waves_run)


@pytest.mark.slow
def test_two_processes_match_one(root, waves_run, tmp_path):
    verdicts = shutil.copytree(waves_run / "cache", tmp_path / "cache")
    hosts = Hosts(root, tmp_path / "run", 2, WAVES, f"--config.execution.cache={verdicts}")
    assert hosts.end() == [0, 0]
    check_results(tmp_path / "run", waves_run)

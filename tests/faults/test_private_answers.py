"""Two runs with the reward `holdout` that differ only in their private answers: only the private scores may differ."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from tiny_run import command, environment, unbroken

pytestmark = pytest.mark.slow  # four whole runs
STEPS = 2
KINDS = {"split": ["--config.task.holdout_fraction=0.5"], "folds": ["--config.task.holdout_folds=2"]}
HELD_OUT_ROWS = {"split": 15, "folds": 30}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The file of different private answers."""
    path = tmp_path_factory.mktemp("private") / "other.csv"
    pd.DataFrame({"id": range(30, 100), "y": [(n // 3) % 2 for n in range(30, 100)]}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module", params=["split", "folds"])
def kind(request) -> str:
    """One split, or cross-validation."""
    return request.param


@pytest.fixture(scope="module")
def runs(root, other, kind) -> tuple[Path, Path]:
    """Two runs, one after the other, so that the second reuses the compiled functions of the first."""
    unbroken(root)  # writes the model
    folders = other.with_name(f"{kind} ours"), other.with_name(f"{kind} altered")
    for folder, extra in zip(folders, ([], [f"--config.task.raw={other}"]), strict=True):
        start = [*command(root, folder, STEPS), "--config.task.reward=holdout", "--config.groups=1", *KINDS[kind], *extra]
        done = subprocess.run(start, env=environment(root), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


def rows(path: Path, *without: str) -> list[dict]:
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in path.read_text().splitlines()]


def test_private_answers_differ(runs):
    ours, altered = ([row["private_score"] for row in rows(run / "journal.jsonl")] for run in runs)
    assert any(score is not None for score in ours)
    assert ours != altered


def test_journal_and_metrics_are_the_same(runs):
    """Programs, scores, rewards, parents, adapters: everything but the private score."""
    ours, altered = (rows(run / "journal.jsonl", "private_score") for run in runs)
    assert len({row["reward"] for row in ours}) > 1
    assert max(row["adapter_step"] for row in ours) > 0
    assert ours == altered
    ours, altered = ([{k: v for k, v in row.items() if not _clocked(k)} for row in rows(run / "metrics.jsonl")] for run in runs)
    assert ours == altered


def _clocked(name: str) -> bool:
    return name.startswith("time/") or name in ("sample/tokens_per_s", "programs/seconds", "programs/retried")


def test_prompts_replies_and_advantages_are_the_same(runs):
    for step in range(STEPS):
        ours, altered = (pd.read_parquet(run / "rollouts" / f"step-{step:06d}.parquet").drop(columns="seconds") for run in runs)
        assert ours["prompt"].notna().any()
        pd.testing.assert_frame_equal(ours, altered)


def test_archive_and_adapter_are_the_same(runs):
    """In every checkpoint: the archive's states in order, and each array of the adapter and the optimiser."""
    for step in range(STEPS):
        ours, altered = (json.loads((run / "checkpoints" / str(step) / "host" / "metadata").read_bytes()) for run in runs)
        assert ours["host"]["archive"]
        assert ours["host"]["archive"] == altered["host"]["archive"]
        assert ours["arrays"]
        assert ours["arrays"] == altered["arrays"]
        assert ours["host"]["journal_sha256"] != altered["host"]["journal_sha256"]  # the journal has the private scores


def test_best_program_is_the_same(runs, kind):
    ours, altered = runs
    for name in ("solution.py", "submission.csv", "lineage.diff"):
        assert (ours / "best" / name).read_bytes() == (altered / "best" / name).read_bytes()
    mine, theirs = (json.loads((run / "best" / "grade.json").read_text()) for run in runs)
    assert (mine["rows"], mine["private_rows"]) == (HELD_OUT_ROWS[kind], 70)
    for name in ("private_score", "private_interval_95"):
        del mine[name], theirs[name]
    assert mine == theirs

"""Two whole runs with the reward `holdout` that differ in their private answers alone: nothing but the private scores may differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from phrase_model import write_phrase_model

HERE = Path(__file__).parent
STEPS = 3
KINDS = {"split": ["--config.task.holdout_fraction=0.5"], "folds": ["--config.task.holdout_folds=2"]}
HELD_OUT_ROWS = {"split": 15, "folds": 30}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folder of the model and of the other answers."""
    root = tmp_path_factory.mktemp("private")
    write_phrase_model(root / "weights")
    pd.DataFrame({"id": range(30, 100), "y": [(n // 3) % 2 for n in range(30, 100)]}).to_csv(root / "other.csv", index=False)
    return root


@pytest.fixture(scope="module", params=["split", pytest.param("folds", marks=pytest.mark.slow)])
def kind(request) -> str:
    """One split, or cross-validation."""
    return request.param


@pytest.fixture(scope="module")
def runs(root, kind) -> tuple[Path, Path]:
    """Side by side, to save time."""
    command = [sys.executable, str(HERE / "tiny_main.py"), f"--config={HERE / 'phrase_config.py'}:{root / 'weights'}"]
    command += ["--config.task.reward=holdout", *KINDS[kind], f"--config.train.steps={STEPS}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    folders = root / f"{kind} ours", root / f"{kind} altered"
    processes = [
        subprocess.Popen([*command, f"--workdir={folder}", *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        for folder, extra in zip(folders, ([], [f"--config.task.raw={root / 'other.csv'}"]), strict=True)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    return folders


def rows(path: Path, *without: str) -> list[dict]:
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in path.read_text().splitlines()]


def test_the_private_answers_do_differ(runs):
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
    """In every checkpoint: the states that may become parents, in their order, and each array of adapter and optimiser."""
    for step in range(STEPS):
        ours, altered = (json.loads((run / "checkpoints" / str(step) / "host" / "metadata").read_bytes()) for run in runs)
        assert ours["host"]["archive"]
        assert ours["host"]["archive"] == altered["host"]["archive"]
        assert ours["arrays"]
        assert ours["arrays"] == altered["arrays"]
        assert ours["host"]["journal_sha256"] != altered["host"]["journal_sha256"]  # which holds the private scores


def test_the_best_program_is_the_same(runs, kind):
    ours, altered = runs
    for name in ("solution.py", "submission.csv", "lineage.diff"):
        assert (ours / "best" / name).read_bytes() == (altered / "best" / name).read_bytes()
    mine, theirs = (json.loads((run / "best" / "grade.json").read_text()) for run in runs)
    assert (mine["rows"], mine["private_rows"]) == (HELD_OUT_ROWS[kind], 70)
    for name in ("private_score", "private_interval_95"):
        del mine[name], theirs[name]
    assert mine == theirs

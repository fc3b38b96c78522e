"""metrics.jsonl, its schema and documentation, and the row that summarises a step."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.learning.advantages import advantage_metrics, estimate_groups
from discover_jax.runs.metrics import REQUIRED, SCHEMA, TASK_SCHEMA, MetricsWriter, markdown, read_metrics, scalars
from discover_jax.runs.summary import step_row
from discover_jax.types import Attempt, Outcome, State, StopReason

ROW = dict.fromkeys(REQUIRED, 0.5) | {"step": 0}


def attempt(group: int, index: int, reward: float, outcome: Outcome = Outcome.OK, code: str | None = "x") -> Attempt:
    return Attempt(
        id=f"0-{group}-{index}",
        parent_id="seed",
        task="boats",
        step=0,
        group=group,
        index=index,
        code=code,
        outcome=outcome,
        detail="",
        stdout="",
        score=reward if outcome is Outcome.OK else None,
        private_score=None,
        reward=reward,
        adapter_step=0,
        tokens=10 * (index + 1),
        stop=StopReason.STOP_TOKEN,
    )


ATTEMPTS = [
    attempt(0, 0, 0.5),
    attempt(0, 1, 0.75, code="y"),
    attempt(0, 2, 0.0, Outcome.TIMEOUT),
    attempt(1, 0, 0.0, Outcome.FORMAT_ERROR, None),
    attempt(1, 1, 0.0, Outcome.EXCEPTION),
    attempt(1, 2, 0.0, Outcome.EXCEPTION),
]


def test_the_page_is_current():
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text() == markdown()


def test_names_and_units_are_stable():
    """Scripts, TensorBoard and W&B know metrics by name. Add a new metric to the list.
    Renaming one or changing its unit breaks users.
    """
    frozen = json.loads((Path(__file__).parent / "metrics_schema.json").read_text())
    assert {name: unit for name, (unit, _) in SCHEMA.items()} == frozen["step"]
    assert {name: unit for name, (unit, _) in TASK_SCHEMA.items()} == frozen["task"]
    assert list(REQUIRED) == frozen["required"]


def test_scalars():
    row = {"step": 3, "loss": float("nan"), "ratio/max": float("inf"), "best/score": None, "outcome/ok": 3, "entropy": np.float32(0.5)}
    assert scalars(row) == {"outcome/ok": 3, "entropy": 0.5}


def test_every_metric_is_documented():
    assert set(REQUIRED) <= SCHEMA.keys()
    assert all(meaning for _, meaning in SCHEMA.values())
    assert {f"outcome/{outcome.value}" for outcome in Outcome} <= SCHEMA.keys()


def test_rows(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"loss": float("nan"), "ratio/max": float("inf"), **ROW, "best/score": None, "outcome/ok": 3})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line.startswith('{"step": 0, "reward/mean": 0.5,')
    row = json.loads(line)
    assert row["loss"] is row["ratio/max"] is row["best/score"] is None
    assert row["outcome/ok"] == 3
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


@pytest.mark.parametrize("row", [ROW | {"reward/median": 1.0}, {k: v for k, v in ROW.items() if k != "best/score"}])
def test_invalid_rows_are_refused(tmp_path, row):
    with pytest.raises(ConfigError, match=r"reward/median|best/score"):
        MetricsWriter(tmp_path / "metrics.jsonl").write(row)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.truncate(0)
    assert not path.exists()
    for step in range(4):
        writer.write(ROW | {"step": step})
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 4, "rew')
    writer.truncate(4)
    assert path.read_text() == whole
    writer.truncate(2)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    writer.write(ROW | {"step": 2})
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:3])


def test_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"(?i)\bline 2\b"):
        read_metrics(path)


def test_full_disk():
    with pytest.raises(RunError, match="No space left on device"):
        MetricsWriter(Path("/dev/full")).write(ROW)


def test_step_row():
    best = State("0-0-1", "seed", "y", 0.75, 0.75, "", 0, 0)
    groups = estimate_groups([[0.5, 0.75, 0.0], [0.0, 0.0, 0.0]], "entropic")
    row = step_row(
        0,
        ATTEMPTS,
        best={"boats": best},
        timings={"time/sample_s": 4.0, "time/execute_s": 1.0, "time/update_s": 2.0, "programs/seconds": 9.0},
        learning_metrics=advantage_metrics(groups) | {"loss": 1.5, "logprob_gap/mean": 1e-6, "update/skipped": 0.0},
    )
    assert row.keys() <= SCHEMA.keys()
    assert set(REQUIRED) <= row.keys()
    expected = {
        "reward/mean": 1.25 / 6,
        "reward/max": 0.75,
        "reward/min": 0.0,
        "best/score": 0.75,
        "rollouts/count": 6,
        "rollouts/valid_frac": 1 / 3,
        "rollouts/distinct_frac": 2 / 5,
        "groups/constant_frac": 0.5,
        "tokens/mean": 20.0,
        "sample/tokens_per_s": 120 / 4.0,
        "outcome/ok": 2,
        "outcome/exception": 2,
        "outcome/timeout": 1,
        "outcome/format_error": 1,
        "outcome/killed": 0,
        "loss": 1.5,
        "logprob_gap/mean": 1e-6,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert sum(row[f"outcome/{outcome.value}"] for outcome in Outcome) == 6


def test_step_row_without_valid_programs(tmp_path):
    failures = [attempt(0, n, 0.0, Outcome.FORMAT_ERROR, None) for n in range(2)]
    row = step_row(3, failures, best={"boats": None}, timings={}, learning_metrics={"tokens": 0.0, "update/skipped": 1.0})
    assert row["best/score"] is row["rollouts/distinct_frac"] is row["logprob_gap/mean"] is None
    assert row["groups/constant_frac"] == 1.0
    MetricsWriter(tmp_path / "m").write(row)
    with pytest.raises(RunError, match="attempts"):
        step_row(3, [], best={"boats": None}, timings={}, learning_metrics={})


def test_step_row_of_several_competitions(tmp_path):
    """Each competition has its own columns; there is no best score over all of them. The rows survive a round trip."""
    other = [dataclasses.replace(attempt, task="trains", reward=2.0) for attempt in ATTEMPTS]
    best = {"boats": State("0-0-1", "seed", "y", 0.75, 0.75, "", 0, 0, "boats"), "trains": None, "planes/ä": None}
    row = step_row(0, [*ATTEMPTS, *other], best=best, timings={}, learning_metrics={})
    assert row["best/score"] is None
    assert row["task/boats/best_score"] == 0.75
    assert row["task/boats/reward_mean"] == pytest.approx(np.mean([attempt.reward for attempt in ATTEMPTS]))
    assert (row["task/trains/reward_mean"], row["task/planes/ä/reward_mean"]) == (2.0, None)
    MetricsWriter(tmp_path / "m").write(row)
    assert read_metrics(tmp_path / "m") == [row]
    with pytest.raises(ConfigError, match="task/boats/luck"):
        MetricsWriter(tmp_path / "m").write(row | {"task/boats/luck": 1.0})

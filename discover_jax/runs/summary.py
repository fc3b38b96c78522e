"""What sums a step up: its row of metrics; and a run: its last lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from discover_jax.exceptions import RunError
from discover_jax.runs.disclosure import weaker_isolation
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.task import Task
from discover_jax.types import Attempt, Outcome, State


def step_row(
    step: int,
    attempts: Sequence[Attempt],
    *,
    best: State | None,
    timings: dict[str, float | None],
    advantage_metrics: dict[str, float],
    update_metrics: dict[str, float],
) -> dict[str, Any]:
    """One row for `MetricsWriter.write`; `metrics.SCHEMA` says what each name means.

    Args:
      step: from 0.
      attempts: all rollouts of the step, at least one.
      best: the best state of the run after this step.
      timings: measured by the caller: `time/...` in seconds, `programs/...`; `sample/tokens_per_s` is worked out here.
      advantage_metrics: `advantage/...`, as the learning part gives them; `groups/constant_frac` is taken from there if given.
      update_metrics: as `Update.update` or `Update.measure` gives them.

    Raises:
      RunError: no attempts.
    """
    if not attempts:
        raise RunError(f"Step {step} has no attempts to sum up.")
    rewards = np.array([attempt.reward for attempt in attempts], np.float64)
    programs = [attempt.code for attempt in attempts if attempt.code is not None]
    tokens = sum(attempt.tokens for attempt in attempts)
    outcomes = [attempt.outcome for attempt in attempts]
    row: dict[str, Any] = {
        "step": step,
        "reward/mean": float(rewards.mean()),
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        "best/score": best.score if best is not None else None,
        "rollouts/count": len(attempts),
        "rollouts/valid_frac": outcomes.count(Outcome.OK) / len(attempts),
        "rollouts/distinct_frac": len(set(programs)) / len(programs) if programs else None,
        "groups/constant_frac": _constant_frac(attempts),
        "tokens/mean": tokens / len(attempts),
        **{f"outcome/{outcome.value}": outcomes.count(outcome) for outcome in Outcome},
        "logprob_gap/mean": None,
        "time/sample_s": None,
        "time/execute_s": None,
        "time/update_s": None,
    }
    row |= timings
    if row["time/sample_s"]:
        row["sample/tokens_per_s"] = tokens / row["time/sample_s"]
    return row | advantage_metrics | update_metrics


def _constant_frac(attempts: Sequence[Attempt]) -> float:
    """Fraction of groups whose rewards are all equal."""
    groups: dict[int, set[float]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.group, set()).add(attempt.reward)
    return sum(len(rewards) == 1 for rewards in groups.values()) / len(groups)


def closing_lines(
    task: Task, best: State | None, private_score: float | None, rows: Sequence[dict[str, Any]], *, workdir: Workdir, learn: bool
) -> list[str]:
    """What a run came to, for people: how the mean and the best moved, where the best program lies, and how its score was chosen.

    Args:
      best: the best state of the run; None if no program scored.
      private_score: its score on the private answers; None if it has none there.
      rows: of metrics, all steps so far.

    Raises:
      RunError: disclosure.json cannot be read.
    """
    weaker = weaker_isolation(workdir)
    warning = [f"WEAKER ISOLATION: {weaker}. What programs did to this machine, and what they read, is not known."] if weaker else []
    if not rows or best is None or best.score is None:
        return ["No program has scored yet.", f"Everything is in {workdir.path}", *warning]
    first, last = rows[0], rows[-1]
    name = task.metric.name
    between = _of_rows(task.score_interval(best.score), task.score_rows)
    lines = [
        f"{'After training' if learn else 'After search'}, steps {first['step'] + 1} to {last['step'] + 1}:",
        f"mean reward  {first['reward/mean']:.4f} -> {last['reward/mean']:.4f}   ({last['reward/mean'] - first['reward/mean']:+.4f})",
        f"best {name}  {first['best/score']:.4f} -> {best.score:.4f}   ({best.score - first['best/score']:+.4f}){between}",
    ]
    if task.disclosure.reward == "holdout":
        known = "none"
        if private_score is not None:
            known = f"{private_score:.4f}{_of_rows(task.private_score_interval(private_score), task.private_rows)}"
        lines.append(f"its private {name}  {known}; this chose nothing")
    thresholds = ", ".join(f"{threshold.name} {threshold.score:g}" for threshold in task.thresholds)
    return [
        *lines,
        f"best program {workdir.best_dir / 'solution.py'}",
        task.disclosure.text,
        "leaderboard  " + ". ".join(part for part in (thresholds or "unavailable", task.thresholds_note) if part),
        *warning,
    ]


def _of_rows(interval: tuple[float, float] | None, rows: int) -> str:
    between = f", 95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    return f"{between} ({rows:,} rows)"

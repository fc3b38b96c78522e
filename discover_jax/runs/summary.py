"""Summaries: the metrics row of a step, and the first and last console lines of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discover_jax.exceptions import RunError
from discover_jax.learning.advantages import SCALE_FREE
from discover_jax.runs.best import bundle_dir, read_best
from discover_jax.runs.disclosure import read_isolation
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.rewards import TRANSFORMS
from discover_jax.types import Attempt, Outcome, RunKind, State


def step_row(
    step: int,
    attempts: Sequence[Attempt],
    *,
    best: Mapping[str, State | None],
    timings: dict[str, float | None],
    learning_metrics: Mapping[str, float | None],
) -> dict[str, Any]:
    """One row for `MetricsWriter.write`; `metrics.SCHEMA` defines the names.

    Args:
      step: from 0.
      attempts: all rollouts of the step, at least one.
      best: the best state after this step, by competition id.
      timings: `time/...` in seconds and `programs/...`, measured by the caller. `sample/tokens_per_s` is computed here.
      learning_metrics: metrics of signals, advantages and the update.

    Raises:
      RunError: there are no attempts.
    """
    if not attempts:
        raise RunError(f"Step {step} has no attempts to summarize.")
    rewards = np.array([attempt.reward for attempt in attempts], np.float64)
    programs = [attempt.code for attempt in attempts if attempt.code is not None]
    tokens = sum(attempt.tokens for attempt in attempts)
    outcomes = [attempt.outcome for attempt in attempts]
    row: dict[str, Any] = {
        "step": step,
        "reward/mean": float(rewards.mean()),
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        "best/score": _score(next(iter(best.values()))) if len(best) == 1 else None,
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
    if len(best) > 1:
        for id, state in best.items():
            mine = [attempt.reward for attempt in attempts if attempt.task == id]
            row[f"task/{id}/reward_mean"] = float(np.mean(mine)) if mine else None
            row[f"task/{id}/best_score"] = _score(state)
    return row | dict(learning_metrics)


def _score(state: State | None) -> float | None:
    return state.score if state is not None else None


def _constant_frac(attempts: Sequence[Attempt]) -> float:
    """Fraction of groups whose rewards are all equal."""
    groups: dict[int, set[float]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.group, set()).add(attempt.reward)
    return sum(len(rewards) == 1 for rewards in groups.values()) / len(groups)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run on one competition.

    Attributes:
      best: the best state; None if no program has a score.
      private_score: its score on the private answers.
      retested: its result in retests, if they chose it; empty otherwise.
      seed_score: score of the seed program; None if the search starts from nothing.
    """

    task: AnyTask
    best: State | None
    private_score: float | None
    retested: str = ""
    seed_score: float | None = None


def opening_lines(results: Sequence[Result], workdir: Workdir) -> list[str]:
    """The source of rewards, and the best score so far if there is one (in resumed runs and in runs that continue another one).

    Args:
      results: one per competition; private scores are not shown.
    """
    lines = []
    for result in results:
        task, best, alone = result.task, result.best, len(results) == 1
        lines.append(f"reward   {task.disclosure.text}" if alone else f"reward   {task.id}: {task.disclosure.text}")
        name = task.metric.name if alone else f"{task.id}: {task.metric.name}"
        if result.seed_score is not None:
            lines.append(f"seed     {name} {_digits(task, result.seed_score)} of the seed program")
        if best is not None and best.score is not None:
            submission = _submission(best, _folder(workdir, task, alone), task)
            lines.append(f"best     {name} {_digits(task, best.score)}{_of_rows(task, best.score, submission)}")
    return lines


def scale_warning(tasks: Sequence[AnyTask], advantage: str) -> str | None:
    """A warning if advantages depend on the scale of rewards and competitions with different scales share an adapter; None otherwise.

    Fractions of rows, ranks and logarithms each count as one scale. Any other metric has its own scale in each competition: an error has
    the unit of its target.

    Args:
      tasks: the tasks of the run.
      advantage: name of the estimator.
    """
    if advantage in SCALE_FREE or len({_scale(task) for task in tasks}) < 2:
        return None
    scales = ", ".join(f"{task.id}: {task.metric.name}, transform {task.transform!r}" for task in tasks)
    return (
        f"The rewards of these tasks may differ in scale ({scales}). With config.train.advantage = {advantage!r}, advantages grow"
        f" with the scale, so one of them can dominate the update. Use {' or '.join(map(repr, SCALE_FREE))}, or the transform"
        " 'rank_in_group'."
    )


def _scale(task: AnyTask) -> str:
    if TRANSFORMS[task.transform].in_group:
        return "ranks"
    if task.transform == "log":
        return "logarithms"
    return "fractions" if task.metric.proportion and task.transform == "identity" else f"scale of {task.id}"


def closing_lines(results: Sequence[Result], rows: Sequence[dict[str, Any]], *, workdir: Workdir, kind: RunKind) -> list[str]:
    """The result of a run, for the console: change of the mean reward and of the best score, path of the best program, what selected it,
    and how programs were isolated and limited.

    Args:
      results: one per competition.
      rows: metrics rows of all steps so far.

    Raises:
      RunError: disclosure.json cannot be read.
    """
    isolation = read_isolation(workdir.path)
    assert isolation is not None, "written at the start of every run"
    isolation_lines = [f"programs ran in  {line}" for line in isolation.lines]
    if not isolation.isolated:
        weaker = "; then ".join(isolation.lines)
        isolation_lines.append(f"WEAKER ISOLATION: {weaker}. It is unknown what programs read or changed on this machine.")
    if not rows or all(_score(result.best) is None for result in results):
        return ["No program has scored yet.", f"run directory {workdir.path}", *isolation_lines]
    first, last = rows[0], rows[-1]
    return [
        f"{'After training' if kind.learns else 'After search'}, steps {first['step'] + 1} to {last['step'] + 1}:",
        *(line for result in results for line in _result_lines(result, rows, workdir, alone=len(results) == 1)),
        *isolation_lines,
    ]


def _result_lines(result: Result, rows: Sequence[dict[str, Any]], workdir: Workdir, *, alone: bool) -> list[str]:
    task, best = result.task, result.best
    prefix = "" if alone else f"task/{task.id}/"
    rewards = _known(rows, "reward/mean" if alone else f"{prefix}reward_mean")
    scores = _known(rows, "best/score" if alone else f"{prefix}best_score")
    head = [] if alone else [f"{task.id}:"]
    if result.seed_score is not None:
        head.append(f"seed program {task.metric.name} {_digits(task, result.seed_score)}")
    if best is None or best.score is None:
        return [*head, "No program has scored yet."]
    name = task.metric.name
    folder = _folder(workdir, task, alone)
    submission = _submission(best, folder, task)
    rows_of_best = _of_rows(task, best.score, submission)
    change = f"{best.score - scores[0]:{'+.3g' if task.calls else '+.4f'}}"
    lines = [
        *head,
        f"mean reward  {rewards[0]:.4f} -> {rewards[-1]:.4f}   ({rewards[-1] - rewards[0]:+.4f})",
        f"best {name}  {_digits(task, scores[0])} -> {_digits(task, best.score)}   ({change})" + rows_of_best,
    ]
    if result.retested:
        lines.append(f"retested     {result.retested}")
    if task.disclosure.reward == "holdout":
        known = "none"
        if result.private_score is not None:
            interval = task.private_score_interval(result.private_score, submission)
            known = f"{result.private_score:.4f}, {interval.text} ({task.private_rows:,} rows of the private answers)"
        lines.append(f"its private {name}  {known}; not used for selection")
    return [
        *lines,
        f"best program {folder / 'solution.py' if submission is not None else f'{best.id} (in the journal; missing from {folder})'}",
        task.disclosure.text,
        f"leaderboard  {task.leaderboard}",
    ]


def _digits(task: AnyTask, score: float) -> str:
    """A score for a summary: all digits of a problem's, where the last ones count, and four places of a competition's."""
    return task.score_text(score) if task.calls else f"{score:.4f}"


def _known(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _folder(workdir: Workdir, task: AnyTask, alone: bool) -> Path:
    return bundle_dir(workdir.best_dir, task.id, alone=alone)


def _submission(best: State, folder: Path, task: AnyTask) -> bytes | None:
    found = read_best(folder, best, task.id)
    return None if found is None else found[1]


def _of_rows(task: AnyTask, score: float, submission: bytes | None) -> str:
    """The interval of a best score and the rows that it was measured on; shown after every best score."""
    return f", {task.score_interval(score, submission).text} ({task.disclosure.scored_on})"

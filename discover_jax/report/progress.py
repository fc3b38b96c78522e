"""A run's progress on one competition by step: scores with intervals, rewards, outcomes, and the tree of states."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from discover_jax.archive.archive import lineage
from discover_jax.archive.ranking import gains_over_parents
from discover_jax.exceptions import RunError
from discover_jax.report.record import Disclosed, RunRecord
from discover_jax.tasks.interval import wilson_interval
from discover_jax.types import SEED, Attempt, Outcome, State

BINS = 24
"""Bins of the histogram of rewards; the lowest one also counts all rewards below it."""
_LOWEST_SHARE = 0.05
"""Share of valid rewards that may be below the histogram's range, so that one bad program does not squeeze all others into one bin."""
_GRADE = ("score", "rows", "scored_on", "interval_95", "interval_95_method", "private_score", "private_rows", "private_interval_95")


def progress_of(record: RunRecord, competition: str) -> dict[str, Any]:
    """What the page shows about one competition of a run, as JSON values. Lists are by step, with null for missing values.

    As in the run itself, the best program has the highest reward; among equals, the earliest wins.

    Raises:
      RunError: a score is impossible, or the ancestors in the journal form a cycle.
    """
    attempts = [attempt for attempt in record.attempts if attempt.task == competition]
    disclosed = record.disclosed.get(competition)
    steps = sorted({attempt.step for attempt in attempts})
    by_step = [[attempt for attempt in attempts if attempt.step == step] for step in steps]
    bests = _bests(by_step)
    best = bests[-1] if bests else None
    means = [_mean([a.score for a in mine if a.score is not None]) for mine in by_step]
    grade = record.grades.get(competition, {})
    states, seed = [state for attempt in attempts if (state := attempt.state()) is not None], record.seeds.get(competition)
    known = [*([seed] if seed is not None and seed.score is not None else []), *states]
    return {
        "id": competition,
        "disclosed": _disclosed_json(disclosed),
        "steps": steps,
        "rollouts": np.cumsum([len(mine) for mine in by_step]).tolist(),
        "best": [state.score if state is not None else None for state in bests],
        "best_id": [state.id if state is not None else None for state in bests],
        "best_interval": [_interval(state.score if state is not None else None, disclosed) for state in bests],
        "seed": seed.score if seed is not None else None,
        "mean": means,
        "mean_interval": [_interval(mean, disclosed) for mean in means],
        "top": [_top(mine) for mine in by_step],
        "valid_reward_mean": [_mean([a.reward for a in mine if a.outcome is Outcome.OK]) for mine in by_step],
        "reward_mean": [_mean([attempt.reward for attempt in mine]) for mine in by_step],
        "rewards": _histogram(by_step),
        "outcomes": {outcome.value: [sum(a.outcome is outcome for a in mine) for mine in by_step] for outcome in Outcome},
        "lineage": [state.id for state in lineage(attempts, best.id)] if best is not None else [],
        "grade": {name: grade.get(name) for name in _GRADE} if best is not None and grade.get("id") == best.id else None,
        "chosen": _chosen(grade),
        "gains": gains_over_parents(known, higher_is_better=disclosed.higher_is_better) if disclosed is not None else None,
    }


def tree_of(record: RunRecord, competition: str) -> dict[str, list[Any]]:
    """Columns over the competition's attempts in journal order: the states of the tree, and the failures.

    `parent` is the parent's row. It is -1 for the empty start, and for a parent that is not in the journal; the latter sets `lost`.
    """
    attempts = [attempt for attempt in record.attempts if attempt.task == competition]
    row_of = {attempt.id: row for row, attempt in enumerate(attempts)}
    outcomes = list(Outcome)
    rewards = [attempt.reward for attempt in attempts]
    scores = [attempt.score for attempt in attempts]
    return {
        "id": [attempt.id for attempt in attempts],
        "parent": [row_of.get(attempt.parent_id, -1) for attempt in attempts],
        "lost": [attempt.parent_id not in row_of and attempt.parent_id != SEED.id for attempt in attempts],
        "step": [attempt.step for attempt in attempts],
        "group": [attempt.group for attempt in attempts],
        "index": [attempt.index for attempt in attempts],
        "outcome": [outcomes.index(attempt.outcome) for attempt in attempts],
        "score": scores,
        "reward": rewards,
        "tokens": [attempt.tokens for attempt in attempts],
        "stop": [attempt.stop.value == "max_tokens" for attempt in attempts],
        "adapter_step": [attempt.adapter_step for attempt in attempts],
    }


def _chosen(grade: Mapping[str, Any]) -> dict[str, Any] | None:
    """The program that retests chose and its scores, from grade.json; None if retests chose none."""
    retested = grade.get("retested")
    if not isinstance(retested, dict):
        return None
    names = ("id", "score", "retested_score", "retested_interval_95", "retested_rows", "private_score")
    return {name: retested.get(name) for name in names}


def _disclosed_json(disclosed: Disclosed | None) -> dict[str, Any] | None:
    return None if disclosed is None else dict(vars(disclosed))


def _bests(by_step: Sequence[Sequence[Attempt]]) -> list[State | None]:
    """The best state so far after each step."""
    best: State | None = None
    found = []
    for attempts in by_step:
        for attempt in attempts:
            state = attempt.state()
            if state is not None and (best is None or attempt.reward > _value(best)):
                best = state
        found.append(best)
    return found


def _value(state: State) -> float:
    assert state.value is not None, "states of attempts have one"
    return state.value


def _top(attempts: Sequence[Attempt]) -> float | None:
    """Score of a step's best program."""
    scored = [attempt for attempt in attempts if attempt.score is not None]
    return max(scored, key=lambda attempt: attempt.reward).score if scored else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _interval(score: float | None, disclosed: Disclosed | None) -> tuple[float, float] | None:
    """Wilson's interval if scores are shares of rows. Other intervals need the submission, which a run keeps only of the best program."""
    if score is None or disclosed is None or not disclosed.share_of_rows:
        return None
    try:
        low, high = wilson_interval(score, disclosed.rows)
    except ValueError as error:
        raise RunError(
            f"{disclosed.id}: disclosure.json says that {disclosed.metric} is a share of rows, but the journal has the score {score}."
        ) from error
    return low, high


def _histogram(by_step: Sequence[Sequence[Attempt]]) -> dict[str, Any]:
    """Histogram of the rewards of valid programs in bins of equal width, and number of failures, by step."""
    valid = np.array([a.reward for attempts in by_step for a in attempts if a.outcome is Outcome.OK], np.float64)
    failed = [sum(a.outcome is not Outcome.OK for a in attempts) for attempts in by_step]
    if not len(valid):
        return {"edges": [], "counts": [[] for _ in by_step], "failed": failed, "below": 0}
    low, high = float(np.quantile(valid, _LOWEST_SHARE, method="lower")), float(valid.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    counts = [
        np.histogram(np.maximum([a.reward for a in attempts if a.outcome is Outcome.OK], low), edges)[0].tolist() for attempts in by_step
    ]
    return {"edges": edges.tolist(), "counts": counts, "failed": failed, "below": int((valid < low).sum())}

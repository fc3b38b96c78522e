"""Signals: the rewards of a group, optionally with a novelty bonus, without duplicates, with copies as failures, and with failures near the
valid rewards.

Advantages are computed from signals. All options are off by default, as in the report. The first three counter the collapse to one program,
which gives no gradient. The last keeps failures from drowning the differences of valid programs.
"""

import bisect
import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from discover_jax.exceptions import ConfigError
from discover_jax.text.structure import structure_distance, structure_key, structure_parts
from discover_jax.types import Attempt, Outcome, State

DUPLICATES = ("keep", "drop")
COPIES = ("keep", "fail")
FAILURES = ("reward", "spread")


Results = tuple[float | None, str]
"""What a program achieved: its score, and the results of the rows behind it (see `row_results`)."""


def results_of(program: Attempt | State) -> Results:
    """The results by which copies are found."""
    return program.score, program.rows


@dataclasses.dataclass(frozen=True)
class Diversity:
    """Options that change a group's rewards before advantages are estimated.

    Attributes:
      novelty_bonus: bonus for a program with a score, in the reward's unit, times its distance (0 to 1) to the nearest other program with
        a score in its group; 0 disables it.
      duplicates: "keep" or "drop". With "drop", baseline and update use only the first of a group's programs that differ only in names and
        layout.
      copies: "keep" or "fail". With "fail", copies get the signal of a failure. A copy is a valid program with the results of a known
        program (see `group_signals`), or of an earlier one in its group: the same score, and for competitions the same results of the rows.
      copy_tolerance: scores that have no results of rows are the same if they differ by at most this much.

    Raises:
      ConfigError: a value is not allowed.
    """

    novelty_bonus: float = 0.0
    duplicates: str = "keep"
    copies: str = "keep"
    copy_tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.novelty_bonus < float("inf"):
            raise ConfigError(f"novelty_bonus must be finite and at least 0; got {self.novelty_bonus!r}.")
        if self.duplicates not in DUPLICATES:
            raise ConfigError(f"duplicates = {self.duplicates!r} is unknown; allowed: {', '.join(DUPLICATES)}.")
        if self.copies not in COPIES:
            raise ConfigError(f"copies = {self.copies!r} is unknown; allowed: {', '.join(COPIES)}.")
        if not 0.0 <= self.copy_tolerance < float("inf"):
            raise ConfigError(f"copy_tolerance must be finite and at least 0; got {self.copy_tolerance!r}.")


@dataclasses.dataclass(frozen=True)
class FailureHandling:
    """The signal of a failed attempt.

    Attributes:
      kind: "reward" or "spread". With "reward", it is the task's failure reward. With "spread", see `place_failures`.
      multiple: number of spreads below the worst valid signal, for "spread".

    Raises:
      ConfigError: a value is not allowed.
    """

    kind: str = "reward"
    multiple: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in FAILURES:
            raise ConfigError(f"failures = {self.kind!r} is unknown; allowed: {', '.join(FAILURES)}.")
        if not 0.0 <= self.multiple < float("inf"):
            raise ConfigError(f"failure_spread must be finite and at least 0; got {self.multiple!r}.")


@dataclasses.dataclass(frozen=True)
class Signals:
    """Signals of one group.

    Attributes:
      values_K: float64, the signal of each rollout.
      included_K: bool, False for rollouts that baseline and update exclude.
      failed_K: bool, True for failures, and for copies that count as failures.
    """

    values_K: np.ndarray
    included_K: np.ndarray
    failed_K: np.ndarray


def group_signals(
    attempts_K: Sequence[Attempt],
    transform: Callable[[Sequence[float]], list[float]],
    diversity: Diversity,
    *,
    known: Collection[Results] = (),
    failure_reward: float = 0.0,
) -> Signals:
    """The signals of a group.

    Args:
      attempts_K: the attempts of one group, in order.
      transform: the function from the group's rewards to signals; see `Task.signals`.
      diversity: novelty bonus, duplicates and copies.
      known: results of the task's archived programs and of its seed program, for copies.
      failure_reward: the task's reward of a failure, for copies that count as failures.
    """
    copies_K = np.zeros(len(attempts_K), bool)
    if diversity.copies == "fail":
        copies_K = _copies(attempts_K, known, diversity.copy_tolerance)
    failed_K = copies_K | np.array([attempt.outcome is not Outcome.OK for attempt in attempts_K], bool)
    rewards_K = np.where(copies_K, failure_reward, [attempt.reward for attempt in attempts_K])
    values_K = np.asarray(transform(rewards_K.tolist()), np.float64)
    included_K = np.ones(len(attempts_K), bool)
    if diversity.novelty_bonus:
        values_K = values_K + diversity.novelty_bonus * np.where(failed_K, 0.0, _novelty(attempts_K))
    if diversity.duplicates == "drop":
        included_K = ~_repeated(attempts_K)
    return Signals(values_K, included_K, failed_K)


def place_failures(signals_G: Sequence[Signals], attempts_GK: Sequence[Sequence[Attempt]], handling: FailureHandling) -> list[Signals]:
    """The signals of a step's groups with those of failures replaced, if `handling` says so.

    Failures are those of `Signals.failed_K`. With "spread", a failure gets w - multiple x s: w is the lowest signal of the valid attempts
    in its group, and s their standard deviation (population). Only included attempts count. A group with a single valid attempt, or with
    equal valid signals, shows no spread. Then s is the mean of the spreads that the step's other groups of the same task show. If none
    does, the failures keep their signals; so do those of a group without a valid attempt.

    Args:
      signals_G, attempts_GK: of the groups of a step, in the same order.
      handling: what to do.
    """
    if handling.kind == "reward":
        return list(signals_G)
    valid_G = [signals.values_K[~signals.failed_K & signals.included_K] for signals in signals_G]
    spread_G = [float(valid.std()) if valid.size and (valid != valid[0]).any() else 0.0 for valid in valid_G]
    shown: dict[str, list[float]] = {}
    for spread, attempts_K in zip(spread_G, attempts_GK, strict=True):
        if spread:
            shown.setdefault(attempts_K[0].task, []).append(spread)
    placed = []
    for signals, attempts_K, valid, own in zip(signals_G, attempts_GK, valid_G, spread_G, strict=True):
        others = shown.get(attempts_K[0].task) if attempts_K else None
        spread = own or (float(np.mean(others)) if others else None)
        if valid.size and spread is not None:
            values_K = np.where(signals.failed_K, valid.min() - handling.multiple * spread, signals.values_K)
            signals = dataclasses.replace(signals, values_K=values_K)
        placed.append(signals)
    return placed


def diversity_metrics(
    groups: Sequence[Sequence[Attempt]], known_G: Sequence[Collection[Results]], *, copy_tolerance: float = 0.0
) -> dict[str, float | None]:
    """The `diversity/` metrics of a step: how different its programs are.

    Args:
      groups: the attempts of each group.
      known_G: for each group, the results of its task's archived programs and of its seed program.
      copy_tolerance: see `Diversity`.
    """
    programs = [[attempt for attempt in group if attempt.code is not None] for group in groups]
    count = sum(map(len, programs))
    distances = [value for group in programs for value in _distances(group)[np.triu_indices(len(group), k=1)].tolist()]
    distinct = len({structure_key(attempt.code or "") for group in programs for attempt in group})
    valid = sum(attempt.outcome is Outcome.OK for group in groups for attempt in group)
    copies = sum(int(_copies(group, known, copy_tolerance).sum()) for group, known in zip(groups, known_G, strict=True))
    return {
        "diversity/copy_frac": copies / valid if valid else None,
        "diversity/duplicate_frac": sum(int(_repeated(group).sum()) for group in programs) / count if count else None,
        "diversity/distinct_frac": distinct / count if count else None,
        "diversity/distance": float(np.mean(distances)) if distances else None,
    }


def _repeated(attempts_K: Sequence[Attempt]) -> np.ndarray:
    """bool [K]: whether a program has the same structure as an earlier one of the group. False for rollouts without a program."""
    seen: set[str] = set()
    repeated_K = np.zeros(len(attempts_K), bool)
    for index, attempt in enumerate(attempts_K):
        if attempt.code is not None:
            key = structure_key(attempt.code)
            repeated_K[index] = key in seen
            seen.add(key)
    return repeated_K


def _copies(attempts_K: Sequence[Attempt], known: Collection[Results], tolerance: float) -> np.ndarray:
    """bool [K]: whether a valid program has known results, or those of an earlier one in the group.

    Earlier copies count, too, so that programs cannot drift away from a known result by steps below the tolerance within a group.
    """
    seen = set(known)
    scores = sorted(score for score, rows in known if score is not None and not rows) if tolerance else []
    copies_K = np.zeros(len(attempts_K), bool)
    for index, attempt in enumerate(attempts_K):
        if attempt.outcome is Outcome.OK:
            score, rows = results = results_of(attempt)
            copies_K[index] = results in seen
            seen.add(results)
            if tolerance and score is not None and not rows:
                place = bisect.bisect_left(scores, score - tolerance)
                copies_K[index] |= place < len(scores) and scores[place] <= score + tolerance
                bisect.insort(scores, score)
    return copies_K


def _novelty(attempts_K: Sequence[Attempt]) -> np.ndarray:
    """float64 [K]: distance to the nearest other program of the group with a score. 0 for failures, and if no other has a score."""
    scored = [index for index, attempt in enumerate(attempts_K) if attempt.outcome is Outcome.OK]
    novelty_K = np.zeros(len(attempts_K))
    if len(scored) > 1:
        distances = _distances([attempts_K[index] for index in scored])
        np.fill_diagonal(distances, np.inf)
        novelty_K[scored] = distances.min(axis=1)
    return novelty_K


def _distances(attempts: Sequence[Attempt]) -> np.ndarray:
    """float64 [K, K]: structural distances between programs."""
    parts = [structure_parts(attempt.code or "") for attempt in attempts]
    return np.array([[structure_distance(a, b) for b in parts] for a in parts]).reshape(len(parts), len(parts))

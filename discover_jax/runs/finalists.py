"""The final choice of a run: the best programs are tested again, and the winner goes to best/. See `archive.finalists`."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax import row_results
from discover_jax.archive.archive import best_of
from discover_jax.archive.finalists import Finalist, Measurement, best_first, first_finalists, rounds
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.posterior import Z95
from discover_jax.files import write_atomic
from discover_jax.tasks.prepare import AnyTask
from discover_jax.types import Outcome, Verdict

NAME = "finalists.json"
"""The file in the run directory with all finalists and their retests."""
_REASON_CHARACTERS = 480

RunPrograms = Callable[[Sequence[tuple[str, int]]], Sequence[Verdict]]
"""Runs (program, number of its task in the executor) and returns the verdicts in this order, the same in all processes of a run."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The final choice for one task.

    Attributes:
      task: the competition or problem.
      finalists: best first; the first one is the chosen program.
      verdicts: of the finalists' original runs, by state id.
      runs: number of further runs of programs that the choice took.
      left_out: number of retests that do not count, because all of their programs failed.
    """

    task: AnyTask
    finalists: Sequence[Finalist]
    verdicts: Mapping[str, Verdict]
    runs: int
    left_out: int = 0

    @property
    def chosen(self) -> Finalist:
        return self.finalists[0]

    def to_json(self) -> dict[str, Any]:
        """An entry of finalists.json."""
        return {
            "competition": self.task.id,
            "chosen": self.chosen.state.id,
            "runs": self.runs,
            "retests_left_out": self.left_out,
            "finalists": [*map(self.row, self.finalists)],
        }

    def row(self, finalist: Finalist) -> dict[str, Any]:
        """What is known of a finalist, as JSON."""
        state, grade = finalist.state, self.verdicts[finalist.state.id].grade
        estimate = finalist.estimate
        known = estimate is not None and bool(estimate.variance < float("inf"))
        width = _quantile(finalist.degrees) * float(estimate.variance) ** 0.5 if known and estimate is not None else None
        mean = None if estimate is None else float(estimate.mean)
        return {
            "id": state.id,
            "score": state.score,
            "retested_score": mean,
            "retested_interval_95": None if width is None or mean is None else [mean - width, mean + width],
            "retested_rows": sum(each.rows for each in finalist.measurements),
            "scores": [each.score for each in finalist.measurements],
            "failure": finalist.failure,
            "private_score": grade.private_score,
        }

    def _digits(self, score: float) -> str:
        return f"{score:.6g}" if self.task.calls else f"{score:.4f}"

    @property
    def text(self) -> str:
        """The result for the console."""
        row = self.row(self.chosen)
        if self.chosen.failure or row["retested_score"] is None:
            return f"unknown: no finalist of {len(self.finalists)} has a score in a retest; the one with the highest reward stays the best"
        bounds = row["retested_interval_95"]
        interval = "no interval" if bounds is None else f"95% interval {self._digits(bounds[0])} to {self._digits(bounds[1])}"
        where = f"{row['retested_rows']:,} rows that gave no reward" if not self.task.calls else f"{len(row['scores'])} more evaluations"
        tested = f"best of {len(self.finalists)} finalists, {self.runs} more program runs"
        return f"{self._digits(row['retested_score'])}, {interval} ({where}); {tested}{self._failures()}"

    def _failures(self) -> str:
        """How much the choice lost: programs that ran in time once can run out of time in the retests of a busy machine."""
        kinds = collections.Counter(each.failure.split(":")[0].replace("_", " ") for each in self.finalists if each.failure)
        named = ", ".join(f"{count} by {kind}" for kind, count in kinds.most_common())
        failed = f"; {kinds.total()} failed in a retest ({named})" if kinds else ""
        noted = (
            f"{self.left_out} retests do not count, because all of their"
            if self.left_out > 1
            else "1 retest does not count, because all of its"
        )
        return failed + (f"; {noted} programs failed" if self.left_out else "")


def _quantile(degrees: int | None) -> float:
    """The 97.5th percentile: of the normal distribution, or of Student's for a variance from a few scores."""
    if degrees is None:
        return Z95
    from scipy.stats import t  # only here: it takes long to import

    return float(t.ppf(0.975, degrees))


def choose(
    tasks: Sequence[AnyTask],
    frontiers: Mapping[str, Frontier],
    retests: Mapping[str, Sequence[int]],
    all_tasks: Sequence[AnyTask],
    run_programs: RunPrograms,
    *,
    count: int,
) -> dict[str, Choice]:
    """The choice for each task that has retests and a program with a score.

    Args:
      tasks: of the run.
      frontiers: by task id.
      retests: task id -> numbers of its retests in `all_tasks`.
      all_tasks: of the executor: the run's, then the retests.
      run_programs: runs programs on all hosts.
      count: number of finalists.
    """
    return {
        task.id: _choose(task, frontiers[task.id], number, retests[task.id], all_tasks, run_programs, count)
        for number, task in enumerate(tasks)
        if retests[task.id] and frontiers[task.id].best is not None
    }


def _choose(
    task: AnyTask,
    frontier: Frontier,
    number: int,
    retests: Sequence[int],
    all_tasks: Sequence[AnyTask],
    run_programs: RunPrograms,
    count: int,
) -> Choice:
    assert frontier.best is not None, "the caller has checked"
    finalists = first_finalists([frontier.best, *frontier.archive.states], count)
    # From the cache of verdicts, with the scores on rows for selection. Without it, they run again, and best/ needs what they return.
    originals = run_programs([(finalist.state.code, number) for finalist in finalists])
    verdicts = {finalist.state.id: verdict for finalist, verdict in zip(finalists, originals, strict=True)}
    finalists = [_original(finalist, verdicts[finalist.state.id], task.selection_rows) for finalist in finalists]
    runs = left_out = 0
    for retest, kept in zip(retests, rounds(len(finalists), len(retests)), strict=True):
        ordered = best_first(finalists, higher_is_better=task.metric.higher_is_better) if runs else finalists
        playing = [finalist for finalist in ordered[:kept] if not finalist.failure]
        if not playing:
            break
        found = run_programs([(finalist.state.code, retest) for finalist in playing])
        runs += len(playing) * (1 if task.calls else len(all_tasks[retest].public_dirs))
        results = {
            finalist.state.id: _measured(finalist, verdict, all_tasks[retest]) for finalist, verdict in zip(playing, found, strict=True)
        }
        if all(each.failure for each in results.values()):
            results = {}  # a retest in which all fail, such as one without a row of a class, says nothing about any of them
            left_out += 1
        finalists = [results.get(finalist.state.id, finalist) for finalist in ordered]
    ranked = best_first(finalists, higher_is_better=task.metric.higher_is_better)
    if ranked[0].failure:  # all failed: no retest says anything against the highest reward
        best = best_of(finalist.state for finalist in ranked)
        ranked.sort(key=lambda finalist: finalist.state is not best)
    return Choice(task, ranked, verdicts, runs, left_out)


def _original(finalist: Finalist, verdict: Verdict, selection_rows: int) -> Finalist:
    """A finalist after its original run, with its score on the rows for selection, if there are any."""
    if verdict.outcome is not Outcome.OK:
        return _failed(finalist, verdict)
    if not selection_rows or verdict.grade.selection_score is None:
        return finalist
    measurement = Measurement(verdict.grade.selection_score, selection_rows, _variance(verdict.grade.selection_rows))
    return dataclasses.replace(finalist, measurements=(measurement,))


def _measured(finalist: Finalist, verdict: Verdict, retest: AnyTask) -> Finalist:
    """A finalist after a retest."""
    if verdict.outcome is not Outcome.OK or verdict.grade.score is None:
        return _failed(finalist, verdict)
    measurement = Measurement(verdict.grade.score, retest.score_rows or 1, _variance(verdict.grade.rows))
    return dataclasses.replace(finalist, measurements=(*finalist.measurements, measurement))


def _failed(finalist: Finalist, verdict: Verdict) -> Finalist:
    """A finalist after a run without a score. The outcome comes first; of a traceback, the end says most."""
    reason = (verdict.execution.detail or verdict.grade.reason)[-_REASON_CHARACTERS:]
    return dataclasses.replace(finalist, failure=f"{verdict.outcome.value}: {reason}")


def _variance(rows: str) -> float | None:
    """The variance of a score from the results of its rows; None if there are none."""
    return row_results.decode(rows).variance if rows else None


def write_finalists(folder: Path, choices: Mapping[str, Choice]) -> None:
    """Writes finalists.json.

    Raises:
      OSError: the disk is full or fails.
    """
    write_atomic(folder / NAME, (json.dumps([choice.to_json() for choice in choices.values()], indent=1) + "\n").encode())

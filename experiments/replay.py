"""Choices of the best program in the journals of real runs: the highest score, the highest posterior mean, and the winners of the retests.

  python experiments/replay.py RUN_DIR... [--steps=N] --csv=experiments/selection/replay.csv
  python experiments/replay.py --csv=experiments/selection/replay.csv      # only prints the table

Runs need the reward `holdout`, so that the private answers are unseen, and finalists.json; for the choice `both`, finalists_posterior.json
as well. retest.py writes both. No program runs again: the journal has the results of single rows, and the two files those of the retests.
The row `seed program` is for comparison: nothing selected it, so its gap shows how much harder the unseen rows are than those of the
reward.

Runs with the same seed share the rows of their rewards, so they are not independent: the table averages them first, and its intervals are
over seeds.
"""

import argparse
import collections
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estimators import interval
from evidence import read, write
from retest import POSTERIOR_NAME, direction, ranked_frontier, run_seed, winner

from discover_jax.archive.archive import best_of
from discover_jax.archive.frontier import states_of
from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.runs.attempts import SEED_PROGRAMS, stored_verdicts
from discover_jax.runs.finalists import NAME
from discover_jax.types import SEED, Attempt

COLUMNS = ("run", "seed", "choice", "program", "estimate", "unseen", "gap")
SEED_PROGRAM = "seed program"
RULES = (SEED_PROGRAM, "raw", "posterior", "finalists", "both")


def choices(folder: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """One row for each rule, and one for the seed program if there is one. `estimate` is the score that the rule reports, `unseen` the
    score on the private answers.

    Args:
      steps: number of steps of the run to use, as in the retests; None: all.

    Raises:
      RunError: the journal cannot be read or has several competitions; or see `retest.winner`.
    """
    attempts = [each for each in Journal(folder / "journal.jsonl").read() if steps is None or each.step < steps]
    tasks = {attempt.task for attempt in attempts}
    if len(tasks) != 1:
        raise RunError(f"{folder} must be a run on one competition; its journal has {sorted(tasks)}.")
    private = {attempt.id: attempt.private_score for attempt in attempts}
    raw = best_of(states_of(attempts))
    if raw is None:
        return []
    sign, shrunk = direction(folder), ranked_frontier(folder, attempts).best
    assert shrunk is not None, "there is a program with a score"
    chosen = {
        "raw": (raw.id, raw.score),
        "posterior": (shrunk.id, sign * (shrunk.value or 0.0)),
        "finalists": _chosen(folder / NAME, attempts),
    }
    if (folder / POSTERIOR_NAME).exists():
        chosen["both"] = _chosen(folder / POSTERIOR_NAME, attempts)
    if (folder / SEED_PROGRAMS).exists():
        ((_, _, verdict),) = stored_verdicts(folder / SEED_PROGRAMS)
        chosen[SEED_PROGRAM], private[SEED.id] = (SEED.id, verdict.grade.score), verdict.grade.private_score
    return [
        {
            "run": folder.name,
            "seed": run_seed(folder),
            "choice": rule,
            "program": id,
            "estimate": estimate,
            "unseen": private[id],
            "gap": round(sign * (estimate - private[id]), 6),
        }
        for rule, (id, estimate) in chosen.items()
        if estimate is not None and private[id] is not None
    ]


def _chosen(file: Path, attempts: Sequence[Attempt]) -> tuple[str, float | None]:
    best, retested = winner(file, attempts)
    return best.id, retested


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds as Markdown, with 95% intervals; differences to the highest score (`raw`) are paired by run."""
    base = {row["run"]: row for row in rows if row["choice"] == "raw"}
    lines = [
        "| choice | its estimate | on unseen rows | over raw | gap: estimate minus unseen | gap minus that of raw |",
        "|---|---|---|---|---|---|",
    ]
    for rule in [rule for rule in RULES if any(row["choice"] == rule for row in rows)]:
        by_seed = collections.defaultdict(list)
        for row in rows:
            if row["choice"] == rule and row["run"] in base:
                of_raw = base[row["run"]]
                gain, narrower = row["unseen"] - of_raw["unseen"], row["gap"] - of_raw["gap"]
                by_seed[row["seed"]].append((row["estimate"], row["unseen"], gain, row["gap"], narrower))
        means = [[statistics.mean(column) for column in zip(*runs, strict=True)] for runs in by_seed.values()]
        columns = [list(column) for column in zip(*means, strict=True)]
        cells = [interval(column, signed=number > 1) for number, column in enumerate(columns)]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, help="only the first N steps of each run")
    parser.add_argument("--csv", type=Path, required=True, help="file of the choices; written if runs are given")
    options = parser.parse_args()
    if options.runs:
        write(options.csv, COLUMNS, [row for folder in options.runs for row in choices(folder, options.steps)])
    rows = read(options.csv)
    print(f"{len({row['run'] for row in rows})} runs with {len({row['seed'] for row in rows})} seeds. Intervals are 95% over seeds.\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()

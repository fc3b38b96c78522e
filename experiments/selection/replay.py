"""Choices of the best program in the journals of real runs: the highest score, the highest posterior mean, and the winner of the retests.

  python experiments/selection/replay.py RUN_DIR... --csv=replay.csv

Runs need the reward `holdout`, so that the private answers are unseen, and `finalists.count`. No program runs again: the journal has the
results of single rows, and finalists.json those of the retests.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from discover_jax.archive.archive import best_of
from discover_jax.archive.frontier import states_of
from discover_jax.archive.journal import Journal
from discover_jax.archive.ranking import Measurements, Ranking
from discover_jax.exceptions import RunError

COLUMNS = ("run", "choice", "program", "estimate", "unseen", "gap")


def choices(folder: Path) -> list[dict[str, Any]]:
    """One row for each rule. `estimate` is the score that the rule reports, `unseen` the score on the private answers.

    Raises:
      RunError: the journal cannot be read or has several competitions, or finalists.json is missing.
    """
    attempts = Journal(folder / "journal.jsonl").read()
    tasks = {attempt.task for attempt in attempts}
    if len(tasks) != 1:
        raise RunError(f"{folder} must be a run on one competition; its journal has {sorted(tasks)}.")
    states = states_of(attempts)
    private = {attempt.id: attempt.private_score for attempt in attempts}
    raw = best_of(states)
    if raw is None:
        return []
    (disclosed,) = json.loads((folder / "disclosure.json").read_bytes())["competitions"]
    sign = 1.0 if disclosed["metric"]["higher_is_better"] else -1.0
    posterior = Measurements().add(states).values(Ranking("posterior", sign > 0, float))
    shrunk = max(posterior, key=lambda id: sign * posterior[id])
    try:
        (found,) = json.loads((folder / "finalists.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} has no result of finalists ({error}). Set config.finalists.count, and finish the run.") from error
    winner = found["finalists"][0]
    chosen = {"raw": (raw.id, raw.score), "posterior": (shrunk, posterior[shrunk]), "finalists": (winner["id"], winner["retested_score"])}
    return [
        {
            "run": folder.name,
            "choice": rule,
            "program": id,
            "estimate": estimate,
            "unseen": private[id],
            "gap": sign * (estimate - private[id]),
        }
        for rule, (id, estimate) in chosen.items()
        if estimate is not None and private[id] is not None
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Means over the runs, with standard errors."""
    lines = []
    for rule in dict.fromkeys(row["choice"] for row in rows):
        own = [row for row in rows if row["choice"] == rule]
        parts = []
        for name in ("estimate", "unseen", "gap"):
            values = [row[name] for row in own]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            parts.append(f"{name} {statistics.mean(values):.4f} (standard error {error:.4f})")
        lines.append(f"{rule:10s} {len(own)} runs: {', '.join(parts)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path, help="file to write")
    options = parser.parse_args()
    rows = [row for folder in options.runs for row in choices(folder)]
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()

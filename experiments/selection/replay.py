"""Choices of the best program in the journals of real runs: the highest score, the highest posterior mean, and the winners of the retests.

  python experiments/selection/replay.py RUN_DIR... [--steps=N] --csv=experiments/selection/replay.csv
  python experiments/selection/replay.py --csv=experiments/selection/replay.csv      # only prints the table

Runs need the reward `holdout`, so that the private answers are unseen, and finalists.json; for the choice `both`, finalists_posterior.json
as well. retest.py writes both. No program runs again: the journal has the results of single rows, and the two files those of the retests.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from retest import POSTERIOR_NAME, ranked_frontier
from scipy import stats

from discover_jax.archive.archive import best_of
from discover_jax.archive.frontier import states_of
from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.runs.finalists import NAME

COLUMNS = ("run", "choice", "program", "estimate", "unseen", "gap")
RULES = ("raw", "posterior", "finalists", "both")


def choices(folder: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """One row for each rule. `estimate` is the score that the rule reports, `unseen` the score on the private answers.

    Args:
      steps: number of steps of the run to use, as in the retests; None: all.

    Raises:
      RunError: the journal cannot be read or has several competitions, or finalists.json is missing.
    """
    attempts = [each for each in Journal(folder / "journal.jsonl").read() if steps is None or each.step < steps]
    tasks = {attempt.task for attempt in attempts}
    if len(tasks) != 1:
        raise RunError(f"{folder} must be a run on one competition; its journal has {sorted(tasks)}.")
    private = {attempt.id: attempt.private_score for attempt in attempts}
    raw = best_of(states_of(attempts))
    if raw is None:
        return []
    (disclosed,) = json.loads((folder / "disclosure.json").read_bytes())["competitions"]
    sign = 1.0 if disclosed["metric"]["higher_is_better"] else -1.0
    shrunk = ranked_frontier(folder, attempts, higher_is_better=sign > 0).best
    assert shrunk is not None, "there is a program with a score"
    chosen = {"raw": (raw.id, raw.score), "posterior": (shrunk.id, sign * (shrunk.value or 0.0)), "finalists": _winner(folder / NAME)}
    if (folder / POSTERIOR_NAME).exists():
        chosen["both"] = _winner(folder / POSTERIOR_NAME)
    return [
        {
            "run": folder.name,
            "choice": rule,
            "program": id,
            "estimate": estimate,
            "unseen": private[id],
            "gap": round(sign * (estimate - private[id]), 6),
        }
        for rule, (id, estimate) in chosen.items()
        if estimate is not None and private[id] is not None
    ]


def _winner(file: Path) -> tuple[str, float | None]:
    try:
        (found,) = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read ({error}). Write it by retest.py, or set config.finalists.count and finish the run."
        ) from error
    return found["finalists"][0]["id"], found["finalists"][0]["retested_score"]


def interval(values: list[float], *, signed: bool = False) -> str:
    """The mean and the half width of its 95% interval by Student's t."""
    mean = statistics.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean:{'+' if signed else ''}.4f} +- {half:.4f}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over the runs as Markdown, with 95% intervals; differences to the raw maximum are paired by run."""
    base = {row["run"]: float(row["unseen"]) for row in rows if row["choice"] == "raw"}
    lines = ["| choice | runs | its estimate | on unseen rows | over raw | gap: estimate minus unseen |", "|---|---|---|---|---|---|"]
    for rule in [rule for rule in RULES if any(row["choice"] == rule for row in rows)]:
        own = [row for row in rows if row["choice"] == rule]
        estimate, unseen, gap = ([float(row[name]) for row in own] for name in ("estimate", "unseen", "gap"))
        gain = [float(row["unseen"]) - base[row["run"]] for row in own]
        cells = [interval(estimate), interval(unseen), interval(gain, signed=True), interval(gap, signed=True)]
        lines.append(f"| {rule} | {len(own)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, help="only the first N steps of each run")
    parser.add_argument("--csv", type=Path, required=True, help="file of the choices; written if runs are given")
    options = parser.parse_args()
    if options.runs:
        rows = [row for folder in options.runs for row in choices(folder, options.steps)]
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with options.csv.open(newline="") as file:
        print("\n".join(table(list(csv.DictReader(file)))))


if __name__ == "__main__":
    main()

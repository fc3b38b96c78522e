"""Tables of the runs with a real language model, from their folders, and the comparison of training with search.

  python experiments/real_model.py --runs=DIR --steps=N          # writes runs.csv and steps.csv
  python experiments/real_model.py [--plots=docs/images]         # prints the table; draws (extra `plots`)

A run's folder is named PROBLEM-ARM-SEED; the arms are `search` and `train`. Arms are compared seed by seed on the first N steps, so at
equal numbers of programs. Columns of runs.csv: `best_grade` is the highest score on the reward's rows, `best_unseen` that program on rows
that nothing saw; `chosen_unseen` is the program that the retests chose (finalists.json, see retest.py) on these rows, and
`chosen_retested` its score in the retests; `mean_last` is the mean reward of the last step, failures included; `valid_first` and
`valid_last` are shares of valid programs; `copies_last` is the metric `diversity/copy_frac` of the last step; `better` is the share of all
programs that score better than their parent. When the runs of runs.csv ran, `diversity/copy_frac` counted valid programs with the results
of their parent or of an earlier program of the group. Now it counts those with the results of any archived program.
In steps.csv, `different` is the number of different results of the step's valid programs, and `forests` the share of its programs that use
a random forest.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estimators import mean_and_half_width
from evidence import known, read, write
from retest import direction, seed_state

from discover_jax.archive.journal import Journal
from discover_jax.runs.finalists import NAME
from discover_jax.runs.metrics import read_metrics
from discover_jax.types import SEED, Attempt

TABLES = Path(__file__).with_suffix("")
RUNS = (
    "problem",
    "seed",
    "arm",
    "programs",
    "best_grade",
    "best_unseen",
    "chosen_unseen",
    "chosen_retested",
    "mean_last",
    "valid_first",
    "valid_last",
    "copies_last",
    "better",
)
STEPS = ("problem", "seed", "arm", "step", "valid", "copies", "mean", "best", "different", "forests", "step_s", "programs_s")
MEASURES = {
    "valid_last": "valid programs, last step",
    "copies_last": "copies among them",
    "mean_last": "mean reward of the last step",
    "better": "programs better than their parent, all steps",
    "best_grade": "best program, on the reward's rows",
    "best_unseen": "that program, on unseen rows",
    "chosen_unseen": "chosen program, on unseen rows",
    "chosen_retested": "chosen program, in the retests",
}


def measures(folder: Path, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a run, and those of its first `steps` steps.

    Raises:
      ValueError: the run has fewer steps.
    """
    problem, arm, seed = folder.name.rsplit("-", 2)
    names = {"problem": problem, "seed": int(seed), "arm": arm}
    metrics = read_metrics(folder / "metrics.jsonl")[:steps]
    if len(metrics) < steps:
        raise ValueError(f"{folder.name} has {len(metrics)} steps; {steps} are needed. Set --steps.")
    attempts = [attempt for attempt in Journal(folder / "journal.jsonl").read() if attempt.step < steps]
    best = max((attempt for attempt in attempts if attempt.score is not None), key=lambda attempt: attempt.reward)
    by_id = {attempt.id: attempt for attempt in attempts}
    sign = direction(folder)
    values = {attempt.id: _value(attempt.score, sign) for attempt in attempts} | {SEED.id: _value(seed_state(folder).score, sign)}
    file = folder / NAME
    winner = json.loads(file.read_bytes())[0]["finalists"][0] if file.exists() else None
    valid = [row["outcome/ok"] / row["rollouts/count"] for row in metrics]
    run = names | {
        "programs": len(attempts),
        "best_grade": best.score,
        "best_unseen": best.private_score,
        "chosen_unseen": by_id[winner["id"]].private_score if winner else None,
        "chosen_retested": round(winner["retested_score"], 6) if winner else None,
        "mean_last": round(metrics[-1]["reward/mean"], 6),
        "valid_first": valid[0],
        "valid_last": valid[-1],
        "copies_last": _rounded(metrics[-1].get("diversity/copy_frac")),
        "better": sum(values[attempt.id] > values[attempt.parent_id] for attempt in attempts) / len(attempts),
    }
    of_steps = [
        names
        | {
            "step": row["step"] + 1,
            "valid": share,
            "copies": _rounded(row.get("diversity/copy_frac")),
            "mean": round(row["reward/mean"], 6),
            "best": row["best/score"],
            **_of_programs([attempt for attempt in attempts if attempt.step == row["step"]]),
            "step_s": _rounded(row.get("time/step_s"), 1),
            "programs_s": _rounded(row.get("time/execute_s"), 1),
        }
        for row, share in zip(metrics, valid, strict=True)
    ]
    return run, of_steps


def _value(score: float | None, sign: float) -> float:
    """The score, with its sign changed if lower is better; minus infinity without a score."""
    return float("-inf") if score is None else sign * score


def _of_programs(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The number of different results of a step's valid programs, and the share of its programs that use a random forest."""
    results = {(attempt.score, attempt.rows) for attempt in attempts if attempt.score is not None}
    programs = [attempt.code for attempt in attempts if attempt.code]
    forests = sum("RandomForest" in code for code in programs)
    return {"different": len(results), "forests": _rounded(forests / len(programs)) if programs else None}


def _rounded(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else round(value, digits)


def table(rows: list[dict[str, Any]], problem: str) -> list[str]:
    """Training and search on one problem, and their paired differences, as Markdown."""
    arms = {arm: {row["seed"]: row for row in rows if row["problem"] == problem and row["arm"] == arm} for arm in ("search", "train")}
    seeds = sorted(arms["search"].keys() & arms["train"].keys())
    if not seeds:
        return [f"{problem}: no seed has both arms, so there is nothing to compare."]
    lines = [f"| | search | training | training minus search ({len(seeds)} seeds) |", "|---|---|---|---|"]
    for name, told in MEASURES.items():
        if not known({arm: {seed: runs[seed] for seed in seeds} for arm, runs in arms.items()}, name):
            continue
        pairs = [(arms["search"][seed][name], arms["train"][seed][name]) for seed in seeds]
        search, train, difference = (
            mean_and_half_width(values) for values in ([a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs])
        )
        lines.append(f"| {told} | {_shown(search)} | {_shown(train)} | {_shown(difference, '+')} |")
    return lines


def _shown(found: tuple[float, float], sign: str = "") -> str:
    return f"{found[0]:{sign}.4f} +- {found[1]:.4f}"


def draw(steps: list[dict[str, Any]], problem: str, file: Path) -> None:
    """Valid programs, mean reward and best score by step: thin lines are seeds, thick lines their means."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra `plots`

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "real_model"  # equal numbers give equal files
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    columns = (("valid", "share of valid programs"), ("mean", "mean reward of a step"), ("best", "best score so far"))
    for axis, (column, title) in zip(axes, columns, strict=True):
        for colour, arm in (("C0", "search"), ("C1", "train")):
            of_arm = [row for row in steps if row["problem"] == problem and row["arm"] == arm]
            numbers = sorted({row["step"] for row in of_arm})
            for seed in sorted({row["seed"] for row in of_arm}):
                axis.plot(numbers, [row[column] for row in of_arm if row["seed"] == seed], color=colour, alpha=0.3, linewidth=0.8)
            means = [statistics.mean(row[column] for row in of_arm if row["step"] == number) for number in numbers]
            axis.plot(numbers, means, color=colour, label={"search": "search", "train": "training"}[arm])
        axis.set(title=title, xlabel="step")
    axes[0].legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs to collect")
    parser.add_argument("--steps", type=int, default=12, help="number of steps of each run to use")
    parser.add_argument("--csv", type=Path, default=TABLES, help="folder of the tables")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    options = parser.parse_args()
    if options.runs is not None:
        found = [measures(folder, options.steps) for folder in sorted(options.runs.iterdir()) if (folder / "journal.jsonl").exists()]
        write(options.csv / "runs.csv", RUNS, [run for run, _ in found])
        write(options.csv / "steps.csv", STEPS, [step for _, steps in found for step in steps])
    rows = read(options.csv / "runs.csv")
    for problem in dict.fromkeys(row["problem"] for row in rows):
        print("\n".join(table(rows, problem)))
        if options.plots is not None:
            draw(read(options.csv / "steps.csv"), problem, options.plots / f"real-model-{problem}.svg")


if __name__ == "__main__":
    main()

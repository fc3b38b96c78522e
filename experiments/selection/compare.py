"""Which rule finds the best program, and not the luckiest? Simulated searches with a known truth; see README.md.

    python experiments/selection/compare.py --csv=experiments/selection/results.csv [--runs=1000] [--seed=0] [--scenarios=measured,...]
    python experiments/selection/compare.py --csv=experiments/selection/results.csv --tables
    python experiments/selection/compare.py --csv=experiments/selection/results.csv --plots=docs/images  # extra `plots`
    python experiments/selection/compare.py --calibration

The first command simulates and writes a row per scenario, rule for parents, and rule for the final choice. The next two only read the file.
The last one prints what the scenario `measured` has in common with the measurements in docs/results.md.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rules
from landscape import SETS, Landscape, Runs, posterior, search

STEPS = 12
SCENARIOS = {
    "measured": Landscape(),
    "collapse": Landscape(copies=(0.05, 0.9)),
    "failures": Landscape(failed=0.15, broken=0.15),
    "few rows": Landscape(rows=300),
    "many gains": Landscape(helpful=0.10),
}
PARENTS = {
    "greedy, raw": (rules.greedy, rules.raw),
    "greedy, shrunk": (rules.greedy, rules.shrunk),
    "greedy, ties": (rules.greedy, rules.ties),
    "PUCT, raw": (rules.puct, rules.raw),
    "PUCT, shrunk": (rules.puct, rules.shrunk),
    "greedy, truth": (rules.greedy, rules.truth),
}
"""Rules for parents: a selector, and the value by which it compares programs. `truth` knows the truth."""
CHOICES = {
    "raw": "the highest score",
    "steps": "the score of the lineage's first program plus the shrunken paired differences since then",
    "ties": "the same, with the differences themselves, or 0 if they are within noise",
    "shrunk": "the highest posterior mean",
    "finalists": "the 16 highest scores, run again",
    "both": "the 16 highest posterior means, run again",
    "truth": "the highest true score",
}
COLUMNS = ("scenario", "parents", "choice", "runs", "programs", "truth", "truth_half", "gain", "gain_half", "gap", "gap_half", "gap_sd")


def choices(found: Runs, landscape: Landscape) -> Iterator[tuple[str, int, rules.Choice]]:
    """The choice of each rule, with its number of program runs. Rules that run programs again see the search without its last step."""
    programs = found.open_RN.shape[1]
    for name, values in (("raw", rules.raw), ("steps", rules.shrunk_steps), ("ties", rules.ties), ("shrunk", rules.shrunk)):
        yield name, programs, rules.highest(values(found, landscape))
    shorter = found.first((STEPS - 1) * landscape.groups * landscape.group_size)
    total = shorter.open_RN.shape[1] + sum(rules.FINALISTS >> number for number in range(SETS - 1))
    for name, start in (("finalists", None), ("both", posterior(shorter, landscape.rows))):
        yield name, total, rules.finalists(shorter, landscape, start)
    yield "truth", programs, rules.highest(rules.truth(found, landscape))


def simulate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each scenario, rule for parents, and rule for the choice."""
    rows = []
    for scenario in arguments.scenarios.split(","):
        landscape, baseline_R = SCENARIOS[scenario], None
        for parents, (selector, values) in PARENTS.items():
            start = time.monotonic()
            found = search(landscape, selector(values, landscape), runs=arguments.runs, steps=STEPS, seed=arguments.seed)
            truth_RN = landscape.truth(found.easy_RN, found.open_RN)
            for name, programs, choice in choices(found, landscape):
                truth_R = truth_RN[np.arange(arguments.runs), choice.position_R]
                baseline_R = truth_R if baseline_R is None else baseline_R  # the first rules are the report's
                gap_R = choice.estimate_R - truth_R
                row = {"scenario": scenario, "parents": parents, "choice": name, "runs": arguments.runs, "programs": programs}
                for column, values_R in (("truth", truth_R), ("gain", truth_R - baseline_R), ("gap", gap_R)):
                    row |= {column: values_R.mean(), f"{column}_half": half_width(values_R)}
                rows.append(row | {"gap_sd": gap_R.std(ddof=1)})
            print(f"{scenario}: {parents}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return rows


def half_width(values_R: np.ndarray) -> float:
    """Half of the 95% interval of a mean over runs, by the normal distribution."""
    return float(1.96 * values_R.std(ddof=1) / np.sqrt(values_R.size))


def calibration(runs: int, seed: int) -> dict[str, float]:
    """What docs/results.md reports about search, for the scenario `measured` and how often posteriors are right."""
    landscape = SCENARIOS["measured"]
    found = search(landscape, rules.greedy(rules.raw, landscape), runs=runs, steps=STEPS, seed=seed)
    score_RN, size = rules.raw(found, landscape), landscape.groups * landscape.group_size
    chosen = rules.highest(score_RN)
    truth_R = landscape.truth(found.easy_RN, found.open_RN)[np.arange(runs), chosen.position_R]
    late_RN = (np.arange(score_RN.shape[1]) >= STEPS // 2 * size) & found.valid_RN
    parent_RN = np.take_along_axis(score_RN, np.maximum(found.parents_RN, 0), axis=1)
    estimate = posterior(found, landscape.rows)
    covered_RN = np.abs(estimate.mean - landscape.truth(found.easy_RN, found.open_RN)) <= rules.Z95 * np.sqrt(estimate.variance)
    gain_N, parent_N = (score_RN - parent_RN)[late_RN], parent_RN[late_RN]
    better_N = gain_N > 0
    return {
        "best score of the first step": score_RN[:, :size].max(axis=1).mean(),
        "best score": chosen.estimate_R.mean(),
        "best score minus true score": (chosen.estimate_R - truth_R).mean(),
        "children better than their parent, second half": better_N.mean(),
        "children that lose more than 0.05, second half": (gain_N < -0.05).mean(),
        "median gain of a better child": np.median(gain_N[better_N]),
        "gains of 0.01 or more, of better children of parents above 0.79": (gain_N[better_N & (parent_N > 0.79)] >= 0.01).mean(),
        "true scores within the posterior's 95% interval, all programs": covered_RN[found.valid_RN].mean(),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table per scenario as Markdown."""
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        print(f"\n### Scenario `{scenario}`\n")
        print("| parents | choice | true score | gain over greedy, raw | gap: estimate minus truth |\n|---|---|---|---|---|")
        for row in rows:
            if row["scenario"] == scenario:
                truth, gain, gap = (
                    f"{row[name]:{sign}.4f} +- {row[f'{name}_half']:.4f}" for name, sign in (("truth", ""), ("gain", "+"), ("gap", "+"))
                )
                print(f"| {row['parents']} | {row['choice']} | {truth} | {gain} | {gap} |")


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """selection.svg: for each scenario, the gain in true score and the gap of each pair of rules."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "selection", "svg.fonttype": "none"}  # the same file in every run, with text as text
    scenarios, parents = (list(dict.fromkeys(row[name] for row in rows)) for name in ("scenario", "parents"))
    shown = [name for name in CHOICES if name not in ("steps", "ties")]
    figure, axes = plt.subplots(len(scenarios), 2, figsize=(9, 2.6 * len(scenarios)), sharey=True, squeeze=False)
    for (left, right), scenario in zip(axes, scenarios, strict=True):
        for axis, name, label in ((left, "gain", "gain in true score"), (right, "gap", "gap: estimate minus truth")):
            axis.axvline(0.0, color="0.7", linewidth=0.8)
            for number, choice in enumerate(shown):
                of = [row for row in rows if row["scenario"] == scenario and row["choice"] == choice]
                heights = [len(parents) - parents.index(row["parents"]) - 0.12 * (number - (len(shown) - 1) / 2) for row in of]
                values, halves = ([row[column] for row in of] for column in (name, f"{name}_half"))
                axis.errorbar(values, heights, xerr=halves, fmt="o", markersize=3.5, linewidth=1, label=choice)
            axis.set_yticks(range(len(parents), 0, -1), parents)
            axis.locator_params(axis="x", nbins=5)
            axis.set_xlabel(label)
        left.set_title(scenario, loc="left", fontsize=10)
    axes[0][1].legend(fontsize=7, title="choice", title_fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "selection.svg", metadata={"Date": None})


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the file, with numbers."""
    with path.open(newline="") as file:
        return [{name: value if name in COLUMNS[:3] else float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--csv", type=Path, default=Path("experiments/selection/results.csv"))
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--tables", action="store_true", help="only print the tables of the file")
    parser.add_argument("--plots", type=Path, help="only draw the file, into this folder")
    parser.add_argument("--calibration", action="store_true", help="only compare the scenario `measured` with docs/results.md")
    arguments = parser.parse_args()
    if arguments.calibration:
        for name, value in calibration(arguments.runs, arguments.seed).items():
            print(f"| {name} | {value:.4f} |")
        return
    if not arguments.tables and not arguments.plots:
        rows = simulate(arguments)
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)
    if arguments.plots:
        draw(read(arguments.csv), arguments.plots)
    else:
        show(read(arguments.csv))


if __name__ == "__main__":
    main()

"""Ablations with a real language model: each arm changes one setting of the base arm, and is compared with it seed by seed.

  python experiments/ablations.py --runs=DIR --steps=N          # writes ablations.csv
  python experiments/ablations.py [--base=base] [--plots=docs/images] # prints the table; draws (extra `plots`)

A run's folder is named PROBLEM-ARM-SEED. The first N steps of each run are used, so arms are compared at equal numbers of programs. Runs
with fewer steps are left out and named. Rows of problems that DIR does not have stay in the table.
Columns: `best_grade` is the best score of all steps, and `better` the share of all programs that beat their parent, by more than rounding.
The others are means over the last two of the N steps: `valid` is the share of valid programs and `mean` the mean reward, failures included.
The rest measure collapse. `results` is the number of different results, divided by the number of programs. `structures` is the same for
different structures (names and layout do not count). `repeats` is the share of valid programs that have the result of an earlier program
or of the seed program. `as_parent` is the share of programs with the structure or the result of their parent. `families` is the effective
number of families of programs, exp(entropy); a family is a set of models or optimisers that its programs name (FAMILIES). `constant` is
the share of groups with equal signals.
A result is a score, rounded to six digits, and for competitions also the results of the rows. So these measures do not depend on the
settings of copies, unlike the metric `diversity/copy_frac`.
"""

import argparse
import collections
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estimators import mean_and_half_width
from evidence import cell, differences, known_values, read
from real_model import TABLES, best_of, folders, merge, names_of
from retest import direction, seed_state

from discover_jax.archive.journal import Journal
from discover_jax.runs.metrics import read_metrics
from discover_jax.text.structure import structure_key
from discover_jax.types import SEED, Attempt

ABLATIONS = (
    "problem",
    "seed",
    "arm",
    "programs",
    "best_grade",
    "better",
    "valid",
    "mean",
    "results",
    "structures",
    "repeats",
    "as_parent",
    "families",
    "constant",
)
MEASURES = {
    "valid": "valid programs",
    "mean": "mean reward",
    "best_grade": "best score",
    "better": "better than their parent, all steps",
    "results": "different results",
    "structures": "different structures",
    "repeats": "repeated results among valid programs",
    "as_parent": "programs like their parent",
    "families": "families of programs",
    "constant": "constant groups",
}
FAMILIES = {
    "spaceship": r"\b([A-Z]\w*(?:Classifier|Regression(?:CV)?|SVC|NB|Perceptron|Analysis))\(",
    "circles": r"\b(minimize|linprog|basinhopping|differential_evolution|dual_annealing|shgo|root|fsolve|least_squares)\(",
}
"""By the first word of the problem: a pattern whose matches in a program make its family. These are models, and optimisers of SciPy."""
LAST = 2
"""Number of steps at the end that most measures use."""
_DIGITS = 6


def ablation(folder: Path, steps: int) -> dict[str, Any]:
    """The row of a run, from its first `steps` steps.

    Raises:
      ValueError: the run has fewer steps.
    """
    names, rows = names_of(folder), read_metrics(folder / "metrics.jsonl")[:steps]
    if len(rows) < steps:
        raise ValueError(f"{folder.name} has {len(rows)} steps; {steps} are needed. Set --steps.")
    rows = rows[-LAST:]
    attempts = [attempt for attempt in Journal(folder / "journal.jsonl").read() if attempt.step < steps]
    seed = seed_state(folder)
    by_step = [[attempt for attempt in attempts if attempt.step == row["step"]] for row in rows]
    results: dict[str, Any] = {SEED.id: _result(seed.score, seed.rows)}
    results |= {attempt.id: _result(attempt.score, attempt.rows) for attempt in attempts}
    last = [attempt for mine in by_step for attempt in mine]
    programs = {SEED.id: seed.code} | {attempt.id: attempt.code or "" for attempt in attempts}
    structures = {id: structure_key(programs[id]) for id in {each for attempt in last for each in (attempt.id, attempt.parent_id)}}
    best = best_of(attempts)
    return names | {
        "programs": len(attempts),
        "best_grade": best.score if best else None,
        "better": sum(_is_better(attempt, results, direction(folder)) for attempt in attempts) / len(attempts),
        "valid": sum(attempt.score is not None for attempt in last) / len(last),
        "mean": statistics.mean(row["reward/mean"] for row in rows),
        "results": statistics.mean(_distinct([results[attempt.id] for attempt in mine]) / len(mine) for mine in by_step),
        "structures": statistics.mean(
            _distinct([structures[attempt.id] if attempt.code else None for attempt in mine]) / len(mine) for mine in by_step
        ),
        "repeats": _repeats(attempts, last, results),
        "as_parent": sum(_is_like_parent(attempt, results, structures) for attempt in last) / len(last),
        "families": effective_number(last, names["problem"]),
        "constant": statistics.mean(row["groups/constant_frac"] for row in rows),
    }


def _result(score: float | None, rows: str) -> tuple[float, str] | None:
    """What copies have in common; None for a failure."""
    return None if score is None else (round(score, _DIGITS), rows)


def _distinct(keys: Sequence[Any]) -> int:
    return len({key for key in keys if key is not None})


def _repeats(attempts: Sequence[Attempt], last: Sequence[Attempt], results: dict[str, Any]) -> float | None:
    """The share of the valid programs in `last` whose result an earlier program or the seed program has; None if none is valid."""
    seen, repeated = {results[SEED.id]}, set()
    for attempt in attempts:  # in the order of steps, groups and rollouts
        if results[attempt.id] in seen:
            repeated.add(attempt.id)
        seen.add(results[attempt.id])
    valid = [attempt for attempt in last if results[attempt.id] is not None]
    return sum(attempt.id in repeated for attempt in valid) / len(valid) if valid else None


def _is_better(attempt: Attempt, results: dict[str, Any], sign: float) -> bool:
    """Whether a program beats its parent. Any valid program beats an empty seed program."""
    mine, parent = results[attempt.id], results[attempt.parent_id]
    return mine is not None and (parent is None or sign * mine[0] > sign * parent[0])


def _is_like_parent(attempt: Attempt, results: dict[str, Any], structures: dict[str, str]) -> bool:
    """Whether a program has the structure or the result of its parent. A reply without a program has neither."""
    if not attempt.code:
        return False
    result = results[attempt.id]
    return structures[attempt.id] == structures[attempt.parent_id] or (result is not None and result == results[attempt.parent_id])


def effective_number(attempts: Sequence[Attempt], problem: str) -> float | None:
    """exp(entropy) of the families of the programs: 1 if all are of one family, and k if k families are equally frequent (Hill 1973).
    None if the problem has no families, or no reply has a program.
    """
    if (pattern := FAMILIES.get(problem.split("-")[0])) is None:
        return None
    counts = collections.Counter(frozenset(re.findall(pattern, attempt.code)) for attempt in attempts if attempt.code)
    if not counts:
        return None
    return math.exp(-sum(count / counts.total() * math.log(count / counts.total()) for count in counts.values()))


def collect(runs: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of the runs in a folder that have enough steps."""
    rows = []
    for folder in folders(runs):
        if (count := len(read_metrics(folder / "metrics.jsonl"))) < steps:
            print(f"left out: {folder.name} has {count} of {steps} steps", file=sys.stderr)
            continue
        rows.append(ablation(folder, steps))
    return rows


def arms_of(rows: Sequence[dict[str, Any]], problem: str, base: str) -> dict[str, dict[float, dict[str, Any]]]:
    """The rows of a problem by arm and seed, the base first.

    Raises:
      ValueError: no run is of the base.
    """
    arms: dict[str, dict[float, dict[str, Any]]] = {base: {}}
    for row in rows:
        if row["problem"] == problem:
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    if not arms[base]:
        raise ValueError(f"No run of {problem} has the arm {base!r}; its arms are {', '.join(sorted(arms.keys() - {base}))}. Set --base.")
    return arms


def table(rows: Sequence[dict[str, Any]], problem: str, base: str) -> list[str]:
    """The mean of the base and each arm's differences from it as Markdown, a row a measure, and the number of comparisons."""
    arms = arms_of(rows, problem, base)
    others = [arm for arm in arms if arm != base]
    shared = {arm: len(arms[arm].keys() & arms[base].keys()) for arm in others}
    head = [problem, f"{base} ({len(arms[base])} seeds)", *(f"{arm} minus {base} ({shared[arm]} seeds)" for arm in others)]
    lines, intervals = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for name, words in MEASURES.items():
        if not any(known_values(runs, name) for runs in arms.values()):
            continue
        found = {arm: differences(arms[arm], arms[base], name) for arm in others}
        intervals += [mean_and_half_width(values) for values in found.values() if len(values) > 1]
        cells = [cell(known_values(arms[base], name), len(arms[base]))]
        cells += [cell(found[arm], shared[arm], signed=True) for arm in others]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    clear = sum(abs(mean) > half for mean, half in intervals)
    return [
        *lines,
        "",
        f"{clear} of {len(intervals)} intervals of differences exclude 0; by chance, about {0.05 * len(intervals):.1f} would.",
    ]


def draw(rows: Sequence[dict[str, Any]], problem: str, base: str, file: Path) -> None:
    """The differences from the base by measure: grey dots are seeds, large dots their means with 95% intervals."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra `plots`

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ablations"  # equal numbers give equal files
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    arms = arms_of(rows, problem, base)
    others = [arm for arm in arms if arm != base]
    drawn = ("valid", "mean", "best_grade", "results", "as_parent")
    figure, axes = plt.subplots(1, len(drawn), figsize=(14, 1 + 0.4 * len(others)), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, drawn, strict=True):
        axis.axvline(0, color="0.8", zorder=0)
        for place, arm in enumerate(others):
            if not (values := differences(arms[arm], arms[base], name)):
                continue
            mean, half = mean_and_half_width(values)
            axis.scatter(values, [place] * len(values), color="0.7", s=12)
            axis.errorbar([mean], [place], xerr=[half], color="C1" if abs(mean) > half else "C0", marker="o", markersize=5, capsize=3)
        axis.set(title=MEASURES[name], yticks=range(len(others)), yticklabels=others, xlabel=f"difference from {base}")
    axes[0].invert_yaxis()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs to collect")
    parser.add_argument("--steps", type=int, default=12, help="number of steps of each run to use")
    parser.add_argument("--base", default="base", help="the arm to compare with")
    parser.add_argument("--csv", type=Path, default=TABLES, help="folder of the table")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    options = parser.parse_args()
    file = options.csv / "ablations.csv"
    if options.runs is not None:
        merge(file, ABLATIONS, collect(options.runs, options.steps))
    elif not file.exists():
        parser.error(f"{file} does not exist. Set --runs to a folder of runs.")
    rows = read(file)
    for problem in dict.fromkeys(row["problem"] for row in rows):
        print("\n".join(table(rows, problem, options.base)))
        if options.plots is not None:
            draw(rows, problem, options.base, options.plots / f"real-model-ablations-{problem}.svg")


if __name__ == "__main__":
    main()

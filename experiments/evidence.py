"""Does training beat search, and how do its programs change? Tables and small CSVs from the runs of estimators.py.

    python experiments/estimators.py --competition=spaceship-titanic --raw=train.csv --out=DIR --seeds=8 --reuse=greedy
        --learning=none,entropic --same_prompts=greedy/entropic --flag=--config.task.reward=holdout [...]
    python experiments/evidence.py --runs=DIR --csv=experiments/evidence [--steps=N]  # collects; prints the paired differences
    python experiments/evidence.py --csv=experiments/evidence --plots=docs/images  # draws; extra `plots`

A run's folder is named REUSE-LEARNING-SEED. Runs are compared seed by seed, at equal numbers of programs; both start with the same ones.
With the reward `holdout`, the private answers are rows that no reward, prompt or choice saw. `steps.csv` has a row per step and `runs.csv`
a row per run. `traits.csv` has a row per step and trait of a program (a column that it adds, a model that it fits), with the fraction of
the step's scored programs that have it. `same_prompts.csv` has a row for each further step with and without the adapter. `--steps` uses
only the first N steps of every run.
"""

import argparse
import collections
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from estimators import interval, mean_and_half_width

from discover_jax.archive.journal import Journal
from discover_jax.records import parse_json
from discover_jax.runs.metrics import read_metrics
from discover_jax.types import Attempt

COLUMNS = (
    "reward/mean",
    "reward/max",
    "best/score",
    "outcome/ok",
    "rollouts/count",
    "groups/constant_frac",
    "diversity/distance",
    "entropy",
    "time/step_s",
)
BROKEN = 0.05
"""A child that scores this much less than its parent counts as broken."""
MEASURES = {
    "last_two_mean": "mean of the last two steps, on the reward's rows",
    "last_two_private": "the same programs, on unseen rows",
    "best": "best program, on the reward's rows",
    "private": "that program, on unseen rows",
    "chosen_private": "chosen program (finalists), on unseen rows",
    "better": "children better than their parent, second half of the steps",
    "broken": f"children that failed or scored more than {BROKEN} below their parent, second half",
}
SAME_PROMPTS = {
    "mean": "mean, on the reward's rows",
    "private_mean": "the same programs, on unseen rows",
    "max": "the best of them, on the reward's rows",
    "valid": "valid programs",
    "better": "children better than their parent",
    "broken": f"children that failed or scored more than {BROKEN} below their parent",
}
ACCURACIES = ("mean", "private_mean", "max", "last_two_mean", "last_two_private", "best", "private", "chosen_private")
"""Measures that are drawn next to each other."""
_ADDED = re.compile(r'^\s*X\["(\w+)"\] = ', re.MULTILINE)
_MODEL = re.compile(r"\b([A-Z]\w*(?:Classifier|Regression(?:CV)?|SVC|NB|Perceptron|Analysis))\(")


def traits(code: str) -> set[str]:
    """The columns that a program adds, `column NAME`, and the models that it fits, `model NAME`; `several models` if more than one."""
    models = _MODEL.findall(code)
    found = {f"column {name}" for name in _ADDED.findall(code)} | {f"model {name}" for name in models}
    return found | ({"several models"} if len(models) > 1 else set())


def runs_in(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """The setting, seed and folder of each run."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        setting, _, seed = path.name.rpartition("-")
        if setting and seed.isdigit() and (path / "journal.jsonl").exists():
            yield setting, int(seed), path


def collect(folder: Path, csv_folder: Path, steps: int | None) -> None:
    """Writes the tables of the first `steps` steps; 0: as many as the longest run has; None: all steps of each run. Runs with fewer steps
    are skipped and named.
    """
    found = [(setting, seed, path, read_metrics(path / "metrics.jsonl")) for setting, seed, path in runs_in(folder)]
    if steps == 0:
        steps = max((len(rows) for *_, rows in found), default=0)
    tables: dict[str, list[list[Any]]] = {
        "steps": [["setting", "seed", "step", *COLUMNS, "private/mean", "children/better", "children/broken"]],
        "runs": [["setting", "seed", *MEASURES, "programs", "timeouts"]],
        "traits": [["setting", "seed", "step", "trait", "share"]],
        "same_prompts": [["policy", "seed", *SAME_PROMPTS]],
    }
    for setting, seed, path, rows in found:
        if steps is not None and len(rows) < steps:
            print(f"left out: {path.name} has {len(rows)} of {steps} steps", file=sys.stderr)
            continue
        rows = rows[:steps]
        attempts = [attempt for attempt in Journal(path / "journal.jsonl").read() if attempt.step <= rows[-1]["step"]]
        private = private_means(attempts)
        for row in rows:
            of_children = children(attempts, {row["step"]})
            columns = [row.get(column) for column in COLUMNS]
            tables["steps"].append([setting, seed, row["step"] + 1, *columns, private[row["step"]], *of_children])
        tables["runs"].append([setting, seed, *measured(rows, attempts, private, chosen_program(path, attempts))])
        for step, shares in shares_by_step(attempts).items():
            tables["traits"] += [[setting, seed, step + 1, trait, round(share, 4)] for trait, share in sorted(shares.items())]
    for policy, seed, path in runs_in(folder / "same_prompts"):
        if not (rows := read_metrics(path / "metrics.jsonl")):
            print(f"left out: {path.name} has no finished step", file=sys.stderr)
            continue
        row = rows[-1]
        attempts = Journal(path / "journal.jsonl").read()
        columns = [row["reward/mean"], private_means(attempts)[row["step"]], row["reward/max"], row["rollouts/valid_frac"]]
        tables["same_prompts"].append([policy, seed, *columns, *children(attempts, {row["step"]})])
    csv_folder.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        path = csv_folder / f"{name}.csv"
        path.unlink(missing_ok=True)  # from an earlier collection
        if len(lines) > 1:
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(lines)


def chosen_program(folder: Path, attempts: list[Attempt]) -> str | None:
    """The id of the program that the retests chose; None without finalists, or if programs of later steps took part."""
    if not (file := folder / "finalists.json").exists():
        return None
    (found,) = parse_json(file.read_bytes())
    known = {attempt.id for attempt in attempts}
    return found["chosen"] if all(row["id"] in known for row in found["finalists"]) else None


def measured(rows: list[dict[str, Any]], attempts: list[Attempt], private: dict[int, float], chosen: str | None) -> list[Any]:
    """A run's columns of runs.csv, from its metrics, its journal, the means on the private answers and the id of the chosen program."""
    scored = [(one.score, one.private_score) for one in attempts if one.score is not None]
    best, private_score = max(scored, key=lambda pair: pair[0], default=(None, None))  # the earliest of equal scores
    last = [row["step"] for row in rows[-2:]]
    last_two = [row["reward/mean"] for row in rows[-2:]], [private[step] for step in last]
    late = children(attempts, {row["step"] for row in rows[len(rows) // 2 :]})
    counts = [sum(row[name] for row in rows) for name in ("rollouts/count", "outcome/timeout")]
    chosen_private = next((one.private_score for one in attempts if one.id == chosen), None)
    return [*(sum(each) / len(each) for each in last_two), best, private_score, chosen_private, *late, *counts]


def private_means(attempts: list[Attempt]) -> dict[int, float]:
    """The mean score of each step on the private answers; a failure counts 0, like its reward."""
    scores: dict[int, list[float]] = collections.defaultdict(list)
    for attempt in attempts:
        scores[attempt.step].append(attempt.private_score or 0.0)
    return {step: sum(values) / len(values) for step, values in scores.items()}


def children(attempts: list[Attempt], steps: set[int]) -> tuple[float | None, float | None]:
    """Fractions of the children of those steps: better than the parent, and failed or worse by more than `BROKEN`."""
    scores = {attempt.id: attempt.score for attempt in attempts}
    pairs = [(one.score, scores[one.parent_id]) for one in attempts if one.step in steps and one.parent_id in scores]
    if not pairs:
        return None, None
    better = sum(mine is not None and mine > parent for mine, parent in pairs)
    broken = sum(mine is None or mine < parent - BROKEN for mine, parent in pairs)
    return better / len(pairs), broken / len(pairs)


def shares_by_step(attempts: list[Attempt]) -> dict[int, dict[str, float]]:
    """For each step, the fraction of its scored programs that have each trait."""
    counts: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    totals: collections.Counter[int] = collections.Counter()
    for attempt in attempts:
        if attempt.score is not None and attempt.code:
            totals[attempt.step] += 1
            counts[attempt.step].update(traits(attempt.code))
    return {step: {trait: count / total for trait, count in counts[step].items()} for step, total in sorted(totals.items())}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, with numbers parsed."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes a CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_setting(table: Path) -> dict[str, dict[float, dict[str, Any]]]:
    """The rows of a table by its first two columns: setting (or policy), then seed."""
    found: dict[str, dict[float, dict[str, Any]]] = collections.defaultdict(dict)
    for row in read(table):
        setting, seed, *_ = row.values()
        found[setting][seed] = row
    return found


def known_pairs(one: dict[float, dict[str, Any]], other: dict[float, dict[str, Any]], measure: str) -> list[tuple[float, float]]:
    """A measure of two settings, seed by seed, of the seeds with both."""
    pairs = [(one[seed].get(measure, ""), other[seed].get(measure, "")) for seed in sorted(one.keys() & other.keys())]
    return [pair for pair in pairs if "" not in pair]


def differences(runs: dict[float, dict[str, Any]], base: dict[float, dict[str, Any]], measure: str) -> list[float]:
    """The differences of a measure between a setting and the base, seed by seed."""
    return [mine - other for mine, other in known_pairs(runs, base, measure)]


def comparisons(csv_folder: Path, base: str) -> Iterator[tuple[dict[str, dict[float, dict[str, Any]]], str, dict[str, str]]]:
    """Rows by setting and seed, the setting to compare with, and the measures: first of whole runs, then of the same prompts."""
    yield by_setting(csv_folder / "runs.csv"), base, MEASURES
    if (same_prompts := csv_folder / "same_prompts.csv").exists():
        yield by_setting(same_prompts), "base", SAME_PROMPTS


def known_values(runs: dict[float, dict[str, Any]], measure: str) -> list[float]:
    """A measure of the runs that have it. Without reuse, no child has a parent; without finalists, no program is chosen by retests."""
    return [row[measure] for row in runs.values() if row.get(measure, "") != ""]


def compare(found: dict[str, dict[float, dict[str, Any]]], base: str, measures: dict[str, str], only_differences: bool) -> None:
    """Prints each setting's measures, or only those of `base`, and the paired differences to `base`."""
    others = [name for name in found if name != base]
    shown = [base] if only_differences else list(found)
    pairs = {name: len(found[name].keys() & found[base].keys()) for name in others}
    print(f"\n| | {' | '.join([*shown, *(f'{name} minus {base} ({count} seeds)' for name, count in pairs.items())])} |")
    print("|---" * (1 + len(shown) + len(others)) + "|")
    for measure, told in measures.items():
        if not any(known_values(runs, measure) for runs in found.values()):
            continue
        cells = [cell(known_values(found[name], measure), len(found[name])) for name in shown]
        cells += [cell(differences(found[name], found[base], measure), pairs[name], signed=True) for name in others]
        print(f"| {told} | {' | '.join(cells)} |")


def cell(values: list[float], count: int, *, signed: bool = False) -> str:
    """A mean with its interval, and the number of seeds if some of `count` lack the measure."""
    if not values:
        return ""
    return interval(values, signed=signed) + ("" if len(values) == count else f" ({len(values)} seeds)")


def draw(csv_folder: Path, base: str, plots: Path) -> None:
    """Draws differences to `base`, rewards and best scores by step, and the fractions of the most common traits, as SVG."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra `plots`

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # equal numbers give equal files
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    plots.mkdir(parents=True, exist_ok=True)
    for name, make in (("differences", _draw_differences), ("scores", _draw_scores), ("traits", _draw_traits)):
        make(plt, csv_folder, base).savefig(plots / f"{csv_folder.name}-{name}.svg", metadata={"Date": None})


def _draw_differences(plt: Any, csv_folder: Path, base: str) -> Any:
    """A line per setting and measure of accuracy: seeds in grey, mean and interval in orange if the interval excludes 0."""
    lines: list[tuple[str, list[float]]] = []
    for found, other, measures in reversed(list(comparisons(csv_folder, base))):
        for measure in ACCURACIES:
            for name in found:
                if measure in measures and name != other and (gaps := differences(found[name], found[other], measure)):
                    lines.append((f"{name} minus {other}: {measures[measure]}", gaps))
    figure, axis = plt.subplots(figsize=(10, 0.5 + 0.4 * len(lines)), constrained_layout=True)
    axis.axvline(0, color="0.8", zorder=0)
    for place, (_, values) in enumerate(lines):
        mean, half = mean_and_half_width(values)
        sure = abs(mean) > half
        axis.scatter(values, [place] * len(values), color="0.7", s=12)
        axis.errorbar([mean], [place], xerr=[half], color="C1" if sure else "C0", marker="o", markersize=5, capsize=3)
    axis.set(yticks=range(len(lines)), yticklabels=[told for told, _ in lines], xlabel="difference in accuracy")
    axis.invert_yaxis()
    return figure


def _draw_scores(plt: Any, csv_folder: Path, base: str) -> Any:
    steps = read(csv_folder / "steps.csv")
    settings = _in_order(steps, base)
    numbers = sorted({row["step"] for row in steps})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, column, title in ((axes[0], "reward/mean", "mean reward of a step"), (axes[1], "best/score", "best score so far")):
        for colour, setting in enumerate(settings):
            by_step = [[row[column] for row in steps if row["setting"] == setting and row["step"] == step] for step in numbers]
            for seed in {row["seed"] for row in steps if row["setting"] == setting}:
                line = [row[column] for row in steps if row["setting"] == setting and row["seed"] == seed]
                axis.plot(numbers, line, color=f"C{colour}", alpha=0.2, linewidth=0.8)
            axis.plot(numbers, [sum(x) / len(x) for x in by_step], color=f"C{colour}", label=setting)
        axis.set(title=title, xlabel="step")
    axes[0].legend()
    return figure


def _draw_traits(plt: Any, csv_folder: Path, base: str) -> Any:
    found = read(csv_folder / "traits.csv")
    settings = _in_order(found, base)
    numbers = sorted({row["step"] for row in found})
    figure, axes = plt.subplots(
        1, len(settings), figsize=(5 * len(settings), 6), sharex=True, sharey=True, constrained_layout=True, squeeze=False
    )
    common = [trait for trait, _ in collections.Counter(row["trait"] for row in found).most_common(24)]
    for axis, setting in zip(axes[0], settings, strict=True):
        for place, trait in enumerate(common):
            early, late = (share(found, setting, trait, chosen) for chosen in (numbers[:1], numbers[-2:]))
            axis.plot([early, late], [place, place], color="0.7", zorder=1)
            axis.scatter([early], [place], color="0.6", s=16, label="first step" if place == 0 else None)
            axis.scatter([late], [place], color="C1", s=22, label="last two steps" if place == 0 else None)
        axis.set(title=setting, xlabel="share of scored programs", yticks=range(len(common)), yticklabels=common)
    axes[0][0].invert_yaxis()
    axes[0][0].legend()
    return figure


def _in_order(rows: list[dict[str, Any]], base: str) -> list[str]:
    """The settings of a table, `base` first."""
    return [base, *sorted({row["setting"] for row in rows} - {base})]


def share(rows: list[dict[str, Any]], setting: str, trait: str, steps: list[float]) -> float:
    """The mean over seeds and steps; a step without the trait has no row."""
    mine = [row for row in rows if row["setting"] == setting and row["step"] in steps]
    runs = {(row["seed"], row["step"]) for row in mine}
    return sum(row["share"] for row in mine if row["trait"] == trait) / max(1, len(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs to collect into --csv")
    parser.add_argument("--csv", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--steps", type=int, default=0, help="number of steps to use of each run; 0: as many as the longest run has")
    parser.add_argument("--any_length", action="store_true", help="use all steps of each run, whatever its length")
    parser.add_argument("--base", default="", help="the setting to compare with; default: the first without learning")
    parser.add_argument("--differences", action="store_true", help="print the values of the base only, and the differences to it")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    arguments = parser.parse_args()
    if arguments.runs is not None:
        collect(arguments.runs, arguments.csv, None if arguments.any_length else arguments.steps)
    base = arguments.base or next(name for name in by_setting(arguments.csv / "runs.csv") if name.endswith("-none"))
    for comparison in comparisons(arguments.csv, base):
        compare(*comparison, arguments.differences)
    if arguments.plots is not None:
        draw(arguments.csv, base, arguments.plots)


if __name__ == "__main__":
    main()

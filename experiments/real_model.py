"""Tables of the runs with a real language model, from their folders, and the comparison of training with search.

  python experiments/real_model.py --runs=DIR --steps=N          # writes runs.csv, steps.csv and replies.csv
  python experiments/real_model.py --runs=DIR --same_prompts=DIR # also writes same_prompts.csv
  python experiments/real_model.py [--plots=docs/images]         # prints the tables; draws (extra `plots`)

A run's folder is named PROBLEM-ARM-SEED; the arms are `search` and `train`. Arms are compared seed by seed on the first N steps, so at
equal numbers of programs. Rows of problems that DIR does not have stay in the tables.
Columns of runs.csv: `best_grade` is the highest score on the reward's rows, `best_unseen` that program on rows that nothing saw;
`chosen_unseen` is the program that the retests chose (finalists.json, see retest.py) on these rows, and `chosen_retested` its score in
the retests; `mean_last` is the mean reward of the last step, failures included; `valid_first` and `valid_last` are shares of valid
programs; `copies_last` is the metric `diversity/copy_frac` of the last step; `better` is the share of all programs that score better than
their parent. With the reward `grade`, no rows are unseen. `space` are the earlier runs on Spaceship Titanic. In these,
`diversity/copy_frac` counted valid programs with the results of their parent or of an earlier program of the group. Now it counts those
with the results of any archived program.
In steps.csv, `different` is the number of different results of the step's valid programs, and `trait` the share of its programs with the
problem's trait (TRAITS).
The folders of `--same_prompts` are named PROBLEM-adapter-SEED and PROBLEM-base-SEED. Each has one step that continues the training run of
its seed, with and without the adapter. In same_prompts.csv, `mean` is the mean reward, and `gain` is the best score of the step minus the
best score of the training run, or 0 if that is higher.
replies.csv has a row for each part of a run, `first` and `last` for its first and last two steps, and for each step on the same prompts
(`same`). `cut` is the share of replies that reached `sampling.max_new_tokens`, `valid` the share of valid programs, and `valid_complete`
this share among the replies that were not cut. `tokens` is the mean length of a reply, and `parent` that of the parents' programs in
characters. `--replies` prints its tables.
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence import cell, known_pairs, read, write
from retest import direction, seed_state, winner

from discover_jax.archive.journal import Journal
from discover_jax.records import parse_json
from discover_jax.runs.finalists import NAME
from discover_jax.runs.metrics import read_metrics
from discover_jax.types import SEED, Attempt, Outcome, StopReason

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
TRAITS = {
    "spaceship": "RandomForest",
    "spaceship-grade": "RandomForest",
    "space": "RandomForest",
    "circles": r"\b(minimize|linprog|basinhopping|differential_evolution|dual_annealing|shgo|root|fsolve|least_squares)\(",
}
"""By problem: a pattern in a program. It uses a random forest; it calls an optimiser of SciPy."""
STEPS = (
    "problem",
    "seed",
    "arm",
    "step",
    "valid",
    "copies",
    "mean",
    "best",
    "different",
    "trait",
    "step_s",
    "sample_s",
    "programs_s",
    "update_s",
)
SAME_PROMPTS = ("problem", "seed", "arm", "valid", "mean", "copies", "different", "better", "gain")
REPLIES = ("problem", "seed", "arm", "part", "cut", "valid", "valid_complete", "tokens", "parent")
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
SAME_PROMPTS_MEASURES = {
    "valid": "valid programs",
    "mean": "mean reward",
    "copies": "copies among the valid programs",
    "different": "different results of the 64 programs",
    "better": "programs better than their parent",
    "gain": "best score over that of the training run",
}


REPLIES_MEASURES = {
    "cut": "replies that reach the token limit",
    "valid": "valid programs",
    "valid_complete": "valid programs among the other replies",
    "tokens": "tokens of a reply",
    "parent": "characters of the parent",
}


def names_of(folder: Path) -> dict[str, Any]:
    """Problem, seed and arm of a run, from its folder's name.

    Raises:
      ValueError: it is not a name of this form.
    """
    parts = folder.name.rsplit("-", 2)
    if len(parts) < 3 or not parts[2].isdecimal():
        raise ValueError(f"The folder {folder} of a run must be named PROBLEM-ARM-SEED, with a whole number as seed. Rename or move it.")
    return {"problem": parts[0], "seed": int(parts[2]), "arm": parts[1]}


def measures(folder: Path, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a run, and those of its first `steps` steps.

    Raises:
      ValueError: the run has fewer steps, or its folder has another name.
      RunError: see `retest.winner`.
    """
    names = names_of(folder)
    metrics = read_metrics(folder / "metrics.jsonl")[:steps]
    if len(metrics) < steps:
        raise ValueError(f"{folder.name} has {len(metrics)} steps; {steps} are needed. Set --steps.")
    attempts = [attempt for attempt in Journal(folder / "journal.jsonl").read() if attempt.step < steps]
    best = best_of(attempts)
    sign = direction(folder)
    values = {attempt.id: _value(attempt.score, sign) for attempt in attempts} | {SEED.id: _value(seed_state(folder).score, sign)}
    chosen, retested = winner(file, attempts) if (file := folder / NAME).exists() else (None, None)
    valid = [row["outcome/ok"] / row["rollouts/count"] for row in metrics]
    run = names | {
        "programs": len(attempts),
        "best_grade": best.score if best else None,
        "best_unseen": best.private_score if best and _has_unseen_rows(folder) else None,
        "chosen_unseen": chosen.private_score if chosen and _has_unseen_rows(folder) else None,
        "chosen_retested": _rounded(retested),
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
            **_of_programs([attempt for attempt in attempts if attempt.step == row["step"]], names["problem"]),
            "step_s": _rounded(row.get("time/step_s"), 1),
            "sample_s": _rounded(row.get("time/sample_s"), 1),
            "programs_s": _rounded(row.get("time/execute_s"), 1),
            "update_s": _rounded(row.get("time/update_s"), 1),
        }
        for row, share in zip(metrics, valid, strict=True)
    ]
    return run, of_steps


def best_of(attempts: Sequence[Attempt]) -> Attempt | None:
    """The attempt with the highest reward among those with a score, the first of equals."""
    return max((attempt for attempt in attempts if attempt.score is not None), key=lambda attempt: attempt.reward, default=None)


def _has_unseen_rows(folder: Path) -> bool:
    """Whether the private scores of a run are of rows that no reward saw. With the reward `grade`, they are the reward's."""
    (disclosed,) = parse_json((folder / "disclosure.json").read_bytes())["competitions"]
    return disclosed["reward"]["source"] == "holdout"


def _value(score: float | None, sign: float) -> float:
    """The score, with its sign changed if lower is better; minus infinity without a score."""
    return float("-inf") if score is None else sign * score


def _of_programs(attempts: Sequence[Attempt], problem: str) -> dict[str, Any]:
    """The number of different results of a step's valid programs, and the share of its programs with the problem's trait, if it has one."""
    programs = [attempt.code for attempt in attempts if attempt.code]
    share = None
    if programs and problem in TRAITS:
        share = _rounded(sum(re.search(TRAITS[problem], code) is not None for code in programs) / len(programs))
    return {"different": _different(attempts), "trait": share}


def _different(attempts: Sequence[Attempt]) -> int:
    return len({(attempt.score, attempt.rows) for attempt in attempts if attempt.score is not None})


def measures_on_same_prompts(folder: Path, runs: Path) -> dict[str, Any]:
    """The row of a step that continues a training run below `runs`.

    Raises:
      ValueError: the folder has another number of steps than one.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    if len(rows) != 1:
        raise ValueError(f"{folder.name} has {len(rows)} steps; one is needed.")
    source = _source(folder, runs)
    sign = direction(source)
    attempts = Journal(folder / "journal.jsonl").read()
    values = {attempt.id: _value(attempt.score, sign) for attempt in Journal(source / "journal.jsonl").read()}
    values[SEED.id] = _value(seed_state(source).score, sign)
    best = max(values.values())
    attempts = [attempt for attempt in attempts if attempt.step == rows[0]["step"]]
    own = [(_value(attempt.score, sign), attempt.parent_id) for attempt in attempts]
    return names_of(folder) | {
        "valid": rows[0]["outcome/ok"] / rows[0]["rollouts/count"],
        "mean": round(rows[0]["reward/mean"], 6),
        "copies": _rounded(rows[0].get("diversity/copy_frac")),
        "different": _different(attempts),
        "better": sum(value > values[parent] for value, parent in own) / len(own),
        "gain": round(max(0.0, max(value for value, _ in own) - best), 6),
    }


def _source(folder: Path, runs: Path) -> Path:
    """The training run below `runs` that a step on the same prompts continues."""
    _, _, seed = folder.name.rsplit("-", 2)
    return runs / f"{names_of(folder)['problem']}-train-{seed}"


def replies(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of a run in replies.csv: of the first and of the last two of its first `steps` steps."""
    attempts = [attempt for attempt in Journal(folder / "journal.jsonl").read() if attempt.step < steps]
    programs = _programs(folder)
    parts = {"first": range(2), "last": range(steps - 2, steps)}
    return [_of_replies(folder, part, [a for a in attempts if a.step in chosen], programs) for part, chosen in parts.items()]


def replies_on_same_prompts(folder: Path, runs: Path) -> dict[str, Any]:
    """The row in replies.csv of a step that continues a training run below `runs`."""
    attempts = Journal(folder / "journal.jsonl").read()
    (row,) = read_metrics(folder / "metrics.jsonl")
    mine = [attempt for attempt in attempts if attempt.step == row["step"]]
    return _of_replies(folder, "same", mine, _programs(_source(folder, runs)))


def _programs(folder: Path) -> dict[str, str]:
    """The programs of a run by id, the seed program included."""
    return {SEED.id: seed_state(folder).code} | {each.id: each.code or "" for each in Journal(folder / "journal.jsonl").read()}


def _of_replies(folder: Path, part: str, attempts: Sequence[Attempt], programs: dict[str, str]) -> dict[str, Any]:
    complete = [attempt for attempt in attempts if attempt.stop is not StopReason.MAX_TOKENS]
    return names_of(folder) | {
        "part": part,
        "cut": 1 - len(complete) / len(attempts),
        "valid": _valid(attempts),
        "valid_complete": _rounded(_valid(complete)) if complete else None,
        "tokens": round(statistics.mean(attempt.tokens for attempt in attempts), 1),
        "parent": round(statistics.mean(len(programs[attempt.parent_id]) for attempt in attempts), 1),
    }


def _valid(attempts: Sequence[Attempt]) -> float:
    return sum(attempt.outcome is Outcome.OK for attempt in attempts) / len(attempts)


def _rounded(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else round(value, digits)


def table(rows: list[dict[str, Any]], problem: str) -> list[str]:
    """Training and search on one problem, and their paired differences, as Markdown."""
    of_rows = any(row["problem"] == problem and (row["best_unseen"] != "" or row["chosen_retested"] != "") for row in rows)
    measures = MEASURES if of_rows else MEASURES | {"best_grade": "best program"}
    return _compared(rows, problem, {"search": "search", "train": "training"}, measures)


def table_of_same_prompts(rows: list[dict[str, Any]], problem: str) -> list[str]:
    """The base model and the adapter on the same prompts, and their paired differences, as Markdown."""
    return _compared(rows, problem, {"base": "base", "adapter": "adapter"}, SAME_PROMPTS_MEASURES)


def table_of_replies(rows: list[dict[str, Any]], problem: str, part: str) -> list[str]:
    """Lengths of replies, and how the limit affects valid programs, in a part of the runs or on the same prompts, as Markdown."""
    of_part = [row for row in rows if row["part"] == part]
    names = {"base": "base", "adapter": "adapter"} if part == "same" else {"search": "search", "train": "training"}
    return _compared(of_part, problem, names, REPLIES_MEASURES)


def _compared(rows: list[dict[str, Any]], problem: str, names: dict[str, str], measures: dict[str, str]) -> list[str]:
    """Two arms, and the second minus the first, seed by seed."""
    arms = {arm: {row["seed"]: row for row in rows if row["problem"] == problem and row["arm"] == arm} for arm in names}
    (first, of_first), (second, of_second) = arms.items()
    seeds = sorted(of_first.keys() & of_second.keys())
    if not seeds:
        return [f"{problem}: no seed has both arms, so there is nothing to compare."]
    lines = [f"| | {names[first]} | {names[second]} | {names[second]} minus {names[first]} ({len(seeds)} seeds) |", "|---|---|---|---|"]
    for name, told in measures.items():
        pairs = known_pairs(of_first, of_second, name)
        if not pairs:
            continue
        a, b, difference = [a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs]
        lines.append(f"| {told} | {cell(a, len(pairs))} | {cell(b, len(pairs))} | {cell(difference, len(seeds), signed=True)} |")
    return lines


def mean_by_step(rows: Sequence[dict[str, Any]], column: str) -> dict[float, float]:
    """The mean of a column for each step in which every run has it: before its first valid program, a run has no best score."""
    numbers = sorted({row["step"] for row in rows})
    values = {number: [row[column] for row in rows if row["step"] == number] for number in numbers}
    return {number: statistics.mean(found) for number, found in values.items() if "" not in found}


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
            for seed in sorted({row["seed"] for row in of_arm}):
                mine = mean_by_step([row for row in of_arm if row["seed"] == seed], column)
                axis.plot(mine.keys(), mine.values(), color=colour, alpha=0.3, linewidth=0.8)
            means = mean_by_step(of_arm, column)
            axis.plot(means.keys(), means.values(), color=colour, label={"search": "search", "train": "training"}[arm])
        axis.set(title=title, xlabel="step")
    axes[0].legend()
    figure.savefig(file, metadata={"Date": None})


def merge(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Writes a table: these rows, after the rows of other problems that it has."""
    kept = read(path) if path.exists() else []
    problems = {row["problem"] for row in rows}
    write(path, columns, [_whole(row) for row in kept if row["problem"] not in problems] + rows)


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Seeds, steps and counts as whole numbers, as they were written."""
    counts = ("seed", "step", "programs", "different")
    return {name: int(value) if name in counts and value != "" else value for name, value in row.items()}


def _collect(tables: Path, runs: Path, same_prompts: Path | None, steps: int) -> None:
    """Writes the tables of the runs in a folder, and of the steps on the same prompts in another."""
    found = [measures(folder, steps) for folder in folders(runs)]
    merge(tables / "runs.csv", RUNS, [run for run, _ in found])
    merge(tables / "steps.csv", STEPS, [step for _, of_run in found for step in of_run])
    of_replies = [row for folder in folders(runs) for row in replies(folder, steps)]
    if same_prompts is not None:
        same = folders(same_prompts)
        merge(tables / "same_prompts.csv", SAME_PROMPTS, [measures_on_same_prompts(folder, runs) for folder in same])
        of_replies += [replies_on_same_prompts(folder, runs) for folder in same]
    merge(tables / "replies.csv", REPLIES, of_replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs to collect")
    parser.add_argument("--same_prompts", type=Path, help="folder of the steps with and without the adapter, to collect; needs --runs")
    parser.add_argument("--steps", type=int, default=12, help="number of steps of each run to use")
    parser.add_argument("--csv", type=Path, default=TABLES, help="folder of the tables")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument(
        "--replies", action="store_true", help="also print the lengths of replies in the last two steps, and on the same prompts"
    )
    options = parser.parse_args()
    if options.same_prompts is not None and options.runs is None:
        parser.error("--same_prompts needs --runs, the folder of the training runs that it continues.")
    if options.runs is not None:
        _collect(options.csv, options.runs, options.same_prompts, options.steps)
    rows, same = read(options.csv / "runs.csv"), options.csv / "same_prompts.csv"
    for problem in dict.fromkeys(row["problem"] for row in rows):
        print("\n".join(table(rows, problem)))
        if options.plots is not None:
            draw(read(options.csv / "steps.csv"), problem, options.plots / f"real-model-{problem}.svg")
    for_same = read(same) if same.exists() else []
    for problem in dict.fromkeys(row["problem"] for row in for_same):
        print("\n".join(table_of_same_prompts(for_same, problem)))
    if options.replies:
        _print_replies(options.csv / "replies.csv")


def _print_replies(file: Path) -> None:
    rows = read(file)
    for problem in dict.fromkeys(row["problem"] for row in rows):
        print("\n".join([*table_of_replies(rows, problem, "last"), "", *table_of_replies(rows, problem, "same")]))


def folders(parent: Path) -> list[Path]:
    """The run folders in `parent`."""
    return sorted(folder for folder in parent.iterdir() if (folder / "journal.jsonl").exists())


if __name__ == "__main__":
    main()

"""Which reuse and which advantages help? Runs the apprentice at equal numbers of programs; prints a table with intervals over seeds.

    python experiments/estimators.py --competition=spaceship-titanic --raw=train.csv --out=DIR [--seeds=5] [--steps=6] [--groups=4]
        [--group_size=8] [--jobs=1] [--reuse=fixed,greedy,puct] [--learning=none,mean_baseline,entropic,entropic_adaptive,max_at_k,frontier]
        [--diversity] [--means=none,novelty,duplicates,parents,temperature,all] [--learning_rate=0] [--first_seed=0] [--cores=0]
        [--same_prompts=CELL] [--summary] [--csv=FILE]

`entropic@5e-3` in `--learning` is that estimator at that learning rate; by default it is the preset's. `entropic+spread` sets
`train.failures` to `spread`, and `entropic+copies` sets `diversity.copies` to `fail`. Every cell of the table is one setting, run once per
seed. Runs that are in DIR already are not repeated, so an interrupted comparison resumes. Parallel runs share the machine's cores evenly,
each bound to its own. All runs share one cache of verdicts: the first step's programs of a seed are the same in every cell. `--diversity`
instead compares, for the report's setting, runs with and without each means against collapse. `--same_prompts=greedy/entropic` continues
each run of that setting for one step, once with its adapter and once without, in DIR/same_prompts. This isolates the effect of learning.
`--summary` runs nothing and prints the table of the existing runs.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import itertools
import json
import math
import os
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scipy import stats

from discover_jax.execution import lease_cores
from discover_jax.runs.metrics import read_metrics

REUSE = {
    "fixed": ("--config.reuse.sampler=fixed",),
    "greedy": (),
    "puct": ("--config.reuse.sampler=puct", "--config.reuse.children=2"),
}
LEARNING = {
    "none": None,  # search
    "mean_baseline": ("--config.train.advantage=mean_baseline",),
    "entropic": (),
    "entropic_adaptive": ("--config.train.advantage=entropic_adaptive",),
    "max_at_k": ("--config.train.advantage=max_at_k",),
    "frontier": ("--config.train.advantage=frontier",),
}
HANDLING = {
    "spread": ("--config.train.failures=spread",),
    "copies": ("--config.diversity.copies=fail",),
}
DIVERSITY = {
    "none": (),
    "novelty": ("--config.diversity.novelty_bonus=0.1",),
    "duplicates": ("--config.diversity.duplicates=drop",),
    "parents": ("--config.reuse.distinct=True", "--config.reuse.fresh=0.25"),
    "temperature": ("--config.sampling.temperature_spread=0.3",),
    "all": (
        "--config.diversity.novelty_bonus=0.1",
        "--config.diversity.duplicates=drop",
        "--config.reuse.distinct=True",
        "--config.reuse.fresh=0.25",
        "--config.sampling.temperature_spread=0.3",
    ),
}


def interval(values: list[float], *, signed: bool = False) -> str:
    """The mean and the half width of its 95% interval over seeds, by Student's t, as text."""
    mean, half = mean_and_half_width(values)
    told = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    return told if math.isnan(half) else f"{told} +- {half:.4f}"


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """The mean and the half width of its 95% interval by Student's t; nan for a single value."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.nan
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, float(stats.t.ppf(0.975, count - 1)) * spread


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder below DIR, its module, its flags, its seed and its number of steps."""

    folder: Path
    module: str
    flags: tuple[str, ...]
    seed: int
    steps: int


def run(one: Run, arguments: argparse.Namespace) -> str:
    """Runs it unless it exists already. Returns an error message, or an empty string."""
    if len(rows(one.folder)) >= one.steps:
        return ""
    command = [
        sys.executable,
        "-m",
        f"discover_jax.{one.module}",
        "--config=configs/quickstart.py",
        f"--workdir={one.folder}",
        f"--config.task.competition={arguments.competition}",
        f"--config.task.raw={arguments.raw}",
        f"--config.groups={arguments.groups}",
        f"--config.group_size={arguments.group_size}",
        f"--config.sampling.slots={arguments.groups * arguments.group_size}",
        f"--config.train.steps={one.steps}",
        f"--config.execution.workers={arguments.workers}",
        f"--config.execution.cache={(arguments.out / 'verdicts').absolute()}",
        f"--config.seed={one.seed}",
        *one.flags,
        *arguments.flag,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    return "" if done.returncode == 0 else f"{one.folder.name}: exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, so far."""
    return read_metrics(folder / "metrics.jsonl")


def complete_runs(arguments: argparse.Namespace, name: str) -> dict[int, list[dict[str, Any]]]:
    """The metrics of the first `--steps` steps of a setting's runs, by seed; of runs that have as many."""
    runs = {seed: rows(folder_of(arguments, name, seed))[: arguments.steps] for seed in seeds(arguments)}
    return {seed: run for seed, run in runs.items() if len(run) == arguments.steps}


def seeds(arguments: argparse.Namespace) -> range:
    """The seeds of each cell."""
    return range(arguments.first_seed, arguments.first_seed + arguments.seeds)


def cells(arguments: argparse.Namespace) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The module and flags of each setting, by name."""
    if arguments.diversity:
        # At the preset's rate, little collapses within a few steps; a higher rate shows the effect of the means.
        harder = learning_rate(arguments.learning_rate)
        return {name: ("main", (*harder, *DIVERSITY[name])) for name in arguments.means.split(",")}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for reuse, learning in itertools.product(arguments.reuse.split(","), arguments.learning.split(",")):
        name, _, rate = learning.partition("@")
        estimator, *handling = name.split("+")
        flags = LEARNING[estimator]
        more = [flag for each in handling for flag in HANDLING[each]]
        module = "search" if flags is None else "main"
        found[f"{reuse}/{learning}"] = (module, (*REUSE[reuse], *(flags or ()), *more, *learning_rate(rate)))
    return found


def learning_rate(rate: float | str) -> tuple[str, ...]:
    """The flag of a learning rate; no flag for 0 or "", so that the preset's is used."""
    return (f"--config.train.learning_rate={rate}",) if rate else ()


def runs_of_cells(arguments: argparse.Namespace) -> Iterator[Run]:
    """All runs of the table."""
    for seed in seeds(arguments):
        for name, (module, flags) in cells(arguments).items():
            yield Run(folder_of(arguments, name, seed), module, flags, seed, arguments.steps)


def runs_on_same_prompts(arguments: argparse.Namespace) -> Iterator[Run]:
    """One more step of each run of a setting, with its adapter and with the base model, on the same prompts."""
    _, flags = cells(arguments)[arguments.same_prompts]
    for seed in seeds(arguments):
        source = folder_of(arguments, arguments.same_prompts, seed)
        for name, module in (("adapter", "main"), ("base", "search")):
            yield Run(
                arguments.out / "same_prompts" / f"{name}-{seed}", module, (*flags, f"--config.train.resume_from={source}"), seed, steps=1
            )


def folder_of(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    """The folder of a run."""
    return arguments.out / f"{name.replace('/', '-')}-{seed}"


def run_all(todo: Iterable[Run], arguments: argparse.Namespace) -> None:
    """Runs them in `--jobs` parallel jobs. Each is bound to its own cores; with too few cores, they are shared evenly."""
    cpus = sorted(os.sched_getaffinity(0))
    cores: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
    for lease in lease_cores(cpus, arguments.cores or max(1, len(cpus) // arguments.jobs), arguments.jobs):
        cores.put(lease)
    # Affinity belongs to a thread, and the run that the thread starts inherits it.
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs, initializer=lambda: os.sched_setaffinity(0, cores.get())) as pool:
        futures = [pool.submit(run, one, arguments) for one in todo]
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            print(f"{number}/{len(futures)} {future.result()}", file=sys.stderr, flush=True)


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Results by setting, of complete runs only; lists are ordered by seed. None: a run has no valid program, or no two programs."""
    result = {}
    for name in cells(arguments):
        runs = complete_runs(arguments, name)
        steps = [row for run in runs.values() for row in run]
        result[name] = {
            "seeds": list(runs),
            "best": [run[-1]["best/score"] for run in runs.values()],
            "last_mean": [run[-1]["reward/mean"] for run in runs.values()],
            "last_two_mean": [sum(row["reward/mean"] for row in run[-2:]) / 2 for run in runs.values()],
            "constant_frac": [sum(constant(row) for row in run[1:]) / (len(run) - 1) for run in runs.values()],
            "collapsed_by": [next((i for i, row in enumerate(run, 1) if constant(row) >= 0.5), None) for run in runs.values()],
            "distance": [mean_of_known([row.get("diversity/distance") for row in run[-2:]]) for run in runs.values()],
            "programs": sum(row["rollouts/count"] for row in steps),
            "valid": sum(row["outcome/ok"] for row in steps),
            "timeouts": sum(row["outcome/timeout"] for row in steps),
        }
    return result


def mean_of_known(found: list[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are."""
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def constant(row: dict[str, Any]) -> float:
    """The fraction of groups with equal rewards."""
    return row["groups/constant_frac"]


def paired(found: dict[str, Any], name: str, other: str, key: str) -> str:
    """The paired difference to another setting, with its interval."""
    mine, theirs = (dict(zip(found[one]["seeds"], found[one][key], strict=True)) for one in (name, other))
    both = [seed for seed in sorted(mine.keys() & theirs.keys()) if mine[seed] is not None and theirs[seed] is not None]
    return interval([mine[seed] - theirs[seed] for seed in both], signed=True) if both else ""


def show(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the table as Markdown."""
    print("Means over seeds and their 95% intervals (Student's t). Scores are on the rows of the reward.\n")
    if arguments.diversity:
        print("| setting | seeds | best | mean of the last two steps | constant groups, steps 2 on | half of the groups constant by step |")
    else:
        print("| setting | seeds | best | mean of the last step | of the last two | best, to no update | last two, to no update |")
    print("|---|---|---|---|---|---|" + ("" if arguments.diversity else "---|"))
    for name, values in found.items():
        if not values["seeds"]:
            continue
        best = [score for score in values["best"] if score is not None]
        columns = [name, str(len(values["seeds"])), interval(best) if best else "no valid program"]
        if arguments.diversity:
            columns += [interval(values["last_two_mean"]), interval(values["constant_frac"])]
            columns.append(", ".join("never" if step is None else str(step) for step in values["collapsed_by"]))
        else:
            base = f"{name.split('/')[0]}/none"
            columns += [interval(values["last_mean"]), interval(values["last_two_mean"])]
            columns += [paired(found, name, base, key) if base in found and base != name else "" for key in ("best", "last_two_mean")]
        print(f"| {' | '.join(columns)} |")
    total = {key: sum(values[key] for values in found.values()) for key in ("programs", "valid", "timeouts")}
    print(f"\n{total['programs']} programs, {total['valid'] / max(1, total['programs']):.1%} valid, {total['timeouts']} timed out.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--competition", default="digits-parity")
    parser.add_argument("--raw", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs")
    parser.add_argument("--cores", type=int, default=0, help="cores of each run; 0: an even share of all")
    parser.add_argument("--same_prompts", default="", help="a setting of the table whose adapters are compared with the base model")
    parser.add_argument("--workers", type=int, default=0, help="parallel programs of each run")
    parser.add_argument("--reuse", default=",".join(REUSE))
    parser.add_argument("--learning", default=",".join(LEARNING))
    parser.add_argument("--diversity", action="store_true")
    parser.add_argument("--means", default=",".join(DIVERSITY), help="means to compare with --diversity")
    parser.add_argument("--learning_rate", type=float, default=0.0, help="learning rate for --diversity; 0: the preset's")
    parser.add_argument("--flag", action="append", default=[], help="a flag for every run, such as --flag=--config.execution.cores=1")
    parser.add_argument("--csv", type=Path, help="also write a row per step of each run to this file")
    parser.add_argument("--summary", action="store_true", help="only print the table of the existing runs")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, because collapse is measured from the second step on; got {arguments.steps}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.summary:
        run_all(runs_of_cells(arguments), arguments)
        if arguments.same_prompts:
            run_all(runs_on_same_prompts(arguments), arguments)
    found = table(arguments)
    (arguments.out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    if arguments.csv:
        write_csv(arguments)
    show(found, arguments)


def write_csv(arguments: argparse.Namespace) -> None:
    """A row for each step of each complete run."""
    columns = ("reward/mean", "reward/max", "best/score", "outcome/ok", "rollouts/count", "groups/constant_frac", "diversity/distance")
    with arguments.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "seed", "step", *columns])
        for name in cells(arguments):
            for seed, run in complete_runs(arguments, name).items():
                writer.writerows([name, seed, row["step"] + 1, *(row.get(column) for column in columns)] for row in run)


if __name__ == "__main__":
    main()

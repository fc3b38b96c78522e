"""Which reuse and which advantages help? Runs of the apprentice at equal numbers of programs, and a table with intervals over seeds.

    python benchmarks/estimators.py --competition=spaceship-titanic --raw=train.csv --out=DIR [--seeds=5] [--steps=6] [--groups=4]
        [--group_size=8] [--jobs=1] [--reuse=fixed,greedy,puct] [--learning=none,mean_baseline,entropic,entropic_adaptive] [--diversity]
        [--means=none,novelty,duplicates,parents,temperature,all] [--learning_rate=0] [--summary] [--csv=FILE]

Every cell of the table is one setting, run once for each seed; a run that is in DIR already is not repeated, so an interrupted
comparison goes on. Runs at once share the machine's cores evenly, each bound to its own, and all share one cache of verdicts: the first
step's programs of a seed are the same in every cell. `--diversity` compares, for the report's setting, runs with and without each means
against collapse instead. With `--summary` nothing is run: the table is made from what is there.
"""

import argparse
import concurrent.futures
import csv
import itertools
import json
import math
import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

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
# Student's t, two-sided 95%, by degrees of freedom; beyond ten the normal's is near enough.
_T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: list[float], *, signed: bool = False) -> str:
    """Mean and half width of its 95% interval over seeds, by Student's t."""
    count, mean = len(values), sum(values) / len(values)
    told = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    if count < 2:
        return told
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return f"{told} +- {(_T95[count - 1] if count <= 11 else 1.96) * spread:.4f}"


def run(folder: Path, module: str, flags: tuple[str, ...], arguments: argparse.Namespace, seed: int) -> str:
    """One run, unless it is there already; returns what went wrong, or nothing."""
    if len(rows(folder)) >= arguments.steps:
        return ""
    command = [
        sys.executable,
        "-m",
        f"discover_jax.{module}",
        "--config=configs/quickstart.py",
        f"--workdir={folder}",
        f"--config.task.competition={arguments.competition}",
        f"--config.task.raw={arguments.raw}",
        f"--config.groups={arguments.groups}",
        f"--config.group_size={arguments.group_size}",
        f"--config.sampling.slots={arguments.groups * arguments.group_size}",
        f"--config.train.steps={arguments.steps}",
        f"--config.execution.workers={arguments.workers}",
        f"--config.execution.cache={(arguments.out / 'verdicts').absolute()}",
        f"--config.seed={seed}",
        *flags,
        *arguments.flag,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    return "" if done.returncode == 0 else f"{folder.name}: exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run, as far as it has come."""
    return read_metrics(folder / "metrics.jsonl")


def cells(arguments: argparse.Namespace) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name of a setting -> module and flags."""
    if arguments.diversity:
        # At the preset's rate little collapses within a few steps; a higher one shows what the means are for.
        harder = (f"--config.train.learning_rate={arguments.learning_rate}",) if arguments.learning_rate else ()
        return {name: ("main", (*harder, *DIVERSITY[name])) for name in arguments.means.split(",")}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for reuse, learning in itertools.product(arguments.reuse.split(","), arguments.learning.split(",")):
        flags = LEARNING[learning]
        found[f"{reuse}/{learning}"] = ("search" if flags is None else "main", (*REUSE[reuse], *(flags or ())))
    return found


def leases(jobs: int) -> queue.SimpleQueue[tuple[int, ...]]:
    """Cores for each of the runs at once, for the threads that start them: two runs must not lease the same cores to their programs."""
    cpus = sorted(os.sched_getaffinity(0))
    found: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
    for cores in lease_cores(cpus, max(1, len(cpus) // jobs), jobs):
        found.put(cores)
    return found


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Results by setting: of complete runs only, each list by seed."""
    result = {}
    for name in cells(arguments):
        runs = {seed: rows(arguments.out / f"{name.replace('/', '-')}-{seed}") for seed in range(arguments.seeds)}
        runs = {seed: run for seed, run in runs.items() if len(run) >= arguments.steps}
        steps = [row for run in runs.values() for row in run]
        result[name] = {
            "seeds": list(runs),
            "best": [run[-1]["best/score"] for run in runs.values()],
            "last_mean": [run[-1]["reward/mean"] for run in runs.values()],
            "last_two_mean": [sum(row["reward/mean"] for row in run[-2:]) / 2 for run in runs.values()],
            "constant_frac": [sum(constant(row) for row in run[1:]) / (len(run) - 1) for run in runs.values()],
            "collapsed_by": [next((i for i, row in enumerate(run, 1) if constant(row) >= 0.5), None) for run in runs.values()],
            "distance": [sum(row["diversity/distance"] or 0.0 for row in run[-2:]) / 2 for run in runs.values()],
            "programs": sum(row["rollouts/count"] for row in steps),
            "valid": sum(row["outcome/ok"] for row in steps),
            "timeouts": sum(row["outcome/timeout"] for row in steps),
        }
    return result


def constant(row: dict[str, Any]) -> float:
    """Part of the groups whose rewards were all equal."""
    return row["groups/constant_frac"]


def paired(found: dict[str, Any], name: str, other: str, key: str) -> str:
    """The difference to another setting, seed by seed, with its interval."""
    mine, theirs = (dict(zip(found[one]["seeds"], found[one][key], strict=True)) for one in (name, other))
    both = sorted(mine.keys() & theirs.keys())
    return interval([mine[seed] - theirs[seed] for seed in both], signed=True) if both else ""


def show(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table, as Markdown."""
    print("Means over seeds and their 95% intervals (Student's t). Scores are those of the rows that made the rewards.\n")
    if arguments.diversity:
        print("| setting | seeds | best | mean of the last two steps | constant groups, steps 2 on | half of the groups constant by step |")
    else:
        print("| setting | seeds | best | mean of the last step | of the last two | best, to no update | last two, to no update |")
    print("|---|---|---|---|---|---|" + ("" if arguments.diversity else "---|"))
    for name, values in found.items():
        if not values["seeds"]:
            continue
        columns = [name, str(len(values["seeds"])), interval(values["best"])]
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
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--workers", type=int, default=0, help="programs at once, of each run")
    parser.add_argument("--reuse", default=",".join(REUSE))
    parser.add_argument("--learning", default=",".join(LEARNING))
    parser.add_argument("--diversity", action="store_true")
    parser.add_argument("--means", default=",".join(DIVERSITY), help="those of the comparison of diversity")
    parser.add_argument("--learning_rate", type=float, default=0.0, help="of the comparison of diversity; 0: the preset's")
    parser.add_argument("--flag", action="append", default=[], help="another flag of the run, such as --flag=--config.execution.cores=1")
    parser.add_argument("--csv", type=Path, help="also write a row for each step of each run here")
    parser.add_argument("--summary", action="store_true", help="only the table of what is there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.summary:
        todo = [(seed, name, *cell) for seed in range(arguments.seeds) for name, cell in cells(arguments).items()]
        cores = leases(arguments.jobs)
        # Affinity belongs to a thread, and the run that it starts inherits it.
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs, initializer=lambda: os.sched_setaffinity(0, cores.get())) as pool:
            futures = [
                pool.submit(run, arguments.out / f"{name.replace('/', '-')}-{seed}", module, flags, arguments, seed)
                for seed, name, module, flags in todo
            ]
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                print(f"{number}/{len(futures)} {future.result()}", file=sys.stderr, flush=True)
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
            for seed in range(arguments.seeds):
                run = rows(arguments.out / f"{name.replace('/', '-')}-{seed}")
                if len(run) >= arguments.steps:
                    writer.writerows([name, seed, row["step"] + 1, *(row[column] for column in columns)] for row in run)


if __name__ == "__main__":
    main()

"""The time of a step with slow programs by the number of waves of the update (config.train.waves): whole runs of the apprentice.

    python benchmarks/waves.py --simulate [--record=waves]    # padding, and the whole step of the 120b, without a run
    python benchmarks/waves.py [--waves=1,4] [--rounds=1] [--steps=4] [--groups=4] [--group_size=2] [--seconds=20] [--record=ID]

The runs of a round run side by side, so that they share whatever else the machine does. Everything is real except the time of programs:
each waits in addition, for a time that its text determines, from 0.5 to 1.5 times `--seconds`. Waiting needs no core, so an update on the
CPU and the programs hardly slow each other down. The first step of each run compiles and is left out. A ratio is that of the times of the
same step; the result is the median over steps and rounds.

The simulation has 128 rollouts. Padding is for lognormal lengths (mean 8,000, at most 34,192 tokens). The 120b's step waits and learns as
in the table of docs/performance.md. Its programs take lognormal times (sigma 0.8), and 8 of them run at a time. The base model's pass is
the difference between the times of the whole update and of the gradient.
"""

import argparse
import heapq
import random
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import figures
import numpy as np

from discover_jax import config as settings
from discover_jax import main as loop
from discover_jax import stages
from discover_jax.apprentice.preset import apprentice_on_cpu
from discover_jax.learning.packing import first_fit_decreasing, row_lengths
from discover_jax.runs.metrics import read_metrics
from discover_jax.text.chat import ChatFormat
from discover_jax.text.reply import Extracted, extracted
from discover_jax.types import Rollout

PARTS = ("time/step_s", "time/sample_s", "time/execute_s", "time/execute_first_s", "time/programs_s", "time/update_s")


def run(arguments: argparse.Namespace, waves: int, workdir: Path) -> None:
    """One run, in this process."""
    config = settings.default_config()
    config.name, config.task.competition = "waves", "digits-parity"
    apprentice_on_cpu(config)
    config.groups, config.group_size, config.train.steps = arguments.groups, arguments.group_size, arguments.steps
    config.train.waves = waves

    def slow(rollout: Rollout, chat: ChatFormat, edits_of: str = "", entries: Sequence[str] = ("run",)) -> Extracted:
        found = extracted(rollout, chat, edits_of, entries)
        if found.code is None:
            return found
        factor = random.Random(zlib.crc32(rollout.tokens_T.tobytes())).uniform(0.5, 1.5)
        return Extracted(f"{found.code}\n\nimport time\n\ntime.sleep({arguments.seconds * factor})\n")

    stages.extracted = slow  # `stages.sample_and_submit` looks this name up for each finished rollout
    loop.run(settings.validate(config), workdir)


def times_of(workdir: Path) -> list[dict[str, float]]:
    """Seconds of each part of each step after the first."""
    return [{name: row[name] for name in PARTS if name in row} for row in read_metrics(workdir / "metrics.jsonl")[1:]]


ROLLOUTS, PROGRAMS_AT_ONCE, LONGEST = 128, 8, 34_192
DRAWS = 50


def filled(waves: int, rows: int, rng: np.random.Generator) -> float:
    """Fraction of positions that are not padding, with `rows` rows in a microbatch and the default number of row lengths."""
    sigma = 0.6
    sizes = np.minimum(rng.lognormal(np.log(8000) - sigma**2 / 2, sigma, ROLLOUTS), LONGEST).astype(int)
    positions = 0
    for part in np.array_split(sizes, waves):
        lengths = [length for length in row_lengths(LONGEST, 8) if length >= part.max()]
        positions += min(-(-len(first_fit_decreasing(part.tolist(), length)) // rows) * rows * length for length in lengths)
    return sizes.sum() / positions


def wait_and_update(waves: int, rng: np.random.Generator, *, wait: float, base: float, gradient: float) -> float:
    """Seconds from the last rollout to the end of the update. `wait`: until the last program ends."""
    free = [0.0] * PROGRAMS_AT_ONCE
    ends = np.zeros(ROLLOUTS)
    for program, seconds in enumerate(rng.lognormal(0, 0.8, ROLLOUTS)):
        ends[program] = heapq.heappop(free) + seconds
        heapq.heappush(free, ends[program])
    ends *= wait / ends.max()
    now = base if waves > 1 else 0.0
    for part in np.array_split(ends, waves):
        now = max(now, part.max()) + gradient / waves
    return now + (base if waves == 1 else 0.0)


def simulate(prefix: str) -> None:
    known = {id: float(figure.value) for id, figure in figures.read().items()}
    update = known["whole_step_120b_update"]
    gradient = update * known["update_120b_4x8192_tokens_per_s"] / known["gradient_120b_4x8192_tokens_per_s"]
    times = {"wait": known["whole_step_120b_programs"], "base": update - gradient, "gradient": gradient}
    values: dict[str, tuple[float, str]] = {}
    for waves in (1, 2, 4, 8):
        for rows in (1, 4):
            fractions = [filled(waves, rows, np.random.default_rng(seed)) for seed in range(DRAWS)]
            values[f"{waves}_rows{rows}_filled"] = (round(statistics.fmean(fractions), 3), "fraction")
        ends = [wait_and_update(waves, np.random.default_rng(seed), **times) for seed in range(DRAWS)]
        values[f"{waves}_120b_wait_and_update"] = (round(statistics.fmean(ends), 1), "s")
    for name, (value, unit) in values.items():
        print(f"{name:24s} {value:8.3f} {unit}")
    for name, (value, unit) in values.items() if prefix else ():
        figures.append(f"{prefix}_{name}", value, unit, "simulated: python benchmarks/waves.py --simulate")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--waves", default="1,4", help="numbers to compare; ratios are to the first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workdir", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--simulate", action="store_true", help="see above")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the run directory of a run in this process
    figures.add_record(parser)
    arguments = parser.parse_args()
    if arguments.simulate:
        simulate(arguments.record)
        return
    counts = [int(count) for count in arguments.waves.split(",")]
    if arguments.one is not None:
        run(arguments, counts[0], arguments.one)
        return
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            workdirs = {count: (arguments.workdir or Path(folder)) / f"{number}-{count}" for count in counts}
            runs = [
                subprocess.Popen([sys.executable, *sys.argv, f"--waves={count}", f"--one={workdir}"], stdout=sys.stderr)
                for count, workdir in workdirs.items()
            ]
            codes = [one.wait() for one in runs]
            if any(codes):
                sys.exit("a run failed; see above")
            for count, workdir in workdirs.items():
                found[count] += times_of(workdir)
    values: dict[str, tuple[float, str]] = {}
    for count, steps in found.items():
        for times, first in zip(steps, found[counts[0]], strict=True):
            shown = ", ".join(f"{name.removeprefix('time/')} {seconds:.1f}" for name, seconds in times.items())
            print(f"{count} waves: {shown}; step / step with {counts[0]}: {times['time/step_s'] / first['time/step_s']:.2f}")
        for name in steps[0]:
            values[f"{count}_{name.removeprefix('time/')}"] = (statistics.median(times[name] for times in steps), "s")
        pairs = zip(steps, found[counts[0]], strict=True)
        values[f"{count}_step_ratio"] = (statistics.median(a["time/step_s"] / b["time/step_s"] for a, b in pairs), "ratio")
    for name, (value, unit) in values.items():
        print(f"{name:24s} {value:8.2f} {unit}")
    figures.record(arguments.record, values, devices=1)


if __name__ == "__main__":
    main()

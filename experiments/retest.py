"""Finalists of runs that were stopped, or that ran without: tests the best programs of a journal again. Only programs run, no model.

  python experiments/retest.py RUN_DIR... --raw=train.csv [--steps=N] [--workers=N] [--seconds=S]

Writes finalists.json into each run's folder, as a run with `finalists.count` does at its end, and finalists_posterior.json for finalists
ranked by `reuse.score` = posterior. replay.py reads both. Runs need the reward `holdout` and one competition.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover_jax import config as settings
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.archive.ranking import Ranking
from discover_jax.exceptions import RunError
from discover_jax.execution import Executor
from discover_jax.execution.limits import resource_limits
from discover_jax.records import parse_json
from discover_jax.runs.attempts import stored_seed_states
from discover_jax.runs.finalists import NAME, Choice, choose
from discover_jax.tasks.configured import prepare_tasks
from discover_jax.tasks.retests import prepare_retests
from discover_jax.tasks.submission_size import result_bytes
from discover_jax.types import SEED, Attempt, State, Verdict

POSTERIOR_NAME = "finalists_posterior.json"


def run_config(folder: Path, raw: str) -> Any:
    """The config of a run, with the raw data at `raw`."""
    config = settings.default_config()
    known = settings.flatten(config)
    stored = parse_json((folder / "config.json").read_bytes())["config"]
    config.update_from_flattened_dict({name: value for name, value in stored.items() if name in known})
    config.task.stratified = stored.get("task.stratified", False)  # runs of earlier versions drew their rows from all classes alike
    config.task.raw = raw
    return config


def run_seed(folder: Path) -> int:
    """The random seed of a run, which draws the rows of its rewards."""
    return parse_json((folder / "config.json").read_bytes())["config"]["seed"]


def seed_state(folder: Path) -> State:
    """The seed program of a run with its score as value, or the empty seed."""
    (state,) = stored_seed_states(folder).values() or [SEED]
    return state


def direction(folder: Path) -> float:
    """1 if a higher score of the run's only competition or problem is better, otherwise -1."""
    (disclosed,) = parse_json((folder / "disclosure.json").read_bytes())["competitions"]
    return 1.0 if disclosed["metric"]["higher_is_better"] else -1.0


def winner(file: Path, attempts: Sequence[Attempt]) -> tuple[Attempt, float | None]:
    """The program that the retests of a file chose, and its score in them; None if it has none.

    Args:
      attempts: of the steps that are compared.

    Raises:
      RunError: the file cannot be read, or programs of later steps took part in its choice.
    """
    by_id = {attempt.id: attempt for attempt in attempts}
    try:
        (found,) = parse_json(file.read_bytes())
        finalists = {row["id"]: row["retested_score"] for row in found["finalists"]}
        best = next(iter(finalists))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise RunError(
            f"{file} cannot be read ({error!r}). Write it by retest.py, or set config.finalists.count and finish the run."
        ) from error
    if later := [id for id in finalists if id not in by_id]:
        raise RunError(f"{file} has finalists of later steps: {', '.join(later)}. Use all steps, or write it again by retest.py --steps=N.")
    return by_id[best], finalists[best]


def frontier_of(attempts: Sequence[Attempt], *, seed: State = SEED, ranking: Ranking | None = None, capacity: int = 1024) -> Frontier:
    """All programs of the journal's rows, ranked by their rewards if there is no ranking."""
    frontier, ids = Frontier.start(capacity, seed=seed, ranking=ranking), {attempt.id for attempt in attempts}
    for step in sorted({attempt.step for attempt in attempts}):
        frontier = frontier.after([attempt for attempt in attempts if attempt.step == step], reusable=ids, children=0)
    return frontier


def ranked_frontier(folder: Path, attempts: Sequence[Attempt]) -> Frontier:
    """All programs of the journal's rows, ranked by their posterior mean. Values are scores, negative if a lower score is better."""
    sign = direction(folder)
    return frontier_of(attempts, seed=seed_state(folder), ranking=Ranking("posterior", sign > 0, lambda score: sign * score))


def retest(folder: Path, raw: str, *, steps: int | None, workers: int | None, seconds: float | None) -> dict[str, Choice]:
    """The choices from the first `steps` steps of a run, by the file to write; None: all steps. Empty if no program has a score."""
    config = run_config(folder, raw)
    attempts = [each for each in Journal(folder / "journal.jsonl").read() if steps is None or each.step < steps]
    if all(attempt.score is None for attempt in attempts):
        return {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (task,) = prepare_tasks(config.task, folder=work / "task", seed=config.seed)
        tasks = [task, *prepare_retests(task, config.finalists.retests, folder=work / "retests", seed=config.seed)]
        execution = config.execution
        size = result_bytes(tasks, execution.result_mib)
        limits = resource_limits(seconds or execution.seconds, execution.cores, execution.memory_gib, size)
        frontiers = {
            NAME: frontier_of(attempts),
            POSTERIOR_NAME: ranked_frontier(folder, attempts),
        }
        with Executor(tasks, limits, workers=workers, cache_dir=work / "cache") as executor:

            def run_programs(programs: Sequence[tuple[str, int]]) -> list[Verdict]:
                return [future.result() for future in [executor.submit(program, number) for program, number in programs]]

            retests, count = {task.id: [*range(1, len(tasks))]}, config.finalists.count or 8
            return {
                file: choose([task], {task.id: frontier}, retests, tasks, run_programs, count=count)[task.id]
                for file, frontier in frontiers.items()
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--raw", required=True, help="raw data of the competition")
    parser.add_argument("--steps", type=int, help="only the first N steps of each run")
    parser.add_argument("--workers", type=int, help="programs at once; default: one for each core")
    parser.add_argument("--seconds", type=float, help="time limit of a program; default: the run's")
    options = parser.parse_args()
    for folder in options.runs:
        found = retest(folder, options.raw, steps=options.steps, workers=options.workers, seconds=options.seconds)
        if not found:
            print(f"left out: {folder.name} has no program with a score", file=sys.stderr)
        for file, choice in found.items():
            (folder / file).write_text(json.dumps([choice.to_json()], indent=1) + "\n")
            print(f"{folder.name} {file}: {choice.text}", flush=True)


if __name__ == "__main__":
    main()

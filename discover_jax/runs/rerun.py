"""rerun.sh of best/: prepares the competition or problem again, reruns the best program in the sandbox, and compares its score.

The script calls `python -m discover_jax.runs.rerun` with every setting that a score depends on, so it needs no other files of the run.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path

from discover_jax.exceptions import DiscoverError, RunError
from discover_jax.execution.executor import BACKENDS, Executor
from discover_jax.execution.limits import resource_limits
from discover_jax.records import parse_json
from discover_jax.runs.best import read_parent_output, read_result
from discover_jax.tasks.loading import locate_definition
from discover_jax.tasks.prepare import GRADERS, REUSES, REWARDS, prepare_task
from discover_jax.tasks.submission_size import result_bytes
from discover_jax.types import Outcome, Verdict
from discover_jax.untrusted_text import printable

ANOTHER_SCORE = 1
"""Exit code if the program gets another score or none."""
USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class RerunSettings:
    """Every setting that the score of a program depends on, as in the config.

    Attributes:
      competition, raw: name, and path of the raw data, as from `named_competitions`; an empty path if the competition brings its data.
      reward, holdout_fraction, holdout_folds, selection_fraction, grader, reuse_output, stratified: of config.task.
      seed: of the run; the held-out rows depend on it.
      seconds, cores, memory_gib, backend, allow_weaker, result_mib: of config.execution.
    """

    competition: str
    raw: str
    reward: str
    holdout_fraction: float
    holdout_folds: int
    selection_fraction: float
    grader: str
    reuse_output: str
    seed: int
    seconds: float
    cores: int
    memory_gib: float
    backend: str
    allow_weaker: bool
    result_mib: int = 0
    stratified: bool = False


def rerun_script(settings: RerunSettings) -> str:
    """The text of rerun.sh."""
    options = {
        "competition": locate_definition(settings.competition)[0],
        **({"raw": Path(settings.raw).expanduser().absolute()} if settings.raw else {}),
        "reward": settings.reward,
        "holdout_fraction": settings.holdout_fraction,
        "holdout_folds": settings.holdout_folds,
        **({"selection_fraction": settings.selection_fraction} if settings.selection_fraction else {}),
        "grader": settings.grader,
        **({} if settings.reuse_output == "problem" else {"reuse_output": settings.reuse_output}),
        "seed": settings.seed,
        "seconds": settings.seconds,
        "cores": settings.cores,
        "memory_gib": settings.memory_gib,
        **({"result_mib": settings.result_mib} if settings.result_mib else {}),
        "backend": BACKENDS[settings.backend],  # rerun on this machine, even if it ran on a cluster before
    }
    flags = [shlex.quote(f"--{option}={value}") for option, value in options.items()]
    flags += [f"--{name}" for name in ("stratified", "allow_weaker") if getattr(settings, name)]
    moved = " If the raw data moved: ./rerun.sh --raw=/path/to/train.csv" if settings.raw else ""
    lines = [
        "#!/bin/sh",
        "# Prepares the task again, runs solution.py in the sandbox, and compares its score with grade.json.",
        f"# Options of this script override those below.{moved}",
        "# To use another Python that has discover_jax: PYTHON=/path/to/python ./rerun.sh",
        f"PYTHON=${{PYTHON:-{shlex.quote(sys.executable or 'python3')}}}",
        'exec "$PYTHON" -m discover_jax.runs.rerun --bundle="$(dirname "$0")" \\',
        *(f"  {flag} \\" for flag in flags),
        '  "$@"',
    ]
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Rerun:
    """The result of a rerun.

    Attributes:
      expected: the score in grade.json.
      verdict: the new verdict.
      result: what programs return: "submission" or, for a problem, "value".
      same_result: whether the result has the same bytes as in the bundle.
      same_data: whether data and grading settings are those of the run; None if disclosure.json does not say.
      isolation: how the program was isolated.
    """

    expected: float
    verdict: Verdict
    result: str
    same_result: bool
    same_data: bool | None
    isolation: str

    @property
    def reproduced(self) -> bool:
        return self.verdict.outcome is Outcome.OK and self.verdict.grade.score == self.expected

    def lines(self) -> list[str]:
        """The result as lines of text."""
        verdict = self.verdict
        if verdict.outcome is Outcome.OK:
            found = f"score        {verdict.grade.score} (grade.json: {self.expected})"
        else:
            found = (
                f"no score     {verdict.outcome.value}: {verdict.execution.detail or verdict.grade.reason} (grade.json: {self.expected})"
            )
        changed = "the raw data differ" if self.result == "submission" else "the problem's file changed"
        data = {
            True: "the run's",
            False: f"NOT the run's: another version prepares or grades differently, or {changed}",
            None: "unknown",
        }
        return [
            found,
            f"{self.result:<12} {'the same bytes as' if self.same_result else 'other bytes than'} in best/",
            f"data         {data[self.same_data]}",
            f"ran in       {self.isolation}",
            "REPRODUCED" if self.reproduced else "NOT REPRODUCED",
        ]


def rerun(bundle: Path, options: argparse.Namespace) -> Rerun:
    """Runs the program of a bundle again, without a cache.

    Args:
      bundle: best/ or a copy of it.
      options: from the command line.

    Raises:
      RunError: the bundle lacks a file, or one cannot be read.
      DiscoverError: the task cannot be prepared, or the host cannot isolate programs.
    """
    try:
        program, result = (bundle / "solution.py").read_text(), read_result(bundle)
        grade, disclosure = (parse_json((bundle / name).read_bytes()) for name in ("grade.json", "disclosure.json"))
        expected, parent_output = grade["score"], read_parent_output(bundle, grade)
        fingerprints = {row["id"]: row["task_fingerprint"] for row in disclosure["competitions"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{bundle} is not a complete bundle of a best program ({error!r}). Give a run's best/ by --bundle. With several competitions"
            " or problems, give the folder of one of them in best/."
        ) from error
    with tempfile.TemporaryDirectory(prefix="rerun-") as scratch:
        task = prepare_task(
            options.competition,
            raw=options.raw,
            reward=options.reward,
            folder=Path(scratch) / "task",
            holdout_fraction=options.holdout_fraction,
            holdout_folds=options.holdout_folds,
            selection_fraction=options.selection_fraction,
            grader=options.grader,
            reuse_output=options.reuse_output,
            stratified=options.stratified,
            seed=options.seed,
        )
        limits = resource_limits(options.seconds, options.cores, options.memory_gib, result_bytes([task], options.result_mib))
        with Executor(
            [task], limits, workers=1, cache_dir=Path(scratch) / "cache", backend=options.backend, allow_weaker=options.allow_weaker
        ) as executor:
            verdict = executor.submit(program, parent_output=parent_output).result()
            isolation = executor.describe()
    known = fingerprints.get(task.id)
    same_data = None if known is None else known == task.fingerprint
    return Rerun(expected, verdict, "value" if task.calls else "submission", verdict.execution.result == result, same_data, isolation)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder with solution.py and grade.json")
    parser.add_argument("--competition", required=True, help="id of a built-in competition or problem, path of a .py file, or mlebench:ID")
    parser.add_argument("--raw", help="path of the raw data (default: none)")
    parser.add_argument("--reward", choices=REWARDS, required=True)
    parser.add_argument("--holdout_fraction", type=float, default=0.2)
    parser.add_argument("--holdout_folds", type=int, default=1)
    parser.add_argument("--selection_fraction", type=float, default=0.0)
    parser.add_argument("--stratified", action="store_true", help="hold out rows of each class in proportion")
    parser.add_argument("--grader", choices=GRADERS, default="native")
    parser.add_argument("--reuse_output", choices=REUSES, default="problem")
    parser.add_argument("--seed", type=int, required=True, help="seed of the run; the held-out rows depend on it")
    parser.add_argument("--seconds", type=float, required=True, help="time limit of each run of the program")
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--memory_gib", type=float, required=True)
    parser.add_argument("--result_mib", type=int, default=0, help="maximum size of the result; 0: derived from the task")
    parser.add_argument("--backend", default="bubblewrap")
    parser.add_argument("--allow_weaker", action="store_true", help="accept a backend that isolates less than bubblewrap")
    options = parser.parse_args()
    try:
        result = rerun(options.bundle, options)
    except DiscoverError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        raise SystemExit(USER_ERROR) from error
    print(printable("\n".join(result.lines())))
    raise SystemExit(0 if result.reproduced else ANOTHER_SCORE)


if __name__ == "__main__":
    main()

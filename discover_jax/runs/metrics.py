"""metrics.jsonl: one row a step, and the one list of what its numbers mean.

`python -m discover_jax.runs.metrics` prints docs/metrics.md from that list.
"""

import json
import math
import numbers
import os
from pathlib import Path
from typing import Any

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.runs.workdir import write_atomic
from discover_jax.types import Outcome

REQUIRED: tuple[str, ...] = (
    "step",
    "reward/mean",
    "reward/max",
    "best/score",
    "rollouts/valid_frac",
    "groups/constant_frac",
    "logprob_gap/mean",
    "time/sample_s",
    "time/execute_s",
    "time/update_s",
)
"""In every row, null where there is nothing to measure."""

_OUTCOMES = {
    Outcome.OK: "rollouts whose program ran and got a score",
    Outcome.FORMAT_ERROR: "rollouts without a program in the final channel",
    Outcome.EXCEPTION: "rollouts whose program raised",
    Outcome.INVALID_SUBMISSION: "rollouts whose program returned what cannot be graded",
    Outcome.TIMEOUT: "rollouts whose program ran past the time limit",
    Outcome.OUT_OF_MEMORY: "rollouts whose program hit the memory limit",
    Outcome.OUTPUT_FLOOD: "rollouts whose program printed too much",
    Outcome.RESULT_TOO_BIG: "rollouts whose program returned too much",
    Outcome.KILLED: "rollouts whose program died by a signal",
    Outcome.SANDBOX_ERROR: "always 0: a program that the host fails is run again (programs/retried), and if that fails, too, the run stops",
}

SCHEMA: dict[str, tuple[str, str]] = {
    "step": ("", "the step, from 0"),
    "reward/mean": ("reward", "mean over all rollouts of the step, failures and constant groups included"),
    "reward/max": ("reward", "highest of the step"),
    "reward/min": ("reward", "lowest of the step"),
    "best/score": ("metric", "score of the best program of the run so far, in the metric's own direction; null before the first valid one"),
    "rollouts/count": ("rollouts", "rollouts of the step"),
    "rollouts/valid_frac": ("fraction", "rollouts whose program ran and got a score"),
    "rollouts/distinct_frac": ("fraction", "different programs among the rollouts that hold one; null if none does"),
    "groups/constant_frac": ("fraction", "groups whose rewards are all equal"),
    "groups/unused_frac": (
        "fraction",
        "groups that the update leaves out: their signals (after ranks, bonus and dropped copies) are equal, or too few for the estimator",
    ),
    "prompt/shortened": ("prompts", "prompts of the step in which output or error was cut, so as to fit sampling.max_prompt_tokens"),
    "tokens/mean": ("tokens", "mean length of a rollout"),
    **{f"outcome/{outcome.value}": ("rollouts", meaning) for outcome, meaning in _OUTCOMES.items()},
    "advantage/mean": ("", "mean advantage over the rollouts of groups that are not left out"),
    "advantage/min": ("", "lowest advantage"),
    "advantage/max": ("", "highest advantage"),
    "advantage/beta": ("1/reward", "inverse temperature of the entropic estimator, mean over groups"),
    "advantage/saturated_frac": ("fraction", "groups in which the estimator hit its numerical limit"),
    "advantage/tied_frac": ("fraction", "part of a group that shares its best signal, mean over groups"),
    "diversity/duplicate_frac": ("fraction", "programs that equal an earlier one of their group but for names and layout"),
    "diversity/distinct_frac": ("fraction", "different programs among those of the step, names and layout aside"),
    "diversity/distance": ("", "mean structural distance of two programs of a group: 0 the same, 1 nothing in common"),
    "loss": ("", "the reduced loss before the update"),
    "tokens": ("tokens", "tokens that bear loss"),
    "logprob_gap/mean": ("nats", "mean |trainer's - sampler's log-probability| of the sampled tokens, before the update"),
    "logprob_gap/max": ("nats", "largest such difference"),
    "ratio/min": ("", "smallest probability ratio trainer / sampler of a token"),
    "ratio/max": ("", "largest probability ratio trainer / sampler of a token"),
    "ratio/limited_frac": ("fraction", "tokens on which the limit of the loss acts"),
    "kl_base/mean": ("nats", "mean difference of the sampler's and the base model's log-probability of a token: estimates their KL"),
    "entropy": ("nats", "mean entropy of the policy at the sampled tokens"),
    "grad_norm": ("", "Euclidean norm of the gradient, before any clipping"),
    "update/filled_frac": ("fraction", "positions of the update's packed rows that hold a token; the others are padding"),
    "update/skipped": ("", "1 if every group was left out, so that there was nothing to learn from; else 0"),
    "sample/forced_frac": ("fraction", "rollouts whose thinking was ended by sampling.thinking_tokens"),
    "sample/utilisation": ("fraction", "decoding slots that held a live rollout, as long as rollouts waited for one; 1 if none ever did"),
    "sample/set_aside": ("rollouts", "how often a rollout waited in the host's memory because the cache was full"),
    "sample/cache_tokens": ("tokens", "places of the cache in use, at most, whole pages; those of several devices added up"),
    "sample/compilations": ("", "programs that the sampler compiled since the start; it must not grow after the first steps"),
    "sample/tokens_per_s": ("tokens/s", "tokens generated in the step / time/sample_s"),
    "programs/seconds": ("s", "running times of the programs that ran for this step, added up; cached ones do not count"),
    "programs/retried": ("", "how often a program of the step was run again because the host failed it, or may have"),
    "programs/cached_frac": ("fraction", "programs whose verdict was taken from an identical earlier one"),
    "time/sample_s": ("s", "from the first prompt to the last rollout; programs run meanwhile"),
    "time/execute_s": ("s", "waited for programs after the last rollout was written"),
    "time/update_s": ("s", "advantages, packing and the optimiser's step; 0 in a search"),
    "time/save_s": ("s", "writing journal, best/ and rollouts"),
    "time/checkpoint_s": ("s", "writing the checkpoint and the report of the step before; null in the first step of a start"),
    "time/step_s": ("s", "the step up to this row, so without its own checkpoint"),
}
"""Name -> (unit, meaning), in the order of a row."""

TASK_SCHEMA: dict[str, tuple[str, str]] = {
    "reward_mean": ("reward", "mean over the competition's rollouts of the step; null if it had none"),
    "best_score": ("metric", "score of its best program so far"),
}
"""For runs with several competitions, which have task/ID/NAME for each of them; their best/score is null."""


def _is_of_task(name: str) -> bool:
    prefix, _, rest = name.partition("/")
    return prefix == "task" and rest.rpartition("/")[2] in TASK_SCHEMA


class MetricsWriter:
    """Appends rows to metrics.jsonl.

    Args:
      path: of the file; made by the first `write`.
    """

    def __init__(self, path: Path):
        self._path = Path(path)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row, fields in the schema's order; numbers that are not finite become null, since JSON has none.

        Raises:
          ConfigError: a name is not in the schema, or a required one is missing.
          RunError: the disk is full or fails.
        """
        unknown = sorted(name for name in row.keys() - SCHEMA.keys() if not _is_of_task(name))
        missing = [name for name in REQUIRED if name not in row]
        if unknown or missing:
            raise ConfigError(f"A row of metrics does not fit discover_jax.runs.metrics.SCHEMA: unknown {unknown}, missing {missing}.")
        line = (
            json.dumps({name: _finite(row[name]) for name in (*SCHEMA, *filter(_is_of_task, row)) if name in row}, allow_nan=False) + "\n"
        )
        try:
            with self._path.open("a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"The row of step {row['step']} could not be written to {self._path} ({error}). Free some space, then start the same"
                " command again: it resumes at the last checkpoint."
            ) from error

    def truncate(self, step: int) -> None:
        """Keeps the rows of steps below `step`, which a resumed run does not do again; a torn last line goes, too.

        Raises:
          RunError: another line is broken, or the disk fails.
        """
        kept = [json.dumps(row) for row in read_metrics(self._path) if row["step"] < step]
        if self._path.exists():
            write_atomic(self._path, "".join(line + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; [] if there is none. A last line without its end is left out.

    Raises:
      RunError: another line is broken, or the file cannot be read.
    """
    try:
        lines = Path(path).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}).") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"Line {number} of {path} is no row of metrics ({error!r}). Delete the line, then start again.") from error
        rows.append(row)
    return rows


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """What there is to plot of a row: its finite numbers by name, without the step."""
    numbers_of = {name: _finite(value) for name, value in row.items() if name != "step"}
    return {name: value for name, value in numbers_of.items() if value is not None}


def _finite(value: Any) -> Any:
    """A number as JSON can hold it."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def markdown() -> str:
    """The text of docs/metrics.md."""
    head = (
        "# metrics.jsonl\n\n"
        "One JSON object a line, one line a step; `main` and `search` use the same names. A name is absent where it does not apply\n"
        "(a search has no loss), and null where there was nothing to measure. Names in bold are in every row. A name keeps its unit and\n"
        "meaning for good; new ones may come. TensorBoard and W&B get the same names, with `step` as the step.\n"
        "This page is made from `discover_jax/runs/metrics.py` by `python -m discover_jax.runs.metrics > docs/metrics.md`.\n\n"
        "| name | unit | meaning |\n|---|---|---|\n"
    )
    rows = (
        f"| {f'**`{name}`**' if name in REQUIRED else f'`{name}`'} | {unit} | {meaning.replace('|', chr(92) + '|')} |\n"
        for name, (unit, meaning) in SCHEMA.items()
    )
    of_tasks = (
        f"| `task/ID/{name}` | {unit} | {meaning}; for each competition of a run with several, whose best/score is null |\n"
        for name, (unit, meaning) in TASK_SCHEMA.items()
    )
    return head + "".join([*rows, *of_tasks])


if __name__ == "__main__":
    print(markdown(), end="")

"""metrics.jsonl: one row per step, and the schema of its columns.

`python -m discover_jax.runs.metrics` prints docs/metrics.md from the schema.
"""

import json
import math
import numbers
from pathlib import Path
from typing import Any

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.files import append_synced, storage_remedy, write_atomic
from discover_jax.records import parse_json
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
"""Present in every row; null if there is nothing to measure."""

_OUTCOMES = {
    Outcome.OK: "program got a score",
    Outcome.FORMAT_ERROR: "no program in the final channel, or edits that do not apply",
    Outcome.EXCEPTION: "program raised an exception",
    Outcome.INVALID_SUBMISSION: "program returned an invalid submission or solution",
    Outcome.TIMEOUT: "program exceeded the time limit",
    Outcome.OUT_OF_MEMORY: "program exceeded the memory limit",
    Outcome.OUTPUT_FLOOD: "program printed more than 1 GiB",
    Outcome.RESULT_TOO_BIG: "submission or returned value was larger than the limit (`execution.result_mib`)",
    Outcome.KILLED: "program was killed by a signal",
    Outcome.SANDBOX_ERROR: "always 0: host faults are retried (programs/retried) or stop the run",
}

SCHEMA: dict[str, tuple[str, str]] = {
    "step": ("", "step number, from 0"),
    "reward/mean": ("reward", "mean over the step's rollouts, failures included"),
    "reward/max": ("reward", "highest reward of the step"),
    "reward/min": ("reward", "lowest reward of the step"),
    "best/score": ("metric", "score of the run's best program so far; null before the first valid program"),
    "rollouts/count": ("rollouts", "rollouts of the step"),
    "rollouts/valid_frac": ("fraction", "rollouts whose program got a score"),
    "rollouts/distinct_frac": ("fraction", "distinct texts among the programs of the step; null if there are no programs"),
    "groups/constant_frac": ("fraction", "groups whose rewards are all equal"),
    "groups/unused_frac": ("fraction", "groups left out of the update, because their signals are all equal or too few"),
    "prompt/shortened": ("prompts", "prompts whose output or error was cut to fit sampling.max_prompt_tokens"),
    "tokens/mean": ("tokens", "mean length of a rollout"),
    **{f"outcome/{outcome.value}": ("rollouts", meaning) for outcome, meaning in _OUTCOMES.items()},
    "advantage/mean": ("", "mean advantage in the groups of the update"),
    "advantage/min": ("", "lowest advantage"),
    "advantage/max": ("", "highest advantage"),
    "advantage/beta": ("1/reward", "inverse temperature of the entropic estimator, mean over groups"),
    "advantage/k": ("rollouts", "size of the subsets whose best counts, for max_at_k and frontier"),
    "advantage/frontier_weight": ("fraction", "weight of what a rollout adds to the best so far, for frontier"),
    "advantage/saturated_frac": ("fraction", "groups in which the estimator reached a numerical limit"),
    "advantage/tied_frac": ("fraction", "rollouts of a group that tie for its best signal, mean over groups"),
    "diversity/copy_frac": (
        "fraction",
        "valid programs with the results of an archived or seed program, or of an earlier one in their group",
    ),
    "diversity/duplicate_frac": ("fraction", "programs equal to an earlier one of their group, ignoring names and layout"),
    "diversity/distinct_frac": ("fraction", "distinct programs among those of the step, ignoring names and layout"),
    "diversity/distance": ("", "mean distance between programs of a group: 0 identical, 1 nothing in common"),
    "loss": ("", "loss before the update, combined as train.reduction says"),
    "tokens": ("tokens", "tokens included in the loss"),
    "logprob_gap/mean": ("nats", "mean absolute difference between trainer and sampler log-probability of a token, before the update"),
    "logprob_gap/max": ("nats", "largest absolute difference of this kind"),
    "ratio/min": ("", "smallest probability ratio trainer / sampler"),
    "ratio/max": ("", "largest probability ratio trainer / sampler"),
    "ratio/limited_frac": ("fraction", "tokens whose ratio the loss clips or truncates"),
    "kl_base/mean": ("nats", "estimated KL to the base model: mean of log p_sampler - log p_base over tokens"),
    "entropy": ("nats", "mean policy entropy at the sampled tokens"),
    "grad_norm": ("", "L2 norm of the gradient before clipping"),
    "update/filled_frac": ("fraction", "positions of the update's packed rows that are not padding"),
    "update/skipped": ("", "1 if every group was left out, so there was no update; else 0"),
    "sample/forced_frac": ("fraction", "rollouts whose thinking was ended by sampling.thinking_tokens"),
    "sample/utilisation": ("fraction", "decoding slots that were busy while rollouts waited for a slot; 1 if none waited"),
    "sample/set_aside": ("rollouts", "how often a rollout was moved to host memory because the KV cache was full"),
    "sample/draft_accepted_frac": ("fraction", "draft tokens that were accepted (sampling.draft_tokens); null without drafts"),
    "sample/draft_tokens_per_pass": ("tokens", "tokens that a rollout got in a pass with drafts, mean; null without drafts"),
    "sample/cache_tokens": ("tokens", "peak use of the KV cache, in whole pages, summed over devices"),
    "sample/compilations": ("", "functions that the sampler compiled since the start; constant after the first steps"),
    "sample/tokens_per_s": ("tokens/s", "tokens generated in the step / time/sample_s"),
    "programs/seconds": ("s", "total running time of the step's programs, without cached ones"),
    "programs/retried": ("", "how often a program ran again after a possible host fault"),
    "programs/cached_frac": ("fraction", "programs whose verdict came from an identical earlier one"),
    "time/sample_s": ("s", "from the start of the step to the last rollout; programs run meanwhile"),
    "time/execute_s": ("s", "waiting for programs after the last rollout"),
    "time/execute_first_s": ("s", "part of time/execute_s before the first wave of the update; only if train.waves is above 1"),
    "time/programs_s": (
        "s",
        "from the last rollout until the last program ended; only if train.waves is above 1. The update hid the part above time/execute_s",
    ),
    "time/update_s": ("s", "advantages, packing and optimiser steps; if there is no update, measuring the log-probability gap"),
    "time/save_s": ("s", "writing the journal, best/ and rollouts"),
    "time/checkpoint_wait_s": ("s", "waiting, before the update, until the previous step's checkpoint is complete"),
    "time/checkpoint_write_s": (
        "s",
        "writing the previous step's checkpoint in the background; null in the first step after a start or after a choice of finalists",
    ),
    "time/checkpoint_s": (
        "s",
        "starting the checkpoint and writing the report of the previous step; null in the first step after a start",
    ),
    "time/step_s": ("s", "the whole step until this row is written; its checkpoint comes later"),
}
"""Name -> (unit, meaning), in the order of a row."""

TASK_SCHEMA: dict[str, tuple[str, str]] = {
    "reward_mean": ("reward", "mean over the task's rollouts of the step; null without rollouts"),
    "best_score": ("metric", "score of the task's best program so far (best/score is null)"),
}
"""Columns task/ID/NAME of each task (competition or problem) in runs with several, whose best/score is null."""


def _is_of_task(name: str) -> bool:
    prefix, _, rest = name.partition("/")
    return prefix == "task" and rest.rpartition("/")[2] in TASK_SCHEMA


class MetricsWriter:
    """Appends rows to metrics.jsonl.

    Args:
      path: the file, created by the first `write`.
    """

    def __init__(self, path: Path):
        self._path = Path(path)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row with its columns in schema order. Numbers that are not finite become null, since JSON cannot hold them.

        Raises:
          ConfigError: a name is not in the schema, or a required one is missing.
          RunError: the disk is full or fails.
        """
        unknown = sorted(name for name in row.keys() - SCHEMA.keys() if not _is_of_task(name))
        missing = [name for name in REQUIRED if name not in row]
        if unknown or missing:
            raise ConfigError(f"A metrics row does not match discover_jax.runs.metrics.SCHEMA: unknown {unknown}, missing {missing}.")
        line = (
            json.dumps({name: _finite(row[name]) for name in (*SCHEMA, *filter(_is_of_task, row)) if name in row}, allow_nan=False) + "\n"
        )
        try:
            append_synced(self._path, line.encode())
        except OSError as error:
            raise RunError(
                f"Cannot write the row of step {row['step']} to {self._path} ({error}). {storage_remedy(error)} Then start the same"
                " command again: it resumes from the last checkpoint."
            ) from error

    def truncate(self, step: int) -> None:
        """Keeps only the rows of steps before `step`, where a run resumes, and removes an incomplete last line.

        Raises:
          RunError: another line is damaged, or the disk fails.
        """
        kept = [json.dumps(row) for row in read_metrics(self._path) if row["step"] < step]
        if self._path.exists():
            write_atomic(self._path, "".join(line + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; [] if the file does not exist. An incomplete last line is skipped.

    Raises:
      RunError: another line is damaged, or the file cannot be read.
    """
    try:
        lines = Path(path).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"Cannot read {path} ({error}).") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"Line {number} of {path} is not a metrics row ({error!r}). Delete the line and start again.") from error
        rows.append(row)
    return rows


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row by name, for plotting; without the step."""
    numbers_of = {name: _finite(value) for name, value in row.items() if name != "step"}
    return {name: value for name, value in numbers_of.items() if value is not None}


def _finite(value: Any) -> Any:
    """The number as int or float; None if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def markdown() -> str:
    """The text of docs/metrics.md."""
    head = (
        "# Metrics\n\n"
        "Each line of `metrics.jsonl` is a JSON object with the metrics of one step. A name is absent if it does not apply (a search has\n"
        "no loss) and null if there was nothing to measure. Names in bold are in every row. Names and units are stable; new names may be\n"
        "added. TensorBoard and Weights & Biases use the same names and steps.\n\n"
        "The unit *metric* is the unit of the task's score. The unit *reward* is the unit of the\n"
        "[transformed score](competitions.md#transforms). A *signal* is the reward after [some"
        " options](algorithm.md#rewards-and-signals).\n"
        "Advantages are computed from signals.\n\n"
        "Generated by `python -m discover_jax.runs.metrics > docs/metrics.md`.\n\n"
        "| name | unit | meaning |\n|---|---|---|\n"
    )
    rows = (
        f"| {f'**`{name}`**' if name in REQUIRED else f'`{name}`'} | {unit} | {meaning.replace('|', chr(92) + '|')} |\n"
        for name, (unit, meaning) in SCHEMA.items()
    )
    of_tasks = (f"| `task/ID/{name}` | {unit} | {meaning}; only with several tasks |\n" for name, (unit, meaning) in TASK_SCHEMA.items())
    return head + "".join([*rows, *of_tasks])


if __name__ == "__main__":
    print(markdown(), end="")

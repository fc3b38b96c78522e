"""Rows about rollouts: attempts for the journal, and rows for rollouts/."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import ConfigError, RunError
from discover_jax.execution.cache import verdict_of
from discover_jax.records import parse_json
from discover_jax.runs.outputs import output_of
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.problem_task import ProblemTask
from discover_jax.text.reply import NO_PROGRAM
from discover_jax.text.tokenizer import Tokenizer
from discover_jax.types import SEED, Attempt, Outcome, Prompt, Rollout, RolloutKey, State, Verdict

STDOUT_CHARS = 4000
"""Characters of a program's output that the journal keeps, from its end."""


def attempt_of(
    task: AnyTask,
    step: int,
    parent: State,
    rollout: Rollout,
    code: str | None,
    verdict: Verdict | None,
    adapter_step: int,
    reason: str = NO_PROGRAM,
) -> Attempt:
    """The journal's record of a rollout.

    Args:
      task, parent: task and parent state of its group.
      code, verdict: None if the rollout has no program.
      adapter_step: optimiser steps that the adapter had seen.
      reason: why the rollout has no program, if it has none.
    """
    common = {
        "id": f"{step:04d}-{rollout.group:03d}-{rollout.index:03d}",
        "parent_id": parent.id,
        "task": task.id,
        "step": step,
        "group": rollout.group,
        "index": rollout.index,
        "code": code,
        "adapter_step": adapter_step,
        "tokens": len(rollout.tokens_T),
        "stop": rollout.stop,
    }
    if verdict is None:
        outcome = Outcome.FORMAT_ERROR
        return Attempt(**common, outcome=outcome, detail=reason, stdout="", score=None, private_score=None, reward=task.failure_reward)
    run = {
        "outcome": verdict.outcome,
        "detail": verdict.execution.detail or verdict.grade.reason,
        "stdout": verdict.execution.stdout[-STDOUT_CHARS:],
    }
    grade = verdict.grade
    if verdict.outcome is not Outcome.OK or grade.score is None:
        return Attempt(**common, **run, score=None, private_score=None, reward=task.failure_reward)
    return Attempt(
        **common,
        **run,
        score=grade.score,
        private_score=grade.private_score,
        reward=task.reward(grade.score),
        feedback=grade.feedback,
        metrics=grade.metrics,
        output=output_of(task, verdict),
        rows=grade.rows,
        selection_score=grade.selection_score,
        selection_rows=grade.selection_rows,
    )


def seed_of(task: AnyTask, program: str, verdict: Verdict) -> State:
    """The state from which a search starts with a seed program.

    Raises:
      ConfigError: the program has no score, or its reward is not above that of a failure.
    """
    score = verdict.grade.score
    if verdict.outcome is not Outcome.OK or score is None:
        raise ConfigError(
            f"The seed program of {task.id} has no score ({verdict.outcome.value.replace('_', ' ')}):"
            f"\n{(verdict.execution.detail or verdict.grade.reason).strip()}\n{_remedy(task, program)}"
        )
    value = task.reward(score)
    if value <= task.failure_reward:
        raise ConfigError(
            f"The seed program of {task.id} scores {score}, and its reward is not above failure_reward = {task.failure_reward}, so failing"
            " would be as good. Set failure_reward below the reward of every useful solution, or correct the seed program."
        )
    result = {"value": value, "score": score, "stdout": verdict.execution.stdout[-STDOUT_CHARS:], "feedback": verdict.grade.feedback}
    result["rows"] = verdict.grade.rows
    return dataclasses.replace(SEED, code=program, task=task.id, output=output_of(task, verdict), **result)


def _remedy(task: AnyTask, program: str) -> str:
    """What to do about a seed program without a score."""
    if isinstance(task, ProblemTask) and program == task.problem.seed_program:
        return f"Correct seed_program or evaluate() in the file that defines {task.id}, or set config.task.seed_program to another."
    return "Correct the program in config.task.seed_program, or leave the setting empty."


SEED_PROGRAMS = "seed_programs.json"
"""The file in the run directory with the seed programs and their verdicts."""


def stored_verdicts(file: Path) -> Iterator[tuple[str, str, Verdict]]:
    """Competition id, program and verdict of each seed program of a run.

    Raises:
      RunError: the file is damaged.
    """
    try:
        rows = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _no_seeds(file, error) from error
    return seed_verdicts(file, rows)


def stored_seed_states(folder: Path) -> dict[str, State]:
    """The seed programs of the run in a directory, with their scores as values, by competition id; empty if it has none.

    Raises:
      RunError: the file is damaged.
    """
    if not (file := folder / SEED_PROGRAMS).exists():
        return {}
    states = {}
    for id, program, verdict in stored_verdicts(file):
        score = verdict.grade.score
        states[id] = dataclasses.replace(SEED, code=program, task=id, value=score, score=score, rows=verdict.grade.rows)
    return states


def stored_seeds(file: Path, programs: Mapping[str, str]) -> list[dict[str, Any]]:
    """The seed programs of a run and the rows of their verdicts, as the run stored them; see `seed_verdicts`.

    Args:
      programs: seed programs by competition id, as the config gives them now.

    Raises:
      RunError: the file is damaged, or the programs differ.
    """
    try:
        rows = parse_json(file.read_bytes())
        stored = {row["task"]: row["program"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_seeds(file, error) from error
    if changed := sorted(id for id in stored.keys() | programs.keys() if stored.get(id) != programs.get(id)):
        raise RunError(
            f"The seed programs of {', '.join(changed)} are not those that this run started from ({file}). Restore them, or start a new run"
            " in another folder (--workdir)."
        )
    return rows


def seed_verdicts(file: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Verdict]]:
    """Competition id, program and verdict of each row.

    Args:
      file: that has the rows, for the error.
      rows: of `stored_seeds`.

    Raises:
      RunError: a row has no verdict.
    """
    for row in rows:
        try:
            found = row["task"], row["program"], verdict_of(row["verdict"], cached=False)
        except (ValueError, KeyError, TypeError) as error:
            raise _no_seeds(file, error) from error
        yield found


def _no_seeds(file: Path, error: Exception) -> RunError:
    return RunError(f"{file} does not hold the seed programs of this run ({error!r}). Restore the original file.")


def rollout_rows(
    rollouts: Mapping[RolloutKey, Rollout],
    prompts: Sequence[Prompt],
    attempts: Sequence[Attempt],
    advantages: Mapping[RolloutKey, float],
    verdicts: Mapping[RolloutKey, Verdict],
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """One row per rollout for rollouts/, see `rollouts.COLUMNS`. Only the first row of a group has the prompt's text.

    Args:
      prompts: by group.
      advantages: of the rollouts that the update includes.
      verdicts: of the rollouts with a program.
    """
    rows = []
    for attempt in attempts:
        key = attempt.group, attempt.index
        rollout, verdict = rollouts[key], verdicts.get(key)
        rows.append(
            {
                "id": attempt.id,
                "parent_id": attempt.parent_id,
                "prompt_id": f"{attempt.step:04d}-{attempt.group:03d}",
                "task": attempt.task,
                "step": attempt.step,
                "group": attempt.group,
                "index": attempt.index,
                "prompt": prompts[attempt.group].text if attempt.index == 0 else None,
                "reply": tokenizer.decode(rollout.tokens_T.tolist()),
                "program": attempt.code,
                "prompt_tokens": len(rollout.prompt_tokens_P),
                "tokens": attempt.tokens,
                "stop": attempt.stop.value,
                "temperature": rollout.temperature,
                "logprob_sum": float(rollout.logprobs_T.sum()),
                "outcome": attempt.outcome.value,
                "score": attempt.score,
                "reward": attempt.reward,
                "advantage": advantages.get(key),
                "seconds": verdict.execution.seconds if verdict is not None else None,
                "cached": verdict is not None and verdict.execution.cached,
            }
        )
    return rows

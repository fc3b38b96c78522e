"""Settings of the packages, as typed values from the config."""

from collections.abc import Collection, Sequence
from typing import Any

from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import ResourceLimits, resource_limits
from discover_jax.learning.best_of_k import k_of_step, weight_of_step
from discover_jax.learning.estimates import Objective
from discover_jax.learning.signals import FailureHandling
from discover_jax.runs.rerun import RerunSettings
from discover_jax.sampling.decoding import SecondPhase
from discover_jax.tasks.configured import named_competitions
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.submission_size import MIB, result_bytes, stated_bytes
from discover_jax.text.chat import ChatFormat
from discover_jax.text.prompts import PACKAGES, PromptSettings, installed_packages


def objective_of_step(train: Any, step: int) -> Objective:
    """The objective in a step of the run, from the section `train` of the config and the number of the step in this run, from 0."""
    k_steps = train.max_at_k_steps or train.steps
    k = k_of_step(step, first=train.max_at_k, last=train.max_at_k_last or train.max_at_k, steps=k_steps)
    weight = weight_of_step(step, start=train.frontier_start, steps=train.frontier_steps or train.steps - train.frontier_start)
    return Objective(train.advantage, train.beta, k, weight, FailureHandling(train.failures, train.failure_spread))


def second_phase(config: Any, chat: ChatFormat) -> SecondPhase | None:
    """The second phase, which ends the thinking of a rollout that thinks too long; None if config.sampling.thinking_tokens is 0."""
    if not config.sampling.thinking_tokens:
        return None
    return SecondPhase(config.sampling.thinking_tokens, chat.answer_opening(), chat.answer_forced(config.sampling.thinking_closing))


def packages_in_prompts(tasks: Sequence[AnyTask]) -> list[str]:
    """Names for pip of the packages that prompts for these tasks name where they are installed."""
    return list(dict.fromkeys(name for task in tasks for name in task.packages or PACKAGES))


def unusable_packages(config: Any, tasks: Sequence[AnyTask], executor: Executor) -> dict[str, str]:
    """Packages that prompts must not name, since programs cannot import them here, with the errors. Brief prompts name none."""
    return {} if config.prompt.style == "brief" else executor.unusable_packages(packages_in_prompts(tasks))


def program_limits(config: Any, tasks: Sequence[AnyTask]) -> ResourceLimits:
    """The limits of a program.

    Args:
      tasks: of the executor.

    Raises:
      ConfigError: see `tasks.submission_size.result_bytes`.
    """
    execution = config.execution
    return resource_limits(execution.seconds, execution.cores, execution.memory_gib, result_bytes(tasks, execution.result_mib))


def prompt_settings(config: Any, unusable: Collection[str] = (), tasks: Sequence[AnyTask] = ()) -> PromptSettings:
    """The settings of prompts.

    Args:
      unusable: packages that programs cannot import, on any host.
      tasks: of the executor, for the limit of submissions.
    """
    return PromptSettings(
        style=config.prompt.style,
        answer=config.prompt.answer,
        max_tokens=config.sampling.max_prompt_tokens,
        seconds=config.execution.seconds,
        cores=config.execution.cores,
        memory_gib=config.execution.memory_gib,
        result_mib=stated_bytes(tasks, config.execution.result_mib) / MIB if tasks else 0,
        packages=installed_packages(unusable=unusable),
        unusable=frozenset(unusable),
        ideas_shown=config.prompt.ideas,
        stdout_chars=config.prompt.stdout_chars,
        error_chars=config.prompt.error_chars,
    )


def rerun_settings(config: Any, number: int, *, stratified: bool) -> RerunSettings:
    """The settings of best/rerun.sh for the competition with this number in config.task.

    Args:
      stratified: whether its held-out rows were stratified. A run of an earlier version keeps its rows even if the config differs.
    """
    name, raw = named_competitions(config.task)[number]
    rows_of, execution = config.task, config.execution
    rows = (rows_of.reward, rows_of.holdout_fraction, rows_of.holdout_folds, rows_of.selection_fraction)
    grading = (rows_of.grader, rows_of.reuse_output, config.seed)
    limits = (execution.seconds, execution.cores, execution.memory_gib, execution.backend, execution.allow_weaker, execution.result_mib)
    return RerunSettings(name, raw, *rows, *grading, *limits, stratified=stratified)

"""The tasks that config.task names, and the programs from which their searches start."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.loading import load_definition, locate_definition
from discover_jax.tasks.prepare import AnyTask, prepare_task
from discover_jax.tasks.problem import Problem
from discover_jax.tasks.problem_task import ProblemTask


def prepare_tasks(settings: Any, *, folder: Path, seed: int) -> list[AnyTask]:
    """The tasks of a run.

    Args:
      settings: config.task. Commas separate several competitions, and their raw data in the same order; see `named_competitions`.
      folder: of the only task, or parent of one folder per task.
      seed: see `prepare_task`.

    Raises:
      ConfigError: see `prepare_task`; or a competition is named twice, the number of raw data paths differs from that of competitions, or a
        setting affects none of them.
      DataError: see `prepare_task`.
    """
    competitions = named_competitions(settings)
    names = [name for name, _ in competitions]
    definitions = [load_definition(*locate_definition(name)) for name in names]
    ids = [definition.id for definition in definitions]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"config.task.competition = {settings.competition!r} names a competition or problem twice: {', '.join(ids)}.")
    _check_effects(settings, definitions)
    return [
        prepare_task(
            name,
            raw=raw,
            reward=settings.reward,
            folder=folder if len(names) == 1 else folder / id,
            holdout_fraction=settings.holdout_fraction,
            holdout_folds=settings.holdout_folds,
            selection_fraction=settings.selection_fraction,
            grader=settings.grader,
            reuse_output=settings.reuse_output,
            stratified=settings.stratified,
            seed=seed,
        )
        for (name, raw), id in zip(competitions, ids, strict=True)
    ]


def _check_effects(settings: Any, definitions: Sequence[Competition | Problem]) -> None:
    """Raises ConfigError if config.task has a choice that affects none of the competitions and problems: most likely a mistake."""
    ids, problems = ", ".join(definition.id for definition in definitions), [isinstance(each, Problem) for each in definitions]
    if settings.reuse_output != "problem" and not any(problems):
        raise ConfigError(
            f"config.task.reuse_output = {settings.reuse_output!r} has no effect: only problems have returned values, and the run has only"
            f" competitions ({ids}). Remove it."
        )
    if settings.reward == "holdout" and all(problems):
        raise ConfigError(
            f"config.task.reward = 'holdout' has no effect: only competitions have rows to hold out, and the run has only problems ({ids})."
            " Remove it, and config.task.holdout_fraction, holdout_folds and selection_fraction."
        )


def named_competitions(settings: Any) -> list[tuple[str, str]]:
    """The competitions in config.task, each with the path of its raw data; "" for a competition that brings its own.

    A comma in a path is written as `\\,`. In the only competition's path of raw data, it may stand as it is.

    Raises:
      ConfigError: the number of raw data paths differs from that of competitions.
    """
    names = _listed(settings.competition)
    raws = _listed(settings.raw, len(names)) if settings.raw else [""] * len(names)
    if len(raws) != len(names):
        raise ConfigError(
            f"config.task.raw = {settings.raw!r} has {len(raws)} paths for {len(names)} competitions and problems. Give one for"
            " each, separated by commas. Leave it empty for a problem, and for a competition that brings its own data. Write a comma that"
            " belongs to a path as '\\,'."
        )
    return list(zip(names, raws, strict=True))


def _listed(text: str, count: int = 0) -> list[str]:
    """The entries of a list that commas separate, without spaces around them; `\\,` is a comma within an entry.

    Args:
      count: number of entries, if it is known: the only entry may contain commas as they are.
    """
    entries = [text] if count == 1 else re.split(r"(?<!\\),", text)
    return [entry.strip().replace("\\,", ",") for entry in entries]


def seed_programs(settings: Any, tasks: Sequence[AnyTask]) -> list[str]:
    """The program from which the search of each task starts; "" for nothing.

    Args:
      settings: config.task.
      tasks: of the run.

    Raises:
      ConfigError: the number of paths differs from that of competitions, or a file cannot be read.
    """
    if not settings.seed_program:
        return [task.problem.seed_program if isinstance(task, ProblemTask) else "" for task in tasks]
    paths = _listed(settings.seed_program, len(tasks))
    if len(paths) != len(tasks):
        raise ConfigError(
            f"config.task.seed_program = {settings.seed_program!r} has {len(paths)} paths for {len(tasks)} competitions and problems. Give"
            " one for each, separated by commas. Write a comma that belongs to a path as '\\,'."
        )
    try:
        return [Path(path).expanduser().read_text() if path else "" for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config.task.seed_program = {settings.seed_program!r} cannot be read: {error}.") from error

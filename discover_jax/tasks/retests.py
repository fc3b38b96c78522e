"""Further tests of a program on rows that no reward depended on, for the choice of the best program.

A competition is split again: the training rows that never gave a reward are dealt into parts. For each part there is a task in which it is
held out, and all other training rows, those behind rewards too, are shown with their labels. A problem whose scores vary between
evaluations is evaluated again. Both are tasks of their own, with fingerprints of their own, so no verdict of the run is taken for them.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discover_jax.exceptions import ConfigError
from discover_jax.tasks import holdout
from discover_jax.tasks.holdout import deal, hold_out, holdable_rows, strata
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.prepared_folder import is_stratified, prepare_folder
from discover_jax.tasks.prepared_tables import check_ids
from discover_jax.tasks.problem_task import ProblemTask
from discover_jax.tasks.tables import read_text_table, write_text_table
from discover_jax.tasks.task import Split, Task


def prepare_retests(task: AnyTask, count: int, *, folder: Path, seed: int) -> tuple[AnyTask, ...]:
    """The retests of a task, in their order; none for a problem whose scores do not vary, or whose programs read their parents' values.

    Args:
      task: of the run.
      count: number of retests.
      folder: empty, missing, or prepared before for the same task.
      seed: for dealing the rows.

    Raises:
      ConfigError: the competition's tables do not support it, or a retest would have too few rows.
      DataError: see `prepare.prepare_folder`.
    """
    if isinstance(task, ProblemTask):
        repeatable = task.noisy and not task.reuse_output  # otherwise a program also depends on what its parent returned
        return tuple(_repeated(task, number) for number in range(count)) if repeatable else ()
    settings: dict[str, Any] = {"retests": count, "task_fingerprint": task.fingerprint, "seed": seed}
    files, fingerprint = prepare_folder(folder, settings, lambda work: _write(task, count, work, seed))
    names = [f"retest-{number + 1}" for number in range(count)]
    splits = [
        Split(
            name,
            (("test.csv", files["private/test.csv"]), (f"{name}.csv", files[f"private/{name}.csv"])),
            len(read_text_table((folder / "private" / f"{name}.csv").read_bytes())),
        )
        for name in names
    ]
    shared = {"folder": folder, "reward_source": "holdout"}
    retests = tuple(
        dataclasses.replace(task, **shared, splits=(split,), fingerprint=_digest(fingerprint, split.folder)) for split in splits
    )
    for retest in retests:
        check_ids(retest)
        grade = retest.grade(retest.sample(-1))
        if not grade.valid:
            raise ConfigError(
                f"{retest.splits[0].folder} of {task.id!r} cannot be scored: its sample submission is not valid: {grade.reason} Lower"
                " config.finalists.retests, so that each retest has more rows, or set config.finalists.count = 0."
            )
    return retests


def _repeated(task: ProblemTask, number: int) -> ProblemTask:
    return dataclasses.replace(task, fingerprint=_digest(task.fingerprint, f"retest-{number + 1}"))


def _digest(fingerprint: str, name: str) -> str:
    return hashlib.sha256(f"{fingerprint} {name}".encode()).hexdigest()


def _write(task: Task, count: int, work: Path, seed: int) -> dict[str, Any]:
    """Writes retest-N/ and their answers."""
    definition = task.competition
    id_column = definition.id_column
    if not id_column:
        raise ConfigError(
            f"Competition {task.id!r} does not support retests: only its grader knows the format of its answers. Set"
            " config.finalists.count = 0."
        )
    if len(task.splits) > 1:
        raise ConfigError(
            f"Competition {task.id!r} does not support retests: with folds, every training row gives rewards. Set"
            " config.task.holdout_folds = 1, or config.finalists.count = 0."
        )
    holdable_rows(definition, task.public_dir, what="config.finalists", instead="config.finalists.count = 0")
    train, rewarded = _training_rows(task)
    open_R = np.flatnonzero(~train[id_column].isin(rewarded).to_numpy())
    least = len(open_R) // count
    if least < holdout.LEAST_ROWS or len(train) - least < 2:
        raise ConfigError(
            f"config.finalists.retests = {count}: {len(open_R)} training rows of {task.id!r} gave no reward, so a retest would have"
            f" {least}. It needs {holdout.LEAST_ROWS}. Lower config.finalists.retests, or config.task.holdout_fraction."
        )
    (work / "private").mkdir(mode=0o700)
    shutil.copyfile(task.folder / "private" / "test.csv", work / "private" / "test.csv")
    random = np.random.RandomState(seed)
    class_R = None if task.reward_source == "holdout" and not is_stratified(task.settings) else strata(train, definition.label_columns)
    part_R = deal(None if class_R is None else class_R[open_R], len(open_R), count, random)
    for number in range(count):
        shown = work / f"retest-{number + 1}"
        shutil.copytree(task.public_dir, shown)
        _undo_hold_out(task, train, shown)
        hold_out(definition, shown, {work / "private" / f"{shown.name}.csv": open_R[part_R == number]}, random)
    return {}


def _training_rows(task: Task) -> tuple[Any, set[str]]:
    """The training table with the rows that were held out of it, and the ids of these: they gave rewards or served for selection."""
    id_column, targets = task.competition.id_column, list(task.competition.label_columns)
    train, test = (read_text_table((task.public_dir / name).read_bytes()) for name in ("train.csv", "test.csv"))
    withheld = [read_text_table((task.folder / "private" / name).read_bytes()) for name, _ in task.splits[-1].answers[1:]]
    if not withheld:
        return train, set()
    labels = pd.concat(withheld).set_index(id_column)
    if set(train.columns) != {*test.columns, *targets}:
        return train, set(labels.index)  # the rows lost some cells when they were held out
    held = test.loc[test[id_column].isin(list(labels.index))]
    back = held.assign(**{target: labels.loc[held[id_column], target].to_numpy() for target in targets}).loc[:, list(train.columns)]
    return pd.concat([train, back], ignore_index=True), set(labels.index)


def _undo_hold_out(task: Task, train: Any, shown: Path) -> None:
    """Gives a copy of public/ this training table, and only the private rows to predict."""
    id_column = task.competition.id_column
    private = read_text_table((task.folder / "private" / "test.csv").read_bytes())[id_column]
    write_text_table(train, shown / "train.csv")
    for name in ("test.csv", "sample_submission.csv"):
        table = read_text_table((shown / name).read_bytes())
        write_text_table(table.loc[table[id_column].isin(private)], shown / name)

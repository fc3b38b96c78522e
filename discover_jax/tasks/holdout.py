"""Holds rows out of a competition's training table: one part, a part for selection, or folds."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.answer_types import hidden_labels, inferred, is_text, merged_ids
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.tables import read_text_table, write_text_table

PUBLIC_TABLES = ("train.csv", "test.csv", "sample_submission.csv")
"""Tables that programs see."""
LEAST_ROWS = 30
"""Fewest rows for selection, and of a retest: fewer would say next to nothing about a program."""


def hold_out_part(definition: Competition, work: Path, fraction: float, selection: float, seed: int, *, stratified: bool) -> None:
    """Holds out random training rows from public/; their answers go to private/holdout.csv, and those for selection to selection.csv."""
    random = np.random.RandomState(seed)  # numpy guarantees that its stream never changes
    rows = holdable_rows(definition, work / "public")
    count = min(max(1, math.floor(fraction * rows + 0.5)), rows - 1)
    chosen = max(1, math.floor(selection * rows + 0.5)) if selection else 0
    if chosen and (chosen < LEAST_ROWS or rows - count - chosen < 1):
        raise ConfigError(
            f"config.task.holdout_fraction = {fraction} and config.task.selection_fraction = {selection} hold out {count} and {chosen} of"
            f" the {rows} training rows of {definition.id!r}. At least {LEAST_ROWS} rows must serve for selection, and at least 1 must be"
            " left. Change the fractions."
        )
    class_R = strata_of(definition, work / "public") if stratified else None
    if class_R is None:
        order = random.permutation(rows)
        held, selected = order[:count], order[count : count + chosen]
    else:
        held = draw(class_R, np.arange(rows), count, random)
        selected = draw(class_R, np.setdiff1d(np.arange(rows), held), chosen, random)
    held_out = {"holdout.csv": held, "selection.csv": selected}
    hold_out(definition, work / "public", {work / "private" / name: part for name, part in held_out.items() if len(part)}, random)


def make_folds(definition: Competition, work: Path, folds: int, seed: int, *, stratified: bool) -> None:
    """Splits the training rows randomly into folds whose sizes differ by at most one row: fold-N/ is public/ with fold N held out."""
    random = np.random.RandomState(seed)
    rows = holdable_rows(definition, work / "public")
    if folds > rows:
        raise ConfigError(f"config.task.holdout_folds = {folds}: {definition.id!r} has only {rows} training rows; use fewer folds.")
    fold_R = deal(strata_of(definition, work / "public") if stratified else None, rows, folds, random)
    for fold in range(folds):
        folder = work / f"fold-{fold + 1}"
        shutil.copytree(work / "public", folder)
        hold_out(definition, folder, {work / "private" / f"{folder.name}.csv": np.flatnonzero(fold_R == fold)}, random)


def strata_of(definition: Competition, public: Path) -> np.ndarray | None:
    """`strata` of the training table in public/."""
    return strata(read_text_table((public / "train.csv").read_bytes()), definition.label_columns)


def strata(train: pd.DataFrame, columns: Sequence[str]) -> np.ndarray | None:
    """The class of each row, as a number; None if the labels are not classes.

    Labels are classes if they are text, truth values or integers, and if no more than one row in ten has a new one. The classes of several
    columns are the combinations of their labels.

    Args:
      train: of text.
      columns: of labels.
    """
    for column in columns:
        if any(isinstance(value, float) and value % 1 > 0 for value in inferred(train[column].tolist())):  # false for NaN
            return None
    keys_R = list(train[list(columns)].itertuples(index=False, name=None))
    numbers = {key: number for number, key in enumerate(sorted(set(keys_R)))}
    return np.array([numbers[key] for key in keys_R]) if len(numbers) <= max(2, len(train) // 10) else None


def draw(class_R: np.ndarray, open_N: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """Draws `count` of N rows at random. Of each class, the number of rows differs from its share by less than one.

    Args:
      class_R: of all rows.
      open_N: rows to draw from.
    """
    ordered_N = open_N[np.lexsort((random.permutation(len(open_N)), class_R[open_N]))]
    # Systematic sampling: every (N / count)-th row of the rows sorted by class, from a random start.
    return ordered_N[((np.arange(count) + random.uniform()) * (len(open_N) / max(count, 1))).astype(np.int64)]


def deal(class_R: np.ndarray | None, rows: int, parts: int, random: np.random.RandomState) -> np.ndarray:
    """A random part, from 0 to `parts` - 1, for each of the rows. The parts' sizes differ by at most one, and so do those of each class.

    Args:
      class_R: of the rows; None without classes.
    """
    if class_R is None:
        return random.permutation(np.arange(rows) % parts)
    part_R = np.empty(rows, np.int64)
    part_R[np.lexsort((random.permutation(rows), class_R))] = random.permutation(parts)[np.arange(rows) % parts]
    return part_R


def holdable_rows(
    definition: Competition, public: Path, *, what: str = "the reward `holdout`", instead: str = "config.task.reward = 'grade'"
) -> int:
    """Number of training rows, after checking that rows can be held out of them.

    Args:
      what, instead: for the error: what needs it, and the setting that does not.

    Raises:
      ConfigError: the tables do not support it.
    """
    id_column = definition.id_column
    train, test = (read_text_table((public / name).read_bytes()) for name in PUBLIC_TABLES[:2])
    problem = None
    if absent := set(test.columns) - set(train.columns):
        problem = f"train.csv lacks columns of test.csv ({', '.join(sorted(absent))})"
    elif len(set(ids := [*train[id_column], *test[id_column]])) < len(ids):
        problem = "ids repeat within train.csv and test.csv"
    elif "" in ids:
        problem = "train.csv has rows without an id"
    elif len(train) < 2:
        problem = "train.csv has fewer than two rows"
    elif any("" in set(train[target]) for target in definition.label_columns):
        problem = "train.csv has rows without a target"
    elif lost := [label for target in definition.label_columns for label in lost_labels(definition, train[target].tolist())]:
        problem = (
            f"train.csv has the label {lost[0]!r}, which pandas reads as missing. Drop these rows in prepare(), or rename"
            " the label if it is a class"
        )
    elif merged := merged_ids(ids):
        problem = f"pandas reads the ids {merged[0]!r} and {merged[1]!r} as the same value"
    if problem:
        raise ConfigError(f"Competition {definition.id!r} cannot use {what}: {problem}. Use {instead}.")
    return len(train)


def lost_labels(definition: Competition, labels: list[str]) -> list[str]:
    """Labels of the training table that may be a class or a missing value: those that pandas takes for missing among numbers."""
    return [] if definition.classes or is_text(labels) else hidden_labels(labels)


def hold_out(definition: Competition, shown: Path, held_out: Mapping[Path, np.ndarray], random: np.random.RandomState) -> None:
    """Moves training rows of the folder `shown` to its test table, shuffled in. Cell texts do not change.

    Args:
      held_out: for each file of answers to write, the indices of its rows.
    """
    id_column = definition.id_column
    train, test, sample = (read_text_table((shown / name).read_bytes()) for name in PUBLIC_TABLES)
    held_R = np.zeros(len(train), bool)
    held_R[np.concatenate(list(held_out.values()))] = True
    held = train.loc[held_R]
    grown = pd.concat([test, held[list(test.columns)]]).iloc[random.permutation(len(test) + len(held))]
    # The held-out rows get the values of the sample's first row: samples are usually constant.
    rest = {column: sample[column].iloc[0] for column in sample.columns if column != id_column}
    grown_sample = pd.concat([sample, held.loc[:, [id_column]].assign(**rest)[list(sample.columns)]])
    grown_sample = grown_sample.set_index(id_column).loc[grown[id_column]].reset_index()[list(sample.columns)]
    for answers, rows in held_out.items():
        write_text_table(train.iloc[np.sort(rows)].loc[:, [id_column, *definition.label_columns]], answers)
    for table, name in ((train.loc[~held_R], "train.csv"), (grown, "test.csv"), (grown_sample, "sample_submission.csv")):
        write_text_table(table, shown / name)

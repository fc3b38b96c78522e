"""Holds rows out of a competition's training table: one part, a part for selection, or folds."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.tables import read_text_table

PUBLIC_TABLES = ("train.csv", "test.csv", "sample_submission.csv")
"""Tables that programs see."""
LEAST_ROWS = 30
"""Fewest rows for selection, and of a retest: fewer would say next to nothing about a program."""


def hold_out_part(definition: Competition, work: Path, fraction: float, selection: float, seed: int) -> None:
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
    order = random.permutation(rows)
    held_out = {"holdout.csv": order[:count], "selection.csv": order[count : count + chosen]}
    hold_out(
        definition.id_column,
        definition.target,
        work / "public",
        {work / "private" / name: part for name, part in held_out.items() if len(part)},
        random,
    )


def make_folds(definition: Competition, work: Path, folds: int, seed: int) -> None:
    """Splits the training rows randomly into folds whose sizes differ by at most one row: fold-N/ is public/ with fold N held out."""
    random = np.random.RandomState(seed)
    rows = holdable_rows(definition, work / "public")
    if folds > rows:
        raise ConfigError(f"config.task.holdout_folds = {folds}: {definition.id!r} has only {rows} training rows; use fewer folds.")
    fold_R = random.permutation(np.arange(rows) % folds)
    for fold in range(folds):
        folder = work / f"fold-{fold + 1}"
        shutil.copytree(work / "public", folder)
        hold_out(
            definition.id_column,
            definition.target,
            folder,
            {work / "private" / f"{folder.name}.csv": np.flatnonzero(fold_R == fold)},
            random,
        )


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
    elif "" in set(train[definition.target]):
        problem = "train.csv has rows without a target"
    if problem:
        raise ConfigError(f"Competition {definition.id!r} cannot use {what}: {problem}. Use {instead}.")
    return len(train)


def hold_out(id_column: str, target: str, shown: Path, held_out: Mapping[Path, np.ndarray], random: np.random.RandomState) -> None:
    """Moves training rows of the folder `shown` to its test table, shuffled in. Cell texts do not change.

    Args:
      held_out: for each file of answers to write, the indices of its rows.
    """
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
        train.iloc[np.sort(rows)].loc[:, [id_column, target]].to_csv(answers, index=False, lineterminator="\n")
    train.loc[~held_R].to_csv(shown / "train.csv", index=False, lineterminator="\n")
    grown.to_csv(shown / "test.csv", index=False, lineterminator="\n")
    grown_sample.to_csv(shown / "sample_submission.csv", index=False, lineterminator="\n")

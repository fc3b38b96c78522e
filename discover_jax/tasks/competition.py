"""What a competition is: its tables and its metric. One small file defines one."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.rewards import check_rewards, direction_of, reward_of, signals_of


@dataclasses.dataclass(frozen=True)
class Metric:
    """How predictions are compared with the answers.

    Attributes:
      name: as prompts and summaries show it.
      higher_is_better: its direction.
      function: (answers_R, predictions_R) -> score, any function of scikit-learn's shape. R rows, in the order of their ids. With several
        columns to predict, both are arrays of rows and columns, (answers_RC, predictions_RC); with `Competition.classes`, answers_RC has a
        1 for a row's class and otherwise 0. If it raises, the submission is invalid, and the error's text is the reason.
      proportion: True if the score is the share of correct rows, as accuracy is; its interval is then binomial.
      resampled: optional: (answers_R, predictions_R, counts_BR) -> scores_B, the scores of B tables in which row r occurs counts_BR[b, r]
        times; NaN where a score is undefined. It makes bootstrap intervals faster: with `function` they take seconds.
      influence: optional: (answers_R, predictions_R) -> influence_R, how much each row moves the score (see `row_results`); for a
        `proportion`, 1 for a correct row and 0 for another. With it, two programs can be compared on the same rows. If it raises, the
        submission is invalid. `resampled` and `influence` get arrays of rows and columns as `function` does.
    """

    name: str
    higher_is_better: bool
    function: Callable[[np.ndarray, np.ndarray], float]
    proportion: bool = False
    resampled: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None
    influence: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A published score to compare with, such as a medal's."""

    name: str
    score: float


@dataclasses.dataclass(frozen=True)
class Competition:
    """The definition of a competition.

    Attributes:
      id: short name: letters, digits, dot, dash, underscore.
      description: for the full prompt: the story, the columns, what to predict. The files and the metric are listed by the prompt itself.
      id_column, target: column that names a row, and column to predict, or several such columns; the submission has all of them. Both empty
        if only `judge` knows the format of a submission.
      classes: for predicted probabilities of classes: each label that `target` may have, with the submission's column for its probability;
        or the labels alone, if the columns have their names. train.csv and the answers have the labels in `target`, and the submission has
        the columns instead.
      metric: how predictions are compared with the answers.
      prepare: (raw, public, private) -> None. Reads `raw` (the path in config.task.raw; None if it is empty) and writes public/train.csv
        (with the target), public/test.csv (without), public/sample_submission.csv, and private/test.csv (the answers: at least id and
        target).
        Raises DataError if the raw data are missing or wrong.
      failure_reward: reward of a program that failed; must be below that of the sample submission.
      transform: name in TRANSFORMS, from score to reward: "identity" if higher is better; "negate" if lower is, or "log" or "inverse" where
        scores have no bound that rewards could be compared with.
      prepared_md5: expected MD5 of prepared files, such as {"public/train.csv": "564a..."}; empty: not checked.
      sample_score: known score of the sample submission on the private answers, for the doctor; None: not known.
      thresholds: published scores to compare with, for summaries; never invented.
      thresholds_source: their source; always shown with them.
      thresholds_note: what they are, and how far the comparison holds; or why there are none.
      judge: (submission, answers) -> score, both whole tables: takes the place of metric.function and of the rules on rows and columns. May
        raise on a submission that it cannot judge, as metric.function may. MLE-bench's own graders are such functions.
      judge_version: whose it is and which one; grades by another are not taken for its own.

    Raises:
      ConfigError: a value is not allowed, or direction and transform contradict each other.
    """

    id: str
    description: str
    id_column: str
    target: str | tuple[str, ...]
    metric: Metric
    prepare: Callable[[Path | None, Path, Path], None]
    failure_reward: float = 0.0
    transform: str = "identity"
    prepared_md5: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sample_score: float | None = None
    thresholds: tuple[Threshold, ...] = ()
    thresholds_source: str = "from the competition's definition, not from a leaderboard on this machine"
    thresholds_note: str = ""
    judge: Callable[[pd.DataFrame, pd.DataFrame], float] | None = None
    judge_version: str = ""
    classes: Mapping[str, str] | Sequence[str] = ()

    def __post_init__(self):
        def refuse(problem: str) -> ConfigError:
            return ConfigError(f"Competition {self.id!r}: {problem}")

        if not isinstance(self.id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.id):
            raise refuse("the id must consist of letters, digits, '.', '-' and '_', since it names folders.")
        if not isinstance(self.description, str) or not self.description.strip():
            raise refuse(f"description must be a non-empty string; got {self.description!r}.")
        if self.judge is None or (self.id_column, self.target) != ("", ""):
            self._check_columns(refuse)
        if not isinstance(self.metric, Metric):
            raise refuse(f"metric must be a Metric, such as discover_jax.tasks.metrics.ACCURACY; got {self.metric!r}.")
        check_rewards(refuse, self.transform, self.metric.name, self.metric.higher_is_better, self.failure_reward)

    def _check_columns(self, refuse: Callable[[str], ConfigError]) -> None:
        several = isinstance(self.target, tuple)
        targets: tuple[Any, ...] = self.target if isinstance(self.target, tuple) else (self.target,)
        for name, values in (("id_column", (self.id_column,)), ("target", targets)):
            if not values or not all(isinstance(value, str) and value.strip() for value in values):
                allowed = " or a tuple of such strings" if name == "target" else ""
                raise refuse(f"{name} must be a non-empty string{allowed}; got {getattr(self, name)!r}.")
        if self.id_column in targets:
            raise refuse(f"id_column and target are both {self.id_column!r}; they must differ.")
        if len(set(targets)) < len(targets):
            raise refuse(f"target names a column twice: {', '.join(targets)}.")
        if not self.classes:
            return
        columns = tuple(self.class_columns.values())
        if several or self.judge is not None:
            raise refuse("classes need a single column as target, with the labels, and no judge.")
        if isinstance(self.classes, str) or not all(isinstance(name, str) and name for name in (*self.class_columns, *columns)):
            raise refuse(f"classes must be labels, or labels with columns, all of them non-empty strings; got {self.classes!r}.")
        if len(columns) < 2 or len(set(columns)) < len(self.classes) or self.id_column in columns:
            raise refuse(f"classes must be at least two labels with different columns, none of them the id column; got {self.classes!r}.")

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of train.csv and of the answers that are to be predicted."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def class_columns(self) -> Mapping[str, str]:
        """For each label, the submission's column for its probability; empty if the submission has the targets themselves."""
        return dict(self.classes) if isinstance(self.classes, Mapping) else {label: label for label in self.classes}

    @property
    def submitted_columns(self) -> tuple[str, ...]:
        """The columns of a submission beside the ids."""
        return tuple(self.class_columns.values()) or self.label_columns

    @property
    def direction(self) -> str:
        """ "higher" or "lower": which scores are better."""
        return direction_of(self.metric.higher_is_better)

    def reward(self, score: float) -> float:
        """The reward of a score, at least that of a failure; higher is better.

        Raises:
          ConfigError: the transform is not defined for the score.
        """
        try:
            return reward_of(score, self.transform, self.metric.higher_is_better, self.failure_reward)
        except ConfigError as error:
            raise ConfigError(f"Competition {self.id!r}: {self.metric.name} {error}") from error

    def signals(self, rewards_K: Sequence[float]) -> list[float]:
        """What advantages use: the rewards of a group, or their ranks if the transform says so."""
        return signals_of(rewards_K, self.transform)

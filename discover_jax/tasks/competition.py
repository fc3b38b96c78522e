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
      function: (answers_R, predictions_R) -> score, any function of scikit-learn's shape. R rows, in the answers' order.
        If it raises, the submission is invalid, and the error's text is the reason.
      proportion: True if the score is the share of correct rows, as accuracy is; its interval is then binomial.
      resampled: optional: (answers_R, predictions_R, counts_BR) -> scores_B, the scores of B tables in which row r occurs counts_BR[b, r]
        times; NaN where a score is undefined. It makes bootstrap intervals faster: with `function` they take seconds.
      influence: optional: (answers_R, predictions_R) -> influence_R, how much each row moves the score (see `row_results`); for a
        `proportion`, 1 for a correct row and 0 for another. With it, two programs can be compared on the same rows. If it raises, the
        submission is invalid.
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
      id_column, target: column that names a row, and column to predict; the submission has both. Both empty if only `judge` knows the
        format of a submission.
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
    target: str
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

    def __post_init__(self):
        def refuse(problem: str) -> ConfigError:
            return ConfigError(f"Competition {self.id!r}: {problem}")

        if not isinstance(self.id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.id):
            raise refuse("the id must consist of letters, digits, '.', '-' and '_', since it names folders.")
        columns = () if self.judge is not None and (self.id_column, self.target) == ("", "") else ("id_column", "target")
        for name in ("description", *columns):
            value: Any = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise refuse(f"{name} must be a non-empty string; got {value!r}.")
        if columns and self.id_column == self.target:
            raise refuse(f"id_column and target are both {self.target!r}; they must differ.")
        if not isinstance(self.metric, Metric):
            raise refuse(f"metric must be a Metric, such as discover_jax.tasks.metrics.ACCURACY; got {self.metric!r}.")
        check_rewards(refuse, self.transform, self.metric.name, self.metric.higher_is_better, self.failure_reward)

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

"""A prepared task: what prompts tell of it, what programs see of it, and how it grades. Light, immutable, picklable."""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from discover_jax.exceptions import DataError
from discover_jax.tasks import grading
from discover_jax.tasks.competition import Competition, Metric, Threshold
from discover_jax.tasks.interval import score_interval
from discover_jax.tasks.loading import load_competition
from discover_jax.tasks.tables import read_table, read_text_table
from discover_jax.types import Grade


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """A public file. `rows` does not count the header; it is None, and `columns` empty, for a file that is no CSV table."""

    name: str
    rows: int | None
    columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Disclosure:
    """What signal reached the search; every table and plot of its scores must say so.

    Attributes:
      reward: "grade" or "holdout".
      rows: number of rows behind the score that the search saw.
      private_rows: number of rows of the private answers.
      text: the same in a sentence or two.
    """

    reward: str
    rows: int
    private_rows: int
    text: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A competition, prepared in a folder by `prepare_task`. Other processes may use it: they load definition and answers when needed.

    Attributes:
      source, source_digest: where the competition's definition lies (see `locate_competition`).
      folder: holds public/ and private/.
      reward_source: "grade" or "holdout".
      files: what is in public/.
      private_rows, holdout_rows: answers of each kind; holdout_rows is 0 for "grade".
      answers_digests: (file in private/, sha256) of each file of answers, private answers first.
      fingerprint: hash of the data and of every setting that a grade depends on: equal fingerprints grade alike.
    """

    source: str
    source_digest: str
    folder: Path
    reward_source: str
    files: tuple[TaskFile, ...]
    private_rows: int
    holdout_rows: int
    answers_digests: tuple[tuple[str, str], ...]
    fingerprint: str

    @property
    def competition(self) -> Competition:
        return load_competition(self.source, self.source_digest)

    @property
    def id(self) -> str:
        return self.competition.id

    @property
    def description(self) -> str:
        return self.competition.description

    @property
    def metric(self) -> Metric:
        return self.competition.metric

    @property
    def failure_reward(self) -> float:
        return self.competition.failure_reward

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        return self.competition.thresholds

    @property
    def thresholds_note(self) -> str:
        return self.competition.thresholds_note

    @property
    def public_dir(self) -> Path:
        """The one folder that programs may see."""
        return self.folder / "public"

    @property
    def score_rows(self) -> int:
        """Number of rows behind a `Grade.score`."""
        return self.holdout_rows or self.private_rows

    def grade(self, csv: bytes) -> Grade:
        """The verdict on a submission's CSV bytes. Whatever the bytes, it is a Grade and no exception.

        Raises:
          DataError: the answers on this machine are missing or were altered.
        """
        return grading.grade(csv, self._answers(), self.metric)

    def answers_as_submission(self) -> bytes:
        """The answers as a submission, which cannot be beaten; for checks of the grader. Never for programs.

        Raises:
          DataError: see `grade`.
        """
        return self._answers().table.to_csv(index=False).encode()

    def _answers(self) -> grading.Answers:
        return _load_answers(self.folder / "private", self.answers_digests, self.competition.id_column, self.competition.target)

    def reward(self, score: float) -> float:
        """The reward of a score, higher is better."""
        return self.competition.reward(score)

    def score_interval(self, score: float) -> tuple[float, float] | None:
        """95% interval of a `Grade.score`, or None where the metric has none."""
        return score_interval(self.metric, score, self.score_rows)

    def private_score_interval(self, score: float) -> tuple[float, float] | None:
        """95% interval of a `Grade.private_score`, or None where the metric has none."""
        return score_interval(self.metric, score, self.private_rows)

    @property
    def disclosure(self) -> Disclosure:
        if self.reward_source == "grade":
            text = (
                f"Rewards come from the private answers ({self.private_rows:,} rows), which scores are reported on, too. The search"
                " optimised on the graded rows, so its best score is no estimate for unseen data."
            )
        else:
            text = (
                f"Rewards come from {self.holdout_rows:,} rows held out of the public training table, which programs see without labels."
                f" The score on the private answers ({self.private_rows:,} rows) is only recorded: no prompt, reward or choice saw it."
            )
        return Disclosure(self.reward_source, self.score_rows, self.private_rows, text)


@functools.lru_cache(maxsize=8)
def _load_answers(private: Path, digests: tuple[tuple[str, str], ...], id_column: str, target: str) -> grading.Answers:
    """Reads and checks the answers, once a process."""
    parts = []
    for name, digest in digests:
        path = private / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"The answers {path} cannot be read ({error}). Delete {private.parent} to prepare the task again.") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"The answers {path} changed since they were prepared. Delete {private.parent} to prepare the task again.")
        parts.append(read_text_table(data)[[id_column, target]])
    # Joined as text first, so that types are inferred over all rows at once, as they are in a submission.
    table = read_table(pd.concat(parts).to_csv(index=False).encode())
    private_R = np.arange(len(table)) < len(parts[0])
    return grading.Answers(id_column=id_column, target=target, table=table, private_R=private_R)

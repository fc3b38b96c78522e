"""A prepared task: what prompts show, what programs see, and how it grades. Small, immutable, picklable."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from discover_jax import row_results
from discover_jax.tasks import grading, mle_bench
from discover_jax.tasks.answers import Columns, TextColumns, load_answers
from discover_jax.tasks.competition import Competition, Metric, Threshold
from discover_jax.tasks.interval import Interval, binomial_interval, bootstrap_interval, no_interval
from discover_jax.tasks.loading import load_competition
from discover_jax.types import Grade


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """A public file. `rows` does not count the header; it is None and `columns` is empty for a file that is not a CSV table."""

    name: str
    rows: int | None
    columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """One of the runs behind a program's verdict: what the program sees, and what it is graded on.

    Attributes:
      folder: the only folder that the program sees, by its name in the task's folder.
      answers: (file in private/, sha256) of the private answers, then of the held-out rows' answers and of those for selection if there are
        any.
      held_out_rows: number of rows held out for rewards.
      selection_rows: number of rows held out for the choice of the best program.
    """

    folder: str
    answers: tuple[tuple[str, str], ...]
    held_out_rows: int = 0
    selection_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Disclosure:
    """What signal reached the search; every table and plot of its scores must say so.

    Attributes:
      reward: "grade" or "holdout".
      rows: number of rows behind the score that the search saw.
      runs: how often each program runs for one verdict.
      private_rows: number of rows of the private answers.
      grader: who grades.
      scored_on: a short name of these rows, shown next to each score.
      text: one or two sentences that describe them.
      selection_rows: number of rows that only the choice of the best program sees.
    """

    reward: str
    rows: int
    runs: int
    private_rows: int
    grader: str
    scored_on: str
    text: str
    selection_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A competition, prepared in a folder by `prepare_task`. Other processes can use it: they load the definition and answers when needed.

    Attributes:
      source, source_digest: where the competition's definition is (see `locate_definition`).
      grader: "native" or "mlebench".
      folder: holds public/, private/, and a folder for each fold of a cross-validation.
      reward_source: "grade" or "holdout".
      files: what a program sees (in its first run).
      private_rows: number of private answers.
      splits: a program's runs, in their order. The last one's submission is the program's own.
      fingerprint: hash of the data and of every setting that a grade depends on. Tasks with equal fingerprints give equal grades.
      settings: name and value of each of these settings, to explain why two fingerprints differ.
      text_columns: targets that are text.
    """

    source: str
    source_digest: str
    grader: str
    folder: Path
    reward_source: str
    files: tuple[TaskFile, ...]
    private_rows: int
    splits: tuple[Split, ...]
    fingerprint: str
    settings: tuple[tuple[str, str | int | float | bool], ...]
    text_columns: TextColumns = dataclasses.field(default_factory=TextColumns)

    @property
    def competition(self) -> Competition:
        competition = load_competition(self.source, self.source_digest)
        return mle_bench.with_its_grader(competition) if self.grader == "mlebench" else competition

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
    def calls(self) -> bool:
        """False: programs return a submission."""
        return False

    @property
    def reuse_output(self) -> bool:
        """False: submissions are for the grader only."""
        return False

    @property
    def interface(self) -> str:
        """Empty: all competitions have the same interface, `run()`, which returns a table."""
        return ""

    @property
    def ideas(self) -> tuple[str, ...] | None:
        """None: prompts show the ideas for competitions."""
        return None

    @property
    def packages(self) -> tuple[str, ...]:
        """Empty: prompts name the installed packages for tables and models."""
        return ()

    @property
    def transform(self) -> str:
        return self.competition.transform

    @property
    def thresholds_source(self) -> str:
        return self.competition.thresholds_source

    @property
    def thresholds_note(self) -> str:
        return self.competition.thresholds_note or "The competition's definition has none."

    @property
    def failure_reward(self) -> float:
        return self.competition.failure_reward

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        return self.competition.thresholds

    @property
    def leaderboard(self) -> str:
        """The thresholds with their source and note; "unavailable" if there are none, with the note."""
        competition = self.competition
        listed = ", ".join(f"{threshold.name} {threshold.score:g}" for threshold in competition.thresholds)
        parts = [f"{competition.thresholds_source}: {listed}" if listed else "unavailable", competition.thresholds_note]
        return ". ".join(part for part in parts if part)

    @property
    def public_dirs(self) -> tuple[Path, ...]:
        """For each run of a program, the only folder that it sees."""
        return tuple(self.folder / split.folder for split in self.splits)

    @property
    def public_dir(self) -> Path:
        """The folder that a program sees in its last run, which makes its submission."""
        return self.public_dirs[-1]

    @property
    def held_out_rows(self) -> int:
        """Number of rows held out over all runs; 0 for the reward `grade`."""
        return sum(split.held_out_rows for split in self.splits)

    @property
    def selection_rows(self) -> int:
        """Number of rows that only the choice of the best program sees."""
        return self.splits[-1].selection_rows

    @property
    def noisy(self) -> bool:
        """True: scores depend on which rows they are measured."""
        return True

    @property
    def has_row_results(self) -> bool:
        """Whether grades have the results of single rows."""
        return self.competition.judge is None and self.metric.influence is not None

    @property
    def score_rows(self) -> int:
        """Number of rows behind a `Grade.score`."""
        return self.held_out_rows or self.private_rows

    def prepare_grading(self) -> None:
        """Loads the answers of all runs, as `grade` would.

        Raises:
          DataError: see `grade`.
        """
        for run in range(len(self.splits)):
            self._answers(run)

    def sample(self, run: int) -> bytes:
        """The sample submission of one of a program's runs."""
        return (self.public_dirs[run] / "sample_submission.csv").read_bytes()

    def grade(self, csv: bytes, run: int = -1) -> Grade:
        """The grade of the submission of one of a program's runs. Invalid bytes give an invalid Grade, not an exception.

        Args:
          csv: the submission.
          run: index into `splits`; by default the last, which for most tasks is the only one.

        Raises:
          DataError: the answers are missing or were altered.
        """
        return grading.grade(csv, self._answers(run), self.competition)

    def combine(self, grades: Sequence[Grade]) -> Grade:
        """The grade of a program from the valid grades of all its runs, in the order of `splits`.

        The score is the mean over the runs that have held-out rows, weighted by their number: for a score that is a mean over rows, such as
        accuracy or log loss, the same as the score of all held-out rows together. The private score is that of the last run.

        Raises:
          ValueError: a run lacks a valid grade.
        """
        if len(grades) != len(self.splits) or not all(grade.valid for grade in grades):
            raise ValueError(
                f"Each of the {len(self.splits)} runs must have a valid grade; got {sum(grade.valid for grade in grades)} of {len(grades)}."
            )
        if len(grades) == 1:
            return grades[0]
        scored = [
            (grade.score, split.held_out_rows, grade.rows)
            for grade, split in zip(grades, self.splits, strict=True)
            if grade.score is not None
        ]
        score = sum(score * rows for score, rows, _ in scored) / sum(rows for _, rows, _ in scored)
        rows = row_results.joined([results for _, _, results in scored])
        return Grade(valid=True, reason="", score=round(score, 5), private_score=grades[-1].private_score, rows=rows)

    def answers_as_submission(self, run: int = -1, *, probabilities: bool = False) -> bytes:
        """The answers as a perfect submission of a run, by default the last. For checks of the grader, never for programs.

        Args:
          run: index into `splits`.
          probabilities: see `grading.perfect_submission`.

        Raises:
          DataError: see `grade`.
        """
        return grading.perfect_submission(self._answers(run), probabilities=probabilities)

    @property
    def sample_has_labels(self) -> bool:
        """Whether the sample submission predicts labels that occur in the answers. If not, these may be probabilities."""
        return grading.has_labels(self.sample(-1), self._answers(-1))

    def _answers(self, run: int) -> grading.Answers:
        split, competition = self.splits[run], self.competition
        training = self.folder / split.folder / "train.csv" if split.held_out_rows else None
        counts = self.reward_source == "grade"
        classes = tuple(competition.class_columns.items())
        columns = Columns(competition.id_column, competition.target, classes, self.text_columns)
        return load_answers(self.folder / "private", split.answers, columns, training, counts)

    def score_text(self, score: float) -> str:
        """The score to the five places of MLE-bench."""
        return f"{score:.5f}"

    def reward(self, score: float) -> float:
        """The reward of a score, higher is better."""
        return self.competition.reward(score)

    def signals(self, rewards_K: Sequence[float]) -> list[float]:
        """What advantages use for the rewards of a group; see `Competition.signals`."""
        return self.competition.signals(rewards_K)

    def score_interval(self, score: float, submission: bytes | None) -> Interval:
        """95% interval of a `Grade.score`, or the reason why there is none. It may take seconds, so use it only for the best program.

        Args:
          score: of a program.
          submission: of that program's last run; None if it is not available.

        Raises:
          DataError: see `grade`.
        """
        if self.reward_source == "holdout" and len(self.splits) > 1 and not self.metric.proportion:
            return no_interval(
                f"{self.metric.name} is not a share of rows, so its interval needs the predictions of all {len(self.splits) - 1} folds;"
                " only the last run's submission is kept"
            )
        return self._interval(score, submission, held_out=self.reward_source == "holdout")

    def private_score_interval(self, score: float, submission: bytes | None) -> Interval:
        """95% interval of a `Grade.private_score`; see `score_interval`."""
        return self._interval(score, submission, held_out=False)

    def _interval(self, score: float, submission: bytes | None, *, held_out: bool) -> Interval:
        if self.metric.proportion:
            return binomial_interval(score, self.score_rows if held_out else self.private_rows)
        if self.competition.judge is not None:
            return no_interval(f"{self.metric.name} is computed by {self.competition.judge_version}, which grades only whole tables")
        if submission is None:
            return no_interval("the program's submission is missing; a score that is not a share of rows needs it")
        grade = self.grade(submission)
        if score != (grade.score if held_out or self.reward_source == "grade" else grade.private_score):
            return no_interval("the submission has a different score, so it belongs to another program")
        answers_R, predictions_R = grading.scored_rows(submission, self._answers(-1), held_out=held_out)
        return bootstrap_interval(self.metric, answers_R, predictions_R)

    @property
    def disclosure(self) -> Disclosure:
        if self.reward_source == "grade":
            scored_on = f"{self.private_rows:,} rows of the private answers"
            text = (
                f"Rewards come from the private answers ({self.private_rows:,} rows), and so do the reported scores. The search"
                " optimised on the graded rows, so its best score is too optimistic for unseen data."
            )
        else:
            folds = len(self.splits) - 1
            scored_on = f"{self.score_rows:,} training rows" + (f", each held out in one of {folds} folds" if folds else " held out")
            source = (
                f"{folds}-fold cross-validation over the public training table ({self.score_rows:,} rows): in a run for each fold programs"
                " see its rows without labels, and in one more the whole table, for the submission"
                if folds
                else f"{self.score_rows:,} rows held out of the public training table, which programs see without labels"
            )
            selection = (
                f" Another {self.selection_rows:,} held-out rows served only for the choice of the best program."
                if self.selection_rows
                else ""
            )
            text = (
                f"Rewards come from {source}.{selection} The score on the private answers ({self.private_rows:,} rows) is only recorded: no"
                " prompt, reward or choice saw it."
            )
        grader = "native" if self.competition.judge is None else self.competition.judge_version
        rows = (self.score_rows, len(self.splits), self.private_rows)
        return Disclosure(self.reward_source, *rows, grader, scored_on, text, self.selection_rows)

"""A problem, prepared in a folder: what prompts show, what programs see, and how solutions are checked. See `task.Task`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from discover_jax.tasks.competition import Threshold
from discover_jax.tasks.interval import Interval, no_interval
from discover_jax.tasks.loading import load_problem
from discover_jax.tasks.prepared_folder import definition_digests
from discover_jax.tasks.problem import Evaluation, Problem, Program
from discover_jax.tasks.rewards import TRANSFORMS, Score, reward_of, signals_of
from discover_jax.tasks.task import Disclosure, TaskFile

DESCRIPTION = "problem.md"
"""The file in data/ with the problem's description."""


@dataclasses.dataclass(frozen=True)
class ProblemTask:
    """A problem, prepared by `prepare_task`. Small, immutable, picklable: other processes load the definition when needed.

    Attributes:
      source, source_digest: where the problem's definition is (see `locate_definition`).
      folder: holds public/, which programs see.
      fingerprint, settings: see `task.Task`.
      reuse_output: see `Problem.reuse_output`; the config may differ from the problem.
    """

    source: str
    source_digest: str
    folder: Path
    fingerprint: str
    settings: tuple[tuple[str, str | int | float | bool], ...]
    reuse_output: bool = False

    calls = True
    reward_source = "evaluate"
    private_rows = 0
    score_rows = 0
    selection_rows = 0
    has_row_results = False
    thresholds_note = ""

    @property
    def problem(self) -> Problem:
        return load_problem(self.source, self.source_digest)

    @property
    def id(self) -> str:
        return self.problem.id

    @property
    def description(self) -> str:
        return self.problem.description

    @property
    def interface(self) -> str:
        return self.problem.interface

    @property
    def ideas(self) -> tuple[str, ...] | None:
        return self.problem.ideas

    @property
    def packages(self) -> tuple[str, ...]:
        return self.problem.packages

    @property
    def metric(self) -> Score:
        return Score(self.problem.score_name, self.problem.higher_is_better)

    @property
    def transform(self) -> str:
        return self.problem.transform

    @property
    def failure_reward(self) -> float:
        return self.problem.failure_reward

    @property
    def files(self) -> tuple[TaskFile, ...]:
        return tuple(TaskFile(name, None, ()) for name in sorted(self.problem.files))

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        return tuple(Threshold(record.name, record.score) for record in self.problem.records)

    @property
    def thresholds_source(self) -> str:
        return "; ".join(dict.fromkeys(record.source for record in self.problem.records))

    @property
    def leaderboard(self) -> str:
        """The published records with their sources; "unavailable" if there are none."""
        return ", ".join(f"{record.name} {record.score:.12g} ({record.source})" for record in self.problem.records) or "unavailable"

    @property
    def public_dirs(self) -> tuple[Path, ...]:
        return (self.folder / "public",)

    @property
    def evaluate_seconds(self) -> float:
        return self.problem.evaluate_seconds

    @property
    def evaluate_gib(self) -> float:
        return self.problem.evaluate_gib

    @property
    def hidden_inputs(self) -> bool:
        return self.problem.hidden_inputs

    @property
    def noisy(self) -> bool:
        return self.problem.noisy

    @property
    def least_score(self) -> float:
        return TRANSFORMS[self.problem.transform].at_least

    def evaluate(self, program: Program) -> Evaluation:
        """See `Problem.evaluate`."""
        return self.problem.evaluate(program)

    def score_text(self, score: float) -> str:
        """The score with all of its digits."""
        return repr(score)

    def reward(self, score: float) -> float:
        """The reward of a score, higher is better."""
        return reward_of(score, self.transform, self.metric.higher_is_better, self.failure_reward)

    def signals(self, rewards_K: Sequence[float]) -> list[float]:
        """What advantages use for the rewards of a group."""
        return signals_of(rewards_K, self.transform)

    def score_interval(self, score: float, submission: bytes | None) -> Interval:
        del score, submission
        return no_interval("evaluate() checks the solution itself, not a sample of rows")

    def private_score_interval(self, score: float, submission: bytes | None) -> Interval:
        return self.score_interval(score, submission)

    @property
    def disclosure(self) -> Disclosure:
        text = (
            "Rewards come from the problem's evaluate(), which checks each solution, and so do the reported scores. The search optimised"
            " this score."
        )
        if self.reuse_output:
            text += " A program may read the value that its parent returned, so it may owe its score to earlier programs."
        return Disclosure(self.reward_source, 0, 1, 0, "evaluate() of the problem", "checked by evaluate()", text)


def write_public(problem: Problem, public: Path) -> None:
    """Writes the files that programs see: the description, and the problem's own files."""
    for name, text in {**problem.files, DESCRIPTION: f"# {problem.id}\n\n{problem.description}\n"}.items():
        (public / name).write_text(text)


def problem_settings(problem: Problem, digest: str, version: int) -> dict[str, str | int | float | bool]:
    """All settings that a score depends on."""
    reuse = {"reuse_output": True} if problem.reuse_output else {}  # without it, as in earlier versions
    return {
        **reuse,
        "format": version,
        "problem": problem.id,
        **definition_digests(digest),
        "score_name": problem.score_name,
        "higher_is_better": problem.higher_is_better,
        "transform": problem.transform,
        "failure_reward": problem.failure_reward,
        "hidden_inputs": problem.hidden_inputs,
        "evaluate_seconds": problem.evaluate_seconds,
        "evaluate_gib": problem.evaluate_gib,
    }

"""Prepares one task: the competition's tables or the problem's files."""

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from discover_jax.exceptions import ConfigError, DataError, DiscoverError
from discover_jax.files import storage_remedy
from discover_jax.tasks import mle_bench
from discover_jax.tasks.answers import TextColumns
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.holdout import hold_out_part, make_folds
from discover_jax.tasks.loading import load_definition, locate_definition
from discover_jax.tasks.own_files import own_files
from discover_jax.tasks.prepared_folder import STRATIFIED, TEXT_ENTRIES, definition_digests, fingerprint, prepared_record
from discover_jax.tasks.prepared_tables import check_ids, check_tables, describe_tables, text_columns, warn_of_hidden_labels, warn_of_types
from discover_jax.tasks.problem import Problem
from discover_jax.tasks.problem_task import ProblemTask, problem_settings, write_public
from discover_jax.tasks.tables import read_text_table
from discover_jax.tasks.task import Split, Task, TaskFile

AnyTask = Task | ProblemTask
"""What a run works on; groups of rollouts take turns."""
REWARDS = ("grade", "holdout")
GRADERS = ("native", "mlebench")
REUSES = ("problem", "on", "off")
# Increase it when the rules of preparation or grading change, so that earlier folders and cached grades are not reused.
_FORMAT = 2


def prepare_task(
    competition: str,
    *,
    raw: str | os.PathLike[str] | None,
    reward: str,
    folder: Path,
    holdout_fraction: float = 0.2,
    holdout_folds: int = 1,
    selection_fraction: float = 0.0,
    grader: str = "native",
    reuse_output: str = "problem",
    stratified: bool = True,
    seed: int = 0,
) -> AnyTask:
    """Prepares a competition or a problem in `folder`, or checks every file if it is already prepared there.

    `folder` gets public/ (readable by all; what programs see), private/ (readable only by the owner; the answers) and prepared.json
    (settings and checksums). All are put in place by one rename. A prepared folder no longer needs the raw data. Of a problem, there are no
    answers, and the settings of rows and graders do not apply.

    Args:
      competition: id of a built-in competition or problem, path of a .py file that defines COMPETITION or PROBLEM, or "mlebench:ID".
      raw: path of the raw data; None or "" if there are none.
      reward: "grade": scores come from the private answers. "holdout": scores come from random rows of the training table. These rows move
        from train.csv to test.csv, shuffled in and without their label, and their ids are added to sample_submission.csv.
      folder: empty, missing, or prepared before with the same settings.
      holdout_fraction: fraction of the training rows that "holdout" holds out.
      holdout_folds: 2 or more: number of folds into which "holdout" splits all training rows instead. Each fold is held out in one run of a
        program, in its own folder fold-N/; one more run, on the whole public/, makes the submission.
      selection_fraction: fraction of the training rows that "holdout" holds out in addition, for the choice of the best program. No reward
        and no prompt depends on them.
      grader: "native", or "mlebench" for the installed package's grader of this competition.
      reuse_output: "problem": as the problem says; "on" or "off": instead of what it says. See `Problem.reuse_output`.
      stratified: whether "holdout" draws the rows of each class in proportion, if the labels are classes; see `holdout.strata`. A folder
        that was prepared without this keeps its rows.
      seed: for drawing and shuffling the rows of "holdout".

    Raises:
      ConfigError: unknown competition or reward, fraction out of range, or invalid competition file.
      DataError: the raw data are missing or altered; `folder` holds something else, was altered, or cannot be written.
    """
    if reward not in REWARDS:
        raise ConfigError(f"config.task.reward must be one of {', '.join(REWARDS)}; got {reward!r}.")
    if reward == "holdout" and not 0.0 < holdout_fraction < 1.0:
        raise ConfigError(f"config.task.holdout_fraction must be greater than 0 and less than 1; got {holdout_fraction!r}.")
    if holdout_folds < 1 or (holdout_folds > 1 and reward != "holdout"):
        raise ConfigError(
            f"config.task.holdout_folds must be at least 1, and 1 without the reward `holdout`; got {holdout_folds!r} with"
            f" config.task.reward = {reward!r}."
        )
    if selection_fraction and (reward != "holdout" or holdout_folds > 1 or not 0.0 < selection_fraction < 1.0 - holdout_fraction):
        raise ConfigError(
            "config.task.selection_fraction requires config.task.reward = 'holdout' without folds, and must be at least 0 and less than"
            f" 1 - config.task.holdout_fraction; got {selection_fraction!r} with config.task.reward = {reward!r},"
            f" config.task.holdout_fraction = {holdout_fraction!r} and config.task.holdout_folds = {holdout_folds!r}."
        )
    if grader not in GRADERS:
        raise ConfigError(f"config.task.grader must be one of {', '.join(GRADERS)}; got {grader!r}.")
    source, digest = locate_definition(competition)
    definition = load_definition(source, digest)
    folder = Path(os.path.abspath(folder))
    if isinstance(definition, Problem):
        if raw:
            raise ConfigError(f"config.task.raw = {str(raw)!r}: the problem {definition.id!r} has no raw data. Leave it empty.")
        return _prepare_problem(_with_reuse(definition, reuse_output), source, digest, folder)
    if grader == "mlebench":
        definition = mle_bench.with_its_grader(definition)
    if reward == "holdout" and not definition.id_column:
        raise ConfigError(
            f"Competition {definition.id!r} does not support the reward `holdout`: only its grader knows the format of its answers. Set"
            " config.task.reward = 'grade', or define the competition in a file of your own (docs/competitions.md)."
        )
    settings = _settings(definition, digest, reward, holdout_fraction, holdout_folds, selection_fraction, seed, stratified=stratified)
    record = prepared_record(folder, settings, _writer(definition, Path(raw).expanduser() if raw else None, settings))
    try:
        task = _task(source, digest, grader, folder, record)
    except OSError as error:
        raise DataError(f"Cannot read the task in {folder}: {error}. {storage_remedy(error)} Or choose another folder.") from error
    check_ids(task)
    _check_sample(task)
    return task


def _with_reuse(problem: Problem, reuse_output: str) -> Problem:
    """The problem with the config's choice of `reuse_output`."""
    if reuse_output not in REUSES:
        raise ConfigError(f"config.task.reuse_output must be one of {', '.join(REUSES)}; got {reuse_output!r}.")
    if reuse_output == "problem":
        return problem
    try:
        return dataclasses.replace(problem, reuse_output=reuse_output == "on")
    except ConfigError as error:
        raise ConfigError(f"config.task.reuse_output = {reuse_output!r}: {error} Use 'problem' or 'off'.") from error


def _check_packages(problem: Problem) -> None:
    """Raises ConfigError if a package that programs may need is not installed."""
    missing = []
    for name in problem.packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"Problem {problem.id!r}: packages names {', '.join(missing)}, not installed in this Python. Run `pip install"
            f" {' '.join(missing)}` on all hosts, or remove them from the problem's definition."
        )


def _prepare_problem(problem: Problem, source: str, digest: str, folder: Path) -> ProblemTask:
    _check_packages(problem)
    settings = problem_settings(problem, digest, _FORMAT)

    def write(work: Path) -> dict[str, Any]:
        (work / "public").mkdir()
        write_public(problem, work / "public")
        return {}

    record = prepared_record(folder, settings, write)
    return ProblemTask(source, digest, folder, fingerprint(record), tuple(settings.items()), problem.reuse_output)


def _settings(
    definition: Competition, digest: str, reward: str, fraction: float, folds: int, selection: float, seed: int, *, stratified: bool
) -> dict[str, Any]:
    """All settings that a grade depends on, in addition to the data."""
    holdout: dict[str, Any] = {}
    if reward == "holdout":
        holdout = {"holdout_folds": folds, "seed": seed} if folds > 1 else {"holdout_fraction": fraction, "seed": seed}
        if selection:
            holdout["selection_fraction"] = selection
        if stratified:
            holdout[STRATIFIED] = True
    return {
        "format": _FORMAT,
        "competition": definition.id,
        **definition_digests(digest),
        "id_column": definition.id_column,
        "target": definition.target if isinstance(definition.target, str) else json.dumps(definition.target),
        "metric": definition.metric.name,
        "higher_is_better": definition.metric.higher_is_better,
        "transform": definition.transform,
        "failure_reward": definition.failure_reward,
        "judge": definition.judge_version,
        "reward": reward,
        **({"classes": json.dumps(definition.class_columns)} if definition.classes else {}),
        **holdout,
    }


def _writer(definition: Competition, raw: Path | None, settings: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """The function that writes the tables of a competition."""

    def write(work: Path) -> dict[str, Any]:
        public, private = work / "public", work / "private"
        public.mkdir()
        private.mkdir(mode=0o700)
        _run_prepare(definition, raw, public, private)
        own_files(work)
        check_tables(definition, public, private)
        for name, expected in definition.prepared_md5.items():
            found = hashlib.md5((work / name).read_bytes(), usedforsecurity=False).hexdigest()
            if found != expected:
                raise DataError(
                    f"{definition.id}: the prepared {name} has MD5 {found}, expected {expected}, although the raw data are correct. The"
                    f" installed pandas ({pd.__version__}) or scikit-learn prepares it differently. Install the versions in constraints/."
                )
        if definition.judge is not None:
            warn_of_types(definition, public, private)
        text = text_columns(definition, public, private if settings["reward"] == "grade" else None)
        warn_of_hidden_labels(definition, public, text)
        stratified = settings.get(STRATIFIED, False)
        if "holdout_folds" in settings:
            make_folds(definition, work, settings["holdout_folds"], settings["seed"], stratified=stratified)
        elif settings["reward"] == "holdout":
            fractions = settings["holdout_fraction"], settings.get("selection_fraction", 0.0)
            hold_out_part(definition, work, *fractions, settings["seed"], stratified=stratified)
        entries = dict(zip(TEXT_ENTRIES, (list(text.answers), list(text.predictions)), strict=True))
        return {"tables": describe_tables(work / _shown(settings)[0]), **entries}

    return write


def _run_prepare(definition: Competition, raw: Path | None, public: Path, private: Path) -> None:
    try:
        definition.prepare(raw, public, private)
    except DiscoverError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        given = f"raw data {raw}" if raw else "no raw data (config.task.raw is empty)"
        raise DataError(
            f"Competition {definition.id!r}: its prepare() failed with {given}: {type(error).__name__}: {error}. Check the path in"
            " config.task.raw, then the competition's file."
        ) from error


def _shown(settings: dict[str, Any]) -> list[str]:
    """Names of the folders that programs see, one for each run of a program."""
    return [*(f"fold-{fold + 1}" for fold in range(settings.get("holdout_folds", 0))), "public"]


def _task(source: str, digest: str, grader: str, folder: Path, record: dict[str, Any]) -> Task:
    settings, files = record["settings"], record["files"]
    text = {name: tuple(record.get(name, ())) for name in TEXT_ENTRIES}

    def rows(name: str) -> int:
        return len(read_text_table((folder / "private" / name).read_bytes()))

    def split(shown: str) -> Split:
        names = ["test.csv"]
        if settings["reward"] == "holdout" and (shown != "public" or "holdout_folds" not in settings):
            names.append("holdout.csv" if shown == "public" else f"{shown}.csv")
        if "selection_fraction" in settings:
            names.append("selection.csv")
        counts = [rows(name) for name in names[1:]]
        return Split(shown, tuple((name, files[f"private/{name}"]) for name in names), *counts)

    return Task(
        source=source,
        source_digest=digest,
        grader=grader,
        folder=folder,
        reward_source=settings["reward"],
        files=tuple(TaskFile(table["name"], table["rows"], tuple(table["columns"])) for table in record["tables"]),
        private_rows=rows("test.csv"),
        splits=tuple(split(shown) for shown in _shown(settings)),
        fingerprint=fingerprint(record),
        settings=(*settings.items(), *((name, ", ".join(columns)) for name, columns in text.items() if columns)),
        text_columns=TextColumns(*text.values()),
    )


def _check_sample(task: Task) -> None:
    """Checks that the sample submission is valid and better than a failure; otherwise the metric or the failure reward is wrong."""
    grades = [task.grade(task.sample(run), run) for run in range(len(task.splits))]
    grade = next((grade for grade in grades if not grade.valid), None) or task.combine(grades)
    if grade.score is None:
        raise ConfigError(f"Competition {task.id!r}: its own sample_submission.csv is not valid: {grade.reason}")
    reward = task.reward(grade.score)
    if not task.failure_reward < reward:
        raise ConfigError(
            f"Competition {task.id!r}: failure_reward = {task.failure_reward} must be below the reward of the sample submission, {reward}"
            f" ({task.metric.name} {grade.score}). Otherwise failing would be the best strategy."
        )

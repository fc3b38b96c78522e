"""The optional `mlebench` package: its graders, its competitions from data that lie on this machine, and its leaderboards if they are real.

The package is imported when first asked for, and only what is needed: its registry and a competition's own modules. Neither Kaggle's
credentials nor a network are.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import inspect
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks.competition import Competition, Metric, Threshold
from discover_jax.tasks.tables import read_table

_SOURCE = "from the leaderboard in the installed mlebench"
PREFIX = "mlebench:"
"""Before an id in config.task.competition: one of MLE-bench's competitions, with its own preparation and grader."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def with_its_grader(competition: Competition) -> Competition:
    """The competition with the installed package's grader of the same id as its judge, and its leaderboard's thresholds if that is real.

    If it is not, the competition's own thresholds stay.

    Raises:
      ConfigError: the package is not installed, or has no such competition.
    """
    theirs = _theirs(competition.id)
    thresholds, note, _ = _leaderboard(theirs)
    judged = dataclasses.replace(competition, judge=_judge(theirs), judge_version=_version(theirs))
    if not thresholds:
        return dataclasses.replace(judged, thresholds_note=competition.thresholds_note or note)
    return dataclasses.replace(judged, thresholds=thresholds, thresholds_source=_SOURCE, thresholds_note=note)


def mlebench_competition(
    id: str, *, higher_is_better: bool | None = None, proportion: bool = False, failure_reward: float = 0.0, transform: str | None = None
) -> Competition:
    """One of MLE-bench's competitions, from data that lie on this machine; for a file that defines COMPETITION, or for "mlebench:ID".

    config.task.raw is MLE-bench's data folder (empty: the package's default), in which ID/prepared/ was made by `mlebench prepare`, or
    ID/raw/ holds the raw files, from which the package prepares it. The public files are copied to the run's folder.

    Args:
      id: as MLE-bench has it.
      higher_is_better: the metric's direction; None takes it from the competition's leaderboard, if that is real.
      proportion: whether the score is a share of rows that were right; see Metric.
      failure_reward: reward of a program that fails; must be below that of the sample submission.
      transform: from score to reward; by default the plain one of the direction.

    Raises:
      ConfigError: the package is not installed, has no such competition, or does not tell the direction.
    """
    theirs = _theirs(id)
    thresholds, note, direction = _leaderboard(theirs)
    higher = direction if higher_is_better is None else higher_is_better
    if higher is None:
        raise ConfigError(
            f"MLE-bench tells which scores of {id!r} are better by its leaderboard alone, which is unavailable: {note} Install the package"
            " with its Git-LFS files, or write a file with COMPETITION = mlebench_competition(ID, higher_is_better=...), which"
            " docs/competitions.md shows, and give its path as config.task.competition."
        )
    name = theirs.grader.name
    return Competition(
        id=id,
        description=theirs.description,
        id_column="",
        target="",
        metric=Metric(name, higher_is_better=higher, function=_no_function, proportion=proportion),
        prepare=functools.partial(_prepare, id),
        failure_reward=failure_reward,
        transform=("identity" if higher else "negate") if transform is None else transform,
        thresholds=thresholds,
        thresholds_source=_SOURCE,
        thresholds_note=note,
        judge=_judge(theirs),
        judge_version=_version(theirs),
    )


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """The package's modules set up the root logger for themselves when they are imported; this takes that back."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def _theirs(id: str, data: Path | None = None) -> Any:
    """The package's own Competition; its data lie in `data`, or where the package keeps them.

    Raises:
      ConfigError: the package is not installed, lacks something, or has no such competition.
    """
    with _root_logger_kept():
        try:
            from mlebench.registry import registry  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"MLE-bench's grader was asked for, but the package `mlebench` cannot be imported ({error}). It is not on the package"
                " index: install it from its repository, openai/mle-bench, into this environment; or use config.task.grader ="
                " 'native', which follows the same rules."
            ) from error
        if id not in (known := registry.list_competition_ids()):
            close = difflib.get_close_matches(id, known, n=3)
            raise ConfigError(
                f"The installed mlebench has no competition {id!r} among its {len(known)}."
                + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
            )
        try:
            return (registry if data is None else registry.set_data_dir(data)).get_competition(id)
        except ImportError as error:
            raise ConfigError(f"The installed mlebench cannot load its competition {id!r}: {error}. Install what it needs.") from error


def _judge(theirs: Any) -> Callable[[pd.DataFrame, pd.DataFrame], float]:
    # Not the grader itself, which turns whatever goes wrong into None and a line in a log: the reason must reach the program's author.
    return theirs.grader.grade_fn


def _no_function(*_: object) -> float:
    raise AssertionError("MLE-bench's grader judges whole tables")


def _version(theirs: Any) -> str:
    """Package, version, and the beginning of the hash of the grader's source: two checkouts of one version may differ."""
    source = hashlib.sha256(inspect.getsource(inspect.getmodule(theirs.grader.grade_fn) or theirs.grader.grade_fn).encode()).hexdigest()
    try:
        version = importlib.metadata.version("mlebench")
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        version = "of unknown version"
    return f"mlebench {version} (grader {source[:12]})"


def _leaderboard(theirs: Any) -> tuple[tuple[Threshold, ...], str, bool | None]:
    """Thresholds, what they are or why there are none, and whether higher is better; None if that is not known."""
    path = Path(theirs.leaderboard)
    try:
        data = path.read_bytes()
    except OSError as error:
        return (), f"the installed mlebench has no leaderboard of it ({error}).", None
    if data.startswith(_LFS_POINTER):
        return (), "the installed mlebench has only a Git-LFS pointer to it, not the file.", None
    try:
        table = read_table(data)
        ranks = theirs.grader.rank_score(None, table)
        lower = bool(theirs.grader.is_lower_better(table))
    except Exception as error:
        return (), f"{path.name} cannot be read as one ({type(error).__name__}: {error}).", None
    names = ("median", "bronze", "silver", "gold")
    thresholds = tuple(Threshold(f"Kaggle {name}", float(ranks[f"{name}_threshold"])) for name in names)
    note = (
        f"These are MLE-bench's, from Kaggle's private leaderboard of {len(table):,} teams, which Kaggle scored on hidden rows of its own;"
        " here the score is on the rows that MLE-bench splits off. So the comparison is only indicative."
    )
    return thresholds, note, not lower


def _prepare(id: str, raw: Path | None, public: Path, private: Path) -> None:
    theirs = _theirs(id, raw)
    if theirs.public_dir.is_dir() and theirs.private_dir.is_dir():
        shutil.copytree(theirs.public_dir, public, dirs_exist_ok=True)
        shutil.copytree(theirs.private_dir, private, dirs_exist_ok=True)
    elif theirs.raw_dir.is_dir():
        with _root_logger_kept():
            theirs.prepare_fn(raw=theirs.raw_dir, public=public, private=private)
    else:
        raise DataError(
            f"There are no data of MLE-bench's {id!r} in {theirs.raw_dir.parent}: neither prepared/ nor raw/. Run `mlebench prepare -c"
            f" {id}`, or put the raw files there; config.task.raw names another data folder than the package's own."
        )
    answers = private / Path(theirs.answers).relative_to(theirs.private_dir)
    if answers.suffix != ".csv":
        raise ConfigError(f"The answers of MLE-bench's {id!r} are a {answers.suffix} file; only tables (.csv) can be graded here.")
    sample = public / Path(theirs.sample_submission).relative_to(theirs.public_dir)
    for given, wanted in ((answers, private / "test.csv"), (sample, public / "sample_submission.csv")):
        if given != wanted:
            shutil.copyfile(given, wanted)

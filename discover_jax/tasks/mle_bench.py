"""The optional `mlebench` package: its graders, its competitions from local data, and its leaderboards if their files are present.

Only the package's registry and a competition's own modules are imported, on first use. Neither Kaggle credentials nor a network are needed.
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
"""Prefix of an id in config.task.competition: selects a competition of MLE-bench with its own preparation and grader."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def with_its_grader(competition: Competition) -> Competition:
    """The competition with the package's grader of the same id as its judge, and with the thresholds of the package's leaderboard.

    If the leaderboard's file is missing, the competition keeps its own thresholds.

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
    """A competition of MLE-bench from local data; for a file that defines COMPETITION, or for "mlebench:ID".

    config.task.raw is MLE-bench's data folder (empty: the package's default). It has either ID/prepared/, written by `mlebench prepare`, or
    ID/raw/ with the raw files, which the package then prepares. The public files are copied to the run directory.

    Args:
      id: MLE-bench's id of the competition.
      higher_is_better: the metric's direction; None takes it from the competition's leaderboard, if its file is present.
      proportion: whether the score is a share of correct rows; see Metric.
      failure_reward: reward of a program that fails; must be below that of the sample submission.
      transform: from score to reward; None: "identity" if higher is better, otherwise "negate".

    Raises:
      ConfigError: the package is not installed, has no such competition, or does not define the direction.
    """
    theirs = _theirs(id)
    thresholds, note, direction = _leaderboard(theirs)
    higher = direction if higher_is_better is None else higher_is_better
    if higher is None:
        raise ConfigError(
            f"Only MLE-bench's leaderboard says which scores of {id!r} are better, and it is unavailable: {note} Install the package"
            " with its Git-LFS files. Or write a file with COMPETITION = mlebench_competition(ID, higher_is_better=...), as shown in"
            " docs/competitions.md, and set config.task.competition to its path."
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
    """Restores the root logger, which the package's modules configure when they are imported."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def _theirs(id: str, data: Path | None = None) -> Any:
    """The package's own Competition object, with its data in `data` or, if None, in the package's default folder.

    Raises:
      ConfigError: the package is not installed, lacks something, or has no such competition.
    """
    with _root_logger_kept():
        try:
            from mlebench.registry import registry  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"MLE-bench's grader is requested, but the package `mlebench` cannot be imported ({error}). It is not on the package"
                " index: install it from its repository, openai/mle-bench, into this environment. Or use config.task.grader ="
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
            raise ConfigError(
                f"The installed mlebench cannot load its competition {id!r}: {error}. Install the missing package."
            ) from error


def _judge(theirs: Any) -> Callable[[pd.DataFrame, pd.DataFrame], float]:
    # Not the grader itself: it turns every error into None and a log line, but the model must see the reason.
    return theirs.grader.grade_fn


def _no_function(*_: object) -> float:
    raise AssertionError("MLE-bench's grader grades only whole tables")


def _version(theirs: Any) -> str:
    """Package version and the first digits of the hash of the grader's source: two checkouts of one version may differ."""
    source = hashlib.sha256(inspect.getsource(inspect.getmodule(theirs.grader.grade_fn) or theirs.grader.grade_fn).encode()).hexdigest()
    try:
        version = importlib.metadata.version("mlebench")
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        version = "of unknown version"
    return f"mlebench {version} (grader {source[:12]})"


def _leaderboard(theirs: Any) -> tuple[tuple[Threshold, ...], str, bool | None]:
    """Thresholds, a note on them or on why there are none, and whether higher is better (None if unknown)."""
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
            f"MLE-bench's {id!r} has no data in {theirs.raw_dir.parent}: neither prepared/ nor raw/ exists. Run `mlebench prepare -c"
            f" {id}`, or put the raw files there. To use another data folder, set config.task.raw."
        )
    answers = private / Path(theirs.answers).relative_to(theirs.private_dir)
    if answers.suffix != ".csv":
        raise ConfigError(f"The answers of MLE-bench's {id!r} are a {answers.suffix} file; only .csv tables are supported.")
    sample = public / Path(theirs.sample_submission).relative_to(theirs.public_dir)
    for given, wanted in ((answers, private / "test.csv"), (sample, public / "sample_submission.csv")):
        if given != wanted:
            shutil.copyfile(given, wanted)

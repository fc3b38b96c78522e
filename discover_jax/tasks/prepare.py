"""Preparing a task: the competition's tables are written once, checked, and found again by their checksums."""

import errno
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discover_jax.exceptions import ConfigError, DataError, DiscoverError
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.loading import load_competition, locate_competition
from discover_jax.tasks.tables import read_text_table
from discover_jax.tasks.task import Task, TaskFile

REWARDS = ("grade", "holdout")
_RECORD = "prepared.json"
# Raised when the rules of preparing or grading change, so that earlier folders and cached grades are not taken for the same.
_FORMAT = 1
_PUBLIC_TABLES = ("train.csv", "test.csv", "sample_submission.csv")


def prepare_task(
    competition: str, *, raw: str | os.PathLike[str] | None, reward: str, folder: Path, holdout_fraction: float = 0.2, seed: int = 0
) -> Task:
    """Prepares a competition in `folder`, or finds it prepared there and checks every file.

    `folder` gets public/ (readable by all: what programs see), private/ (the owner's alone: the answers) and prepared.json (settings and
    checksums, written with the rest in one rename). A prepared folder needs the raw data no more.

    Args:
      competition: id of a built-in competition, or path of a .py file that defines COMPETITION.
      raw: path of the raw data; None or "" if there are none.
      reward: "grade": the private answers make the score. "holdout": rows drawn from the training table do: they leave train.csv and join
        test.csv without their label, shuffled in, and their ids join sample_submission.csv.
      folder: empty or not there yet, or prepared before with the same settings.
      holdout_fraction: part of the training rows that "holdout" takes.
      seed: of the draw and the shuffle of "holdout".

    Raises:
      ConfigError: unknown competition or reward, fraction out of range, or the competition's file does not do what it should.
      DataError: raw data missing or altered; `folder` holds something else, or was altered; it cannot be written.
    """
    if reward not in REWARDS:
        raise ConfigError(f"config.task.reward = {reward!r} is not known; allowed: {', '.join(REWARDS)}.")
    if reward == "holdout" and not 0.0 < holdout_fraction < 1.0:
        raise ConfigError(f"config.task.holdout_fraction = {holdout_fraction!r} must lie between 0 and 1, both excluded.")
    source, digest = locate_competition(competition)
    definition = load_competition(source, digest)
    settings = _settings(definition, digest, reward, holdout_fraction, seed)
    folder = Path(os.path.abspath(folder))
    try:
        if not (folder / _RECORD).exists():
            _build(definition, Path(raw).expanduser() if raw else None, folder, settings)
        record = _read_record(folder, settings)
        task = _task(source, digest, folder, record)
    except OSError as error:
        raise DataError(f"The task cannot be prepared in {folder}: {error}. Free some space, or choose another folder.") from error
    _check_sample(task)
    return task


def _settings(definition: Competition, digest: str, reward: str, fraction: float, seed: int) -> dict[str, Any]:
    """Everything beside the data that a grade depends on."""
    holdout = {"holdout_fraction": fraction, "seed": seed} if reward == "holdout" else {}
    return {
        "format": _FORMAT,
        "competition": definition.id,
        "definition_sha256": digest,
        "id_column": definition.id_column,
        "target": definition.target,
        "metric": definition.metric.name,
        "higher_is_better": definition.metric.higher_is_better,
        "transform": definition.transform,
        "failure_reward": definition.failure_reward,
        "reward": reward,
        **holdout,
    }


def _build(definition: Competition, raw: Path | None, folder: Path, settings: dict[str, Any]) -> None:
    """Writes everything beside `folder`, then renames it there: a killed run leaves no half of it behind."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not a task's folder: it has no {_RECORD}, but is not empty. Choose another folder, or empty it.")
    work = folder.with_name(folder.name + ".preparing")
    if work.exists():  # left by a killed run
        shutil.rmtree(work)
    public, private = work / "public", work / "private"
    try:
        public.mkdir(parents=True)
        private.mkdir(mode=0o700)
        _run_prepare(definition, raw, public, private)
        _check_tables(definition, public, private)
        for name, expected in definition.prepared_md5.items():
            found = hashlib.md5((work / name).read_bytes(), usedforsecurity=False).hexdigest()
            if found != expected:
                raise DataError(
                    f"{definition.id}: the prepared {name} has MD5 {found}, expected {expected}, though the raw data are right. The"
                    f" installed pandas ({pd.__version__}) or scikit-learn prepares it otherwise; install the versions in constraints/."
                )
        if settings["reward"] == "holdout":
            _hold_out(definition, public, private, settings["holdout_fraction"], settings["seed"])
        record = {"settings": settings, "files": _checksums(work), "tables": _describe_tables(public)}
        (work / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        _set_modes(work)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


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


def _check_tables(definition: Competition, public: Path, private: Path) -> None:
    """Refuses a preparation that broke its promise, before anything is built on it."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"Competition {definition.id!r}: its prepare() {problem} docs/competitions.md says what it must write.")

    tables = {}
    for path in [*(public / name for name in _PUBLIC_TABLES), private / "test.csv"]:
        name = f"{path.parent.name}/{path.name}"
        if not path.is_file():
            raise refuse(f"did not write {name}.")
        table = tables[name] = read_text_table(path.read_bytes())
        wanted = {definition.id_column} | (set() if name == "public/test.csv" else {definition.target})
        if missing := wanted - set(table.columns):
            raise refuse(f"wrote {name} without {', '.join(sorted(missing))}.")
        if name != "public/train.csv" and not len(table):
            raise refuse(f"wrote {name} without a row.")
    if definition.target in tables["public/test.csv"].columns:
        raise refuse(f"wrote the target {definition.target!r} into public/test.csv, where every program could read it.")
    ids = {name: sorted(table[definition.id_column]) for name, table in tables.items() if name != "public/train.csv"}
    if len(set(ids["private/test.csv"])) < len(ids["private/test.csv"]) or "" in ids["private/test.csv"]:
        raise refuse("wrote private/test.csv with ids that are empty or repeat.")
    for name in ("public/test.csv", "public/sample_submission.csv"):
        if ids[name] != ids["private/test.csv"]:
            raise refuse(f"wrote {name} with other ids than private/test.csv.")
    if (tables["private/test.csv"][definition.target] == "").any():
        raise refuse("wrote private/test.csv with answers missing.")


def _hold_out(definition: Competition, public: Path, private: Path, fraction: float, seed: int) -> None:
    """Moves a random part of the training rows to the test table; their answers go to private/holdout.csv. Cells keep their text."""
    id_column, target = definition.id_column, definition.target
    train, test, sample = (read_text_table((public / name).read_bytes()) for name in _PUBLIC_TABLES)
    ids = [*train[id_column], *test[id_column]]
    problem = None
    if len(set(ids)) < len(ids):
        problem = "ids repeat within train.csv and test.csv"
    elif absent := set(test.columns) - set(train.columns):
        problem = f"train.csv lacks columns of test.csv ({', '.join(sorted(absent))})"
    elif len(train) < 2:
        problem = "train.csv has fewer than two rows"
    elif "" in set(train[target]):
        problem = "train.csv has rows without a target"
    if problem:
        raise ConfigError(f"Competition {definition.id!r} cannot use the reward `holdout`: {problem}. Use config.task.reward = 'grade'.")
    random = np.random.RandomState(seed)  # its stream is frozen by numpy's policy
    count = min(max(1, math.floor(fraction * len(train) + 0.5)), len(train) - 1)
    held_R = np.zeros(len(train), bool)
    held_R[random.permutation(len(train))[:count]] = True
    held = train.loc[held_R]
    order_R = random.permutation(len(test) + count)

    grown = pd.concat([test, held[list(test.columns)]]).iloc[order_R]
    # The held-out rows get the sample's first row beside their id: samples are constant as a rule.
    rest = {column: sample[column].iloc[0] for column in sample.columns if column != id_column}
    grown_sample = pd.concat([sample, held.loc[:, [id_column]].assign(**rest)[list(sample.columns)]])
    grown_sample = grown_sample.set_index(id_column).loc[grown[id_column]].reset_index()[list(sample.columns)]
    train.loc[~held_R].to_csv(public / "train.csv", index=False, lineterminator="\n")
    grown.to_csv(public / "test.csv", index=False, lineterminator="\n")
    grown_sample.to_csv(public / "sample_submission.csv", index=False, lineterminator="\n")
    held.loc[:, [id_column, target]].to_csv(private / "holdout.csv", index=False, lineterminator="\n")


def _checksums(root: Path) -> dict[str, str]:
    """sha256 of every file of public/ and private/, by path relative to `root`."""
    paths = sorted(path for part in ("public", "private") for path in (root / part).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _describe_tables(public: Path) -> list[dict[str, Any]]:
    tables = []
    for path in sorted(public.rglob("*")):
        if path.suffix == ".csv":
            table = read_text_table(path.read_bytes())
            tables.append({"name": str(path.relative_to(public)), "rows": len(table), "columns": list(table.columns)})
        elif path.is_file():
            tables.append({"name": str(path.relative_to(public)), "rows": None, "columns": []})
    # train, test, sample_submission first, in the order in which one reads them; others follow by name.
    order = {name: place for place, name in enumerate(_PUBLIC_TABLES)}
    return sorted(tables, key=lambda table: order.get(table["name"], len(order)))


def _set_modes(work: Path) -> None:
    """public/ for all to read, whatever the umask; private/ for the owner alone."""
    for path in [work, *work.rglob("*")]:
        mine = path.name == _RECORD or work / "private" in (path, *path.parents)
        path.chmod((0o700 if mine else 0o755) if path.is_dir() else (0o600 if mine else 0o644))


def _read_record(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a prepared folder, once its settings and files have proved to be the same."""
    again = f"Delete {folder} to prepare it again, or choose another folder."
    try:
        record = json.loads((folder / _RECORD).read_text())
        recorded, files = record["settings"], record["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _RECORD} is not a record of a prepared task ({error}). {again}") from error
    differences = [
        f"{key}: {recorded.get(key, 'absent')!r} there, {settings.get(key, 'absent')!r} now"
        for key in sorted(recorded.keys() | settings.keys())
        if recorded.get(key) != settings.get(key)
    ]
    if differences:
        raise DataError(f"{folder} was prepared with other settings ({'; '.join(differences)}). {again}")
    found = _checksums(folder)
    changed = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if changed:
        raise DataError(f"Files in {folder} were changed, added or removed since it was prepared: {', '.join(changed)}. {again}")
    return record


def _task(source: str, digest: str, folder: Path, record: dict[str, Any]) -> Task:
    answers = [name for name in ("test.csv", "holdout.csv") if f"private/{name}" in record["files"]]
    if record["settings"]["reward"] == "grade":
        answers = ["test.csv"]
    rows = {name: len(read_text_table((folder / "private" / name).read_bytes())) for name in answers}
    fingerprint = json.dumps({"settings": record["settings"], "files": record["files"]}, sort_keys=True)
    return Task(
        source=source,
        source_digest=digest,
        folder=folder,
        reward_source=record["settings"]["reward"],
        files=tuple(TaskFile(table["name"], table["rows"], tuple(table["columns"])) for table in record["tables"]),
        private_rows=rows["test.csv"],
        holdout_rows=rows.get("holdout.csv", 0),
        answers_digests=tuple((name, record["files"][f"private/{name}"]) for name in answers),
        fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest(),
    )


def _check_sample(task: Task) -> None:
    """The sample submission must be gradable and better than a failure: otherwise the metric or the failure reward is wrong."""
    grade = task.grade((task.public_dir / "sample_submission.csv").read_bytes())
    if grade.score is None:
        raise ConfigError(f"Competition {task.id!r}: its own sample_submission.csv cannot be graded: {grade.reason}")
    reward = task.reward(grade.score)
    if not task.failure_reward < reward:
        raise ConfigError(
            f"Competition {task.id!r}: failure_reward = {task.failure_reward} must be below the reward of the sample submission, {reward}"
            f" ({task.metric.name} {grade.score}), or a program does best to fail."
        )

"""Prepares a task: writes the competition's tables or the problem's files once, and verifies their checksums on later calls."""

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discover_jax.exceptions import ConfigError, DataError, DiscoverError
from discover_jax.files import storage_remedy
from discover_jax.tasks import mle_bench
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.loading import load_definition, locate_definition
from discover_jax.tasks.problem import Problem
from discover_jax.tasks.problem_task import ProblemTask, problem_settings, write_public
from discover_jax.tasks.tables import read_text_table
from discover_jax.tasks.task import Split, Task, TaskFile

AnyTask = Task | ProblemTask
"""What a run works on; groups of rollouts take turns."""
REWARDS = ("grade", "holdout")
GRADERS = ("native", "mlebench")
LEAST_ROWS = 30
"""Fewest rows for selection, and of a retest: fewer would say next to nothing about a program."""
REUSES = ("problem", "on", "off")
_RECORD = "prepared.json"
# Increase it when the rules of preparation or grading change, so that earlier folders and cached grades are not reused.
_FORMAT = 2
_PUBLIC_TABLES = ("train.csv", "test.csv", "sample_submission.csv")


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
    settings = _settings(definition, digest, reward, holdout_fraction, holdout_folds, selection_fraction, seed)
    record = _prepared(folder, settings, _writer(definition, Path(raw).expanduser() if raw else None, settings))
    try:
        task = _task(source, digest, grader, folder, record)
    except OSError as error:
        raise DataError(f"Cannot read the task in {folder}: {error}. {storage_remedy(error)} Or choose another folder.") from error
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


def prepare_folder(folder: Path, settings: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, str], str]:
    """Prepares other tables in `folder`, or checks them if they are already prepared there, as `prepare_task` does.

    Args:
      settings: everything that the files depend on, as JSON.
      write: writes public/, private/ or other folders into the folder that it gets, and returns further entries for prepared.json.

    Returns:
      sha256 of every file by its path, and a hash of settings and files.

    Raises:
      DataError: `folder` holds something else, was altered, or cannot be written.
    """
    record = _prepared(Path(os.path.abspath(folder)), settings, write)
    return record["files"], _fingerprint(record)


def _prepared(folder: Path, settings: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        if not (folder / _RECORD).exists():
            _put_in_place(folder, settings, write)
        return _read_record(folder, settings)
    except OSError as error:
        raise DataError(f"Cannot prepare the task in {folder}: {error}. {storage_remedy(error)} Or choose another folder.") from error


def _prepare_problem(problem: Problem, source: str, digest: str, folder: Path) -> ProblemTask:
    _check_packages(problem)
    settings = problem_settings(problem, digest, _FORMAT)

    def write(work: Path) -> dict[str, Any]:
        (work / "public").mkdir()
        write_public(problem, work / "public")
        return {}

    record = _prepared(folder, settings, write)
    return ProblemTask(source, digest, folder, _fingerprint(record), tuple(settings.items()), problem.reuse_output)


def prepare_tasks(settings: Any, *, folder: Path, seed: int) -> list[AnyTask]:
    """The tasks of a run.

    Args:
      settings: config.task. Commas separate several competitions, and their raw data in the same order.
      folder: of the only task, or parent of one folder per task.
      seed: see `prepare_task`.

    Raises:
      ConfigError: see `prepare_task`; or a competition is named twice, the number of raw data paths differs from that of competitions, or a
        setting affects none of them.
      DataError: see `prepare_task`.
    """
    competitions = named_competitions(settings)
    names = [name for name, _ in competitions]
    definitions = [load_definition(*locate_definition(name)) for name in names]
    ids = [definition.id for definition in definitions]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"config.task.competition = {settings.competition!r} names a competition or problem twice: {', '.join(ids)}.")
    _check_effects(settings, definitions)
    return [
        prepare_task(
            name,
            raw=raw,
            reward=settings.reward,
            folder=folder if len(names) == 1 else folder / id,
            holdout_fraction=settings.holdout_fraction,
            holdout_folds=settings.holdout_folds,
            selection_fraction=settings.selection_fraction,
            grader=settings.grader,
            reuse_output=settings.reuse_output,
            seed=seed,
        )
        for (name, raw), id in zip(competitions, ids, strict=True)
    ]


def _check_effects(settings: Any, definitions: Sequence[Competition | Problem]) -> None:
    """Raises ConfigError if config.task has a choice that affects none of the competitions and problems: most likely a mistake."""
    ids, problems = ", ".join(definition.id for definition in definitions), [isinstance(each, Problem) for each in definitions]
    if settings.reuse_output != "problem" and not any(problems):
        raise ConfigError(
            f"config.task.reuse_output = {settings.reuse_output!r} has no effect: only problems have returned values, and the run has only"
            f" competitions ({ids}). Remove it."
        )
    if settings.reward == "holdout" and all(problems):
        raise ConfigError(
            f"config.task.reward = 'holdout' has no effect: only competitions have rows to hold out, and the run has only problems ({ids})."
            " Remove it, and config.task.holdout_fraction, holdout_folds and selection_fraction."
        )


def named_competitions(settings: Any) -> list[tuple[str, str]]:
    """The competitions in config.task, each with the path of its raw data; "" for a competition that brings its own.

    Raises:
      ConfigError: the number of raw data paths differs from that of competitions.
    """
    names = [name.strip() for name in settings.competition.split(",")]
    raws = [raw.strip() for raw in settings.raw.split(",")] if settings.raw else [""] * len(names)
    if len(raws) != len(names):
        raise ConfigError(
            f"config.task.raw = {settings.raw!r} has {len(raws)} paths for {len(names)} competitions and problems. Give one for"
            " each, separated by commas. Leave it empty for a problem, and for a competition that brings its own data."
        )
    return list(zip(names, raws, strict=True))


def seed_programs(settings: Any, tasks: Sequence[AnyTask]) -> list[str]:
    """The program from which the search of each task starts; "" for nothing.

    Args:
      settings: config.task.
      tasks: of the run.

    Raises:
      ConfigError: the number of paths differs from that of competitions, or a file cannot be read.
    """
    if not settings.seed_program:
        return [task.problem.seed_program if isinstance(task, ProblemTask) else "" for task in tasks]
    paths = [path.strip() for path in settings.seed_program.split(",")]
    if len(paths) != len(tasks):
        raise ConfigError(
            f"config.task.seed_program = {settings.seed_program!r} has {len(paths)} paths for {len(tasks)} competitions and problems. Give"
            " one for each, separated by commas."
        )
    try:
        return [Path(path).expanduser().read_text() if path else "" for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config.task.seed_program = {settings.seed_program!r} cannot be read: {error}.") from error


def _settings(
    definition: Competition, digest: str, reward: str, fraction: float, folds: int, selection: float, seed: int
) -> dict[str, Any]:
    """All settings that a grade depends on, in addition to the data."""
    holdout: dict[str, Any] = {}
    if reward == "holdout":
        holdout = {"holdout_folds": folds, "seed": seed} if folds > 1 else {"holdout_fraction": fraction, "seed": seed}
        if selection:
            holdout["selection_fraction"] = selection
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
        "judge": definition.judge_version,
        "reward": reward,
        **holdout,
    }


def _put_in_place(folder: Path, settings: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> None:
    """Writes everything to a folder next to `folder`, then renames it: a killed run leaves no incomplete `folder` behind.

    Args:
      settings: for the record.
      write: writes the files into a folder, and returns further entries for the record.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not a prepared task: it is not empty, but has no {_RECORD}. Choose another folder, or empty it.")
    work = folder.with_name(folder.name + ".preparing")
    if work.exists():  # left by a killed run
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True)
        record = {"settings": settings, **write(work), "files": _checksums(work)}
        (work / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        _set_modes(work)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _writer(definition: Competition, raw: Path | None, settings: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """The function that writes the tables of a competition."""

    def write(work: Path) -> dict[str, Any]:
        public, private = work / "public", work / "private"
        public.mkdir()
        private.mkdir(mode=0o700)
        _run_prepare(definition, raw, public, private)
        _check_tables(definition, public, private)
        for name, expected in definition.prepared_md5.items():
            found = hashlib.md5((work / name).read_bytes(), usedforsecurity=False).hexdigest()
            if found != expected:
                raise DataError(
                    f"{definition.id}: the prepared {name} has MD5 {found}, expected {expected}, although the raw data are correct. The"
                    f" installed pandas ({pd.__version__}) or scikit-learn prepares it differently. Install the versions in constraints/."
                )
        if "holdout_folds" in settings:
            _make_folds(definition, work, settings["holdout_folds"], settings["seed"])
        elif settings["reward"] == "holdout":
            _hold_out_part(definition, work, settings["holdout_fraction"], settings.get("selection_fraction", 0.0), settings["seed"])
        return {"tables": _describe_tables(work / _shown(settings)[0])}

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


def _check_tables(definition: Competition, public: Path, private: Path) -> None:
    """Checks the tables that prepare() wrote before they are used."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"Competition {definition.id!r}: its prepare() {problem} See docs/competitions.md for what it must write.")

    if not definition.id_column:  # only its judge knows the format of its tables
        for path in (public / "sample_submission.csv", private / "test.csv"):
            if not path.is_file():
                raise refuse(f"did not write {path.parent.name}/{path.name}.")
        return
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
        raise refuse("wrote private/test.csv with empty or repeated ids.")
    for name in ("public/test.csv", "public/sample_submission.csv"):
        if ids[name] != ids["private/test.csv"]:
            raise refuse(f"wrote {name} with other ids than private/test.csv.")
    if (tables["private/test.csv"][definition.target] == "").any():
        raise refuse("wrote private/test.csv with answers missing.")


def _hold_out_part(definition: Competition, work: Path, fraction: float, selection: float, seed: int) -> None:
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


def _make_folds(definition: Competition, work: Path, folds: int, seed: int) -> None:
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
    train, test = (read_text_table((public / name).read_bytes()) for name in _PUBLIC_TABLES[:2])
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
    train, test, sample = (read_text_table((shown / name).read_bytes()) for name in _PUBLIC_TABLES)
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


def _shown(settings: dict[str, Any]) -> list[str]:
    """Names of the folders that programs see, one for each run of a program."""
    return [*(f"fold-{fold + 1}" for fold in range(settings.get("holdout_folds", 0))), "public"]


def _checksums(root: Path) -> dict[str, str]:
    """sha256 of every file in the folders of `root`, by path relative to it."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.parent != root)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _describe_tables(public: Path) -> list[dict[str, Any]]:
    tables = []
    for path in sorted(public.rglob("*")):
        if path.suffix == ".csv":
            table = read_text_table(path.read_bytes())
            tables.append({"name": str(path.relative_to(public)), "rows": len(table), "columns": list(table.columns)})
        elif path.is_file():
            tables.append({"name": str(path.relative_to(public)), "rows": None, "columns": []})
    # train, test and sample_submission come first, in reading order; others follow by name.
    order = {name: place for place, name in enumerate(_PUBLIC_TABLES)}
    return sorted(tables, key=lambda table: order.get(table["name"], len(order)))


def _set_modes(work: Path) -> None:
    """Makes what programs see readable by all, whatever the umask, and private/ readable only by the owner."""
    for path in [work, *work.rglob("*")]:
        mine = path.name == _RECORD or work / "private" in (path, *path.parents)
        path.chmod((0o700 if mine else 0o755) if path.is_dir() else (0o600 if mine else 0o644))


def _read_record(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a prepared folder, after checking its settings and files."""
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


def _fingerprint(record: dict[str, Any]) -> str:
    """Hash of a record's settings and files; see `Task.fingerprint`."""
    text = json.dumps({"settings": record["settings"], "files": record["files"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _task(source: str, digest: str, grader: str, folder: Path, record: dict[str, Any]) -> Task:
    settings, files = record["settings"], record["files"]

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
        fingerprint=_fingerprint(record),
        settings=tuple(settings.items()),
    )


def _check_sample(task: Task) -> None:
    """Checks that the sample submission is valid and better than a failure; otherwise the metric or the failure reward is wrong."""
    grades = [task.grade((shown / "sample_submission.csv").read_bytes(), run) for run, shown in enumerate(task.public_dirs)]
    grade = next((grade for grade in grades if not grade.valid), None) or task.combine(grades)
    if grade.score is None:
        raise ConfigError(f"Competition {task.id!r}: its own sample_submission.csv is not valid: {grade.reason}")
    reward = task.reward(grade.score)
    if not task.failure_reward < reward:
        raise ConfigError(
            f"Competition {task.id!r}: failure_reward = {task.failure_reward} must be below the reward of the sample submission, {reward}"
            f" ({task.metric.name} {grade.score}). Otherwise failing would be the best strategy."
        )

"""A folder of prepared files: written once, put in place by one rename, and checked by its checksums on later calls."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from discover_jax.exceptions import DataError
from discover_jax.files import storage_remedy
from discover_jax.records import parse_json

_RECORD = "prepared.json"
HELPERS = "helpers_sha256"
"""Name of the setting for the modules beside a definition's file."""
STRATIFIED = "stratified"
"""Name of the setting for rows that are held out in proportion from each class."""
_NOT_RECORDED = (HELPERS, STRATIFIED)
"""Settings that folders of earlier versions lack. They stay valid as they are, with the rows that they have."""
TEXT_ENTRIES = ("text_answers", "text_predictions")
"""Entries of the record for `answers.TextColumns`."""


def is_stratified(settings: Iterable[tuple[str, Any]]) -> bool:
    """Whether a prepared task with these settings has rows that were held out in proportion from each class."""
    return bool(dict(settings).get(STRATIFIED))


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
    record = prepared_record(Path(os.path.abspath(folder)), settings, write)
    return record["files"], fingerprint(record)


def prepared_record(folder: Path, settings: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The record of a folder, which is prepared first if it is empty or missing. See `prepare_folder`."""
    try:
        if not (folder / _RECORD).exists():
            _put_in_place(folder, settings, write)
        return _read_record(folder, settings)
    except OSError as error:
        raise DataError(f"Cannot prepare the task in {folder}: {error}. {storage_remedy(error)} Or choose another folder.") from error


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


def _checksums(root: Path) -> dict[str, str]:
    """sha256 of every file in the folders of `root`, by path relative to it."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.parent != root)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _set_modes(work: Path) -> None:
    """Makes what programs see readable by all, whatever the umask, and private/ readable only by the owner."""
    for path in [work, *work.rglob("*")]:
        mine = path.name == _RECORD or work / "private" in (path, *path.parents)
        path.chmod((0o700 if mine else 0o755) if path.is_dir() else (0o600 if mine else 0o644))


def _read_record(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a prepared folder, after checking its settings and files."""
    again = f"Delete {folder} to prepare it again, or choose another folder."
    try:
        record = parse_json((folder / _RECORD).read_text())
        recorded, files = record["settings"], record["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _RECORD} is not a record of a prepared task ({error}). {again}") from error
    differences = [
        f"{key}: {recorded.get(key, 'absent')!r} there, {settings.get(key, 'absent')!r} now"
        for key in sorted(recorded.keys() | settings.keys())
        if recorded.get(key) != settings.get(key) and (key in recorded or key not in _NOT_RECORDED)
    ]
    if differences:
        raise DataError(f"{folder} was prepared with other settings ({'; '.join(differences)}). {again}")
    found = _checksums(folder)
    changed = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if changed:
        raise DataError(f"Files in {folder} were changed, added or removed since it was prepared: {', '.join(changed)}. {again}")
    return record


def definition_digests(digest: str) -> dict[str, str]:
    """The settings for a digest of `loading.locate_definition`."""
    definition, _, helpers = digest.partition("+")
    return {"definition_sha256": definition, **({HELPERS: helpers} if helpers else {})}


def fingerprint(record: dict[str, Any]) -> str:
    """Hash of a record's settings and files, and of the columns that are text; see `Task.fingerprint`."""
    parts = ("settings", "files", *(name for name in TEXT_ENTRIES if record.get(name)))  # earlier versions had no text columns
    text = json.dumps({part: record[part] for part in parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

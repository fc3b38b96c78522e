"""Reads what others published: JSON files of the right syntax and any shape, in folders that may be incomplete, stale or hostile."""

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

MOST_JSON_BYTES = 1 << 28
"""Largest JSON file that is read. The largest published one, a tokenizer.json, has about 35 MB."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxlist, _SHORT.maxdict = 2, 60, 60, 4, 4
_KINDS = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def check_regular(path: Path) -> int:
    """Checks that a path is a regular file, or a link to one: reading a FIFO or a device may never end. Returns its size in bytes.

    Raises:
      OSError: it is missing or something else.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(found.st_mode)), "not a file")
        raise OSError(f"it is {kind}, not a regular file")
    return found.st_size


def is_there(path: Path) -> bool:
    """Whether a path exists in any form, also as a dangling link. What is there but cannot be read is an error, not an absent file."""
    return os.path.lexists(path)


def visible_files(path: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, sorted, without hidden ones such as `._model.safetensors`, which other systems leave behind."""
    return [file for file in sorted(path.glob(pattern)) if not file.name.startswith(".")]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Its fields may have any type.

    Raises:
      OSError: the file cannot be read, or is not a regular file.
      ValueError: it is not UTF-8 or JSON, is nested too deeply, or is too large; an object has a name twice; or the value is not an object.
    """
    if (size := check_regular(path)) > MOST_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes; at most {MOST_JSON_BYTES:,} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must contain a JSON object; got {type(content).__name__}")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object has {show(name)} twice")
        found[name] = value
    return found


def show(value: Any) -> str:
    """A JSON value for an error message, shortened: its depth and length are unknown."""
    return _SHORT.repr(value)


def folder_hint(path: Path) -> str:
    """Why a path is not a model's folder, and what to do, as sentences after a space; empty for a folder that has only the wrong files."""
    if path.is_dir():
        return _snapshot_hint(path)
    if path.exists():
        remedy = " Convert it: python -m discover_jax.models.import_gguf --gguf=FILE --out=FOLDER." if path.suffix == ".gguf" else ""
        return f" This is a file, not a folder.{remedy}"
    hint = f" There is no such folder (current directory: {os.getcwd()})."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):  # as models are named on Hugging Face's site
        hint += f" Nothing is downloaded during a run. To download a published model, run hf download {path} --local-dir FOLDER."
    return hint


def _snapshot_hint(path: Path) -> str:
    """Where the model is if this is a folder of Hugging Face's cache, as a sentence after a space; else empty.

    The cache has a folder `models--OWNER--NAME` for each model, with the files of each revision in `snapshots/REVISION/`.
    """
    model = path.parent if path.name == "snapshots" else path
    try:
        revisions = sorted(folder for folder in (model / "snapshots").iterdir() if folder.is_dir())
    except OSError:
        models = sorted(folder.name for folder in path.glob("models--*"))
        if not models:
            return ""
        shown = ", ".join(models[:5]) + (", ..." if len(models) > 5 else "")
        count = f"{len(models)} model{'s' * (len(models) > 1)}"
        return f" This is a cache of Hugging Face with {count} ({shown}). Name a folder {path}/models--.../snapshots/REVISION."
    if not revisions:
        return f" This is a model in a cache of Hugging Face, but {model / 'snapshots'} is empty. Download the model again."
    main = model / "refs" / "main"
    try:
        check_regular(main)
        named = [folder for folder in revisions if folder.name == main.read_text(encoding="utf-8").strip()]
    except (OSError, ValueError):
        named = []
    return f" This is a model in a cache of Hugging Face. Its files are in {(named or revisions)[-1]}: set that folder."

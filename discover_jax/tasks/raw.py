"""Raw data from the user: read from a file, a zip or a folder, and verified by checksum."""

import hashlib
import zipfile
from pathlib import Path

from discover_jax.exceptions import DataError

# Far above the size of any expected table; keeps a wrong or hostile archive from filling the memory.
_MAX_BYTES = 1 << 30


def read_raw(raw: Path | None, name: str, *, sha256: str, contents: str, origin: str) -> bytes:
    """The bytes of `name` from a file of any name, or from a zip or folder that contains it.

    Args:
      raw: path from the user; None if there is none.
      name: name of the file inside a zip or a folder.
      sha256: of the expected file.
      contents: description for messages: "Kaggle's ... table, 8,693 rows".
      origin: where to get it, for messages.

    Raises:
      DataError: no path was given, the file does not exist, or it is not the expected file.
    """
    advice = f"Expected: {contents}, sha256 {sha256}. {origin} Then set config.task.raw to its path (the CSV, or the zip that holds it)."
    if raw is None:
        raise DataError(f"config.task.raw is empty, so there is no {name} to prepare. {advice}")
    try:
        data, where = _read(raw, name)
    except FileNotFoundError as error:
        raise DataError(f"There is no {name} at {raw}: {error}. {advice}") from error
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: an encrypted zip
        raise DataError(f"{raw} cannot be read: {error}. {advice}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        header = data[:200].split(b"\n", 1)[0].decode("utf-8", "replace").strip()
        lines = data.count(b"\n")
        raise DataError(
            f"{where} is not the expected file. Found: {len(data):,} bytes, {lines:,} lines, first line {header!r}, sha256"
            f" {found}. {advice} A copy saved by an editor, or another version of the table, is not accepted."
        )
    return data


def _read(raw: Path, name: str) -> tuple[bytes, str]:
    """The bytes, and where they were found."""
    if raw.is_dir():
        raw = raw / name
    if not raw.is_file():
        raise FileNotFoundError("no such file")
    if not zipfile.is_zipfile(raw):
        if raw.stat().st_size > _MAX_BYTES:
            raise OSError(f"it has {raw.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are allowed")
        return raw.read_bytes(), str(raw)
    with zipfile.ZipFile(raw) as archive:
        members = [info for info in archive.infolist() if Path(info.filename).name == name and not info.filename.startswith("__MACOSX")]
        if len(members) != 1:
            listed = ", ".join(archive.namelist()[:10]) or "nothing"
            raise FileNotFoundError(f"the zip must contain exactly one {name}; got {len(members)}. Its files: {listed}")
        if members[0].file_size > _MAX_BYTES:
            raise OSError(f"{name} in it has {members[0].file_size:,} bytes; at most {_MAX_BYTES:,} are allowed")
        return archive.read(members[0]), f"{members[0].filename} in {raw}"

"""Raw data that a user brings: found in a file, a zip or a folder, and recognised by checksum."""

import hashlib
import zipfile
from pathlib import Path

from discover_jax.exceptions import DataError

# Far above any table that is checked here; keeps a wrong or hostile archive from filling the memory.
_MAX_BYTES = 1 << 30


def read_raw(raw: Path | None, name: str, *, sha256: str, contents: str, origin: str) -> bytes:
    """The bytes of `name` from a file of any name, a zip that holds it, or a folder that holds it.

    Args:
      raw: path that the user gave; None if none was.
      name: the file's name inside a zip or a folder.
      sha256: of the one right file.
      contents: what it is, for messages: "Kaggle's ... table, 8,693 rows".
      origin: where to get it, for messages.

    Raises:
      DataError: nothing was given, nothing is there, or it is not the right file.
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
            f" {found}. {advice} A copy that an editor saved again, or the table of another version, does not do."
        )
    return data


def _read(raw: Path, name: str) -> tuple[bytes, str]:
    """Bytes and where they were found."""
    if raw.is_dir():
        raw = raw / name
    if not raw.is_file():
        raise FileNotFoundError("no such file")
    if not zipfile.is_zipfile(raw):
        if raw.stat().st_size > _MAX_BYTES:
            raise OSError(f"it has {raw.stat().st_size:,} bytes, more than the {_MAX_BYTES:,} that are read")
        return raw.read_bytes(), str(raw)
    with zipfile.ZipFile(raw) as archive:
        members = [info for info in archive.infolist() if Path(info.filename).name == name and not info.filename.startswith("__MACOSX")]
        if len(members) != 1:
            listed = ", ".join(archive.namelist()[:10]) or "nothing"
            raise FileNotFoundError(f"the zip must hold one {name}, but it holds {len(members)}; in it: {listed}")
        if members[0].file_size > _MAX_BYTES:
            raise OSError(f"{name} in it has {members[0].file_size:,} bytes, more than the {_MAX_BYTES:,} that are read")
        return archive.read(members[0]), f"{members[0].filename} in {raw}"

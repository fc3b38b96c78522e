"""How the tests of this folder damage files, and how they see that nothing else changed."""

import os
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """All files except those that every start writes again."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "disclosure.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x55
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)

"""Truncates a program's output, makes it independent of the machine and the run, and replaces control characters."""

import re
from collections.abc import Iterable


class HeadAndTail:
    """Keeps the first and the last bytes of a stream of any length."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 4 * self._half:
            del self._tail[: -self._half]

    def text(self) -> str:
        """The kept text, with a line that says how much was left out."""
        left_out = self.total - len(self._head) - self._half
        if left_out <= 0:
            return (self._head + self._tail).decode("utf-8", "replace")
        head, tail = self._head.decode("utf-8", "replace"), self._tail[-self._half :].decode("utf-8", "replace")
        return f"{head}\n... {left_out} bytes left out ...\n{tail}"


def without_host_paths(text: str, paths: Iterable[tuple[str, str]]) -> str:
    """Replaces paths of the host that a program can read in /proc/self/mountinfo, whole or from the root of their file system on.

    Args:
      text: output or traceback of a program.
      paths: absolute paths, and what stands in their place.
    """
    for path, name in paths:
        parts = path.strip("/").split("/")
        for start in range(len(parts) - 1):  # the last part alone may stand for something else
            text = text.replace("/" + "/".join(parts[start:]), name)
    return text


def normalised(text: str, folders: Iterable[str | None]) -> str:
    """Removes folders and addresses, which differ between machines and runs, so that a resumed run sees the same text as an unbroken one.
    The rest is `printable`.

    Args:
      text: output or traceback of a program.
      folders: folders to remove, so that paths below them become relative; None is ignored.
    """
    for folder in sorted(filter(None, folders), key=len, reverse=True):
        text = text.replace(folder + "/", "")
    return re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x...", printable(text))


def printable(text: str) -> str:
    """The text without control characters, with which a program could manipulate a reader's terminal, and without lone surrogates, which
    tokenizers reject. Tabs and line breaks remain."""
    text = re.sub(r"\r\n?", "\n", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)

"""Truncates a program's output, and makes it independent of the machine and the run."""

import re
from collections.abc import Iterable

from discover_jax.untrusted_text import as_on_terminal, collapsed


class HeadAndTail:
    """Keeps the first and the last bytes of a stream of any length.

    What a progress bar overwrites in its line is not kept, so that it does not push out what was printed before.
    """

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head, self._tail = bytearray(), bytearray()
        self._line = b""  # unfinished
        self._kept = 0
        self.total = 0
        """Bytes of the stream."""

    def add(self, data: bytes) -> None:
        self.total += len(data)
        *lines, last = (self._line + data.replace(b"\r\n", b"\n")).split(b"\n")
        for line in lines:
            self._keep((collapsed(line) if b"\r" in line else line) + b"\n")
        self._line = collapsed(last) if b"\r" in last else last
        if len(self._line) > self._half:  # a longer line cannot be overwritten from its beginning
            self._keep(self._line)
            self._line = b""

    def _keep(self, data: bytes) -> None:
        self._kept += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 4 * self._half:
            del self._tail[: -self._half]

    def text(self) -> str:
        """The kept text, with a line that says how much was left out."""
        tail = self._tail + self._line
        left_out = self._kept + len(self._line) - len(self._head) - self._half
        if left_out <= 0 or len(self._head) < self._half:
            return (self._head + tail).decode("utf-8", "replace")
        head, shown = self._head.decode("utf-8", "replace"), tail[-self._half :].decode("utf-8", "replace")
        return f"{head}\n... {left_out} bytes left out ...\n{shown}"


def without_host_paths(text: str, paths: Iterable[tuple[str, str]]) -> str:
    """Replaces paths of the host that a program can read in /proc/self/mountinfo, whole or from the root of their file system on.

    Args:
      text: output or traceback of a program.
      paths: absolute paths, each with its replacement.
    """
    text = as_on_terminal(text)  # first, so that nothing within a path hides it
    for path, name in paths:
        parts = path.strip("/").split("/")
        for start in range(len(parts) - 1):  # the last part alone may be an ordinary word
            text = text.replace("/" + "/".join(parts[start:]), name)
    return text


def normalised(text: str, folders: Iterable[str | None]) -> str:
    """Removes folders and addresses, which differ between machines and runs, so that a resumed run sees the same text as an unbroken one.
    The rest is text as on a terminal, see `untrusted_text`.

    Args:
      text: output or traceback of a program.
      folders: folders to remove, so that paths below them become relative; None is ignored.
    """
    text = as_on_terminal(text)
    for folder in sorted(filter(None, folders), key=len, reverse=True):
        text = text.replace(folder + "/", "")
    return re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x...", text)

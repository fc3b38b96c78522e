"""Delays programs until enough memory is free. Used where no control group limits the memory of programs.

The check runs when a program is about to start. Free memory must cover its limit plus the full limits of all running programs. Memory that
these already use is not free, so it counts twice; this errs on the safe side. One program may always run.
"""

import collections
import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from discover_jax.execution.limits import KIB
from discover_jax.execution.memory import own_folder

_LOOK_SECONDS = 0.2
_UNLIMITED = 1 << 62  # v1 writes a number near 2**63 for no limit


def _groups(version: int) -> Iterator[Path]:
    """This process's memory control group and its visible ancestors."""
    own = own_folder("memory" if version == 1 else "")
    limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
    return (folder for folder in (own, *own.parents) if (folder / limit).exists()) if own else iter(())


def _number(path: Path) -> int:
    text = path.read_text().strip()
    return _UNLIMITED if text == "max" else int(text)


def _file_pages(stat: str, prefix: str) -> int:
    """Bytes that the kernel can reclaim when memory is short: pages of files on disk, but not of files in memory."""
    return sum(int(number) for number in re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE))


def memory_limit() -> int:
    """Memory of the machine or container in bytes: the machine's memory or the smallest control group limit."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    found += [_number(folder / "memory.limit_in_bytes") for folder in _groups(1)]
    found += [_number(folder / "memory.max") for folder in _groups(2)]
    return min(found)


def available_bytes() -> int:
    """Memory in bytes that is available now, within the control group limits."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    found = [int(match[1]) * KIB] if match else [_UNLIMITED]
    for version, prefix, limit, usage in (
        (1, "total_", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        (2, "", "memory.max", "memory.current"),
    ):
        for folder in _groups(version):
            held = _number(folder / usage) - _file_pages((folder / "memory.stat").read_text(), prefix)
            found.append(_number(folder / limit) - held)
    return max(0, min(found))


class Admission:
    """Admits the programs of one executor, in order of arrival."""

    def __init__(self, memory_bytes: int, available: Callable[[], int] = available_bytes) -> None:
        """`memory_bytes`: memory limit of one program; `available`: returns the bytes that are free now."""
        self._memory_bytes = memory_bytes
        self._available = available
        self._changed = threading.Condition()
        self._running = 0
        self._waiting: collections.deque[object] = collections.deque()

    def _fits(self) -> bool:
        return not self._running or self._available() >= (self._running + 1) * self._memory_bytes

    @contextlib.contextmanager
    def program(self, given_up: Callable[[], bool]) -> Iterator[None]:
        """A context in which one program may run. Entering it waits until enough memory is free or `given_up` returns True."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                while not given_up() and not (self._waiting[0] is turn and self._fits()):
                    self._changed.wait(_LOOK_SECONDS)  # other processes free memory without notifying us
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

"""Keeps programs away from a slot whose last program has been killed but has not ended yet.

A process ends only when it leaves the kernel, and giving back gigabytes of page tables can take it minutes. The program's verdict does not
depend on that. But until its processes are gone, they use the slot's cores, uid and control group, so no other program starts there.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS, _REPORT_SECONDS = 0.2, 60.0
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Survivor:
    """A process that was killed and has not ended. `started`: its start in clock ticks, because the kernel reuses pids."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether it has still not ended."""
        return survivor(self.pid) == self


def survivor(pid: int) -> Survivor | None:
    """The process of this pid; None if it has ended, reaped or not."""
    try:
        # Bytes: a program chooses the name of its process.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else Survivor(pid, int(fields[19]))


def wait_until_gone(process: Survivor | None, given_up: Callable[[], bool]) -> None:
    """Waits until the process has ended or `given_up` returns True. Logs that it waits, at once and every minute."""
    next_report = time.monotonic()
    while process is not None and process.alive() and not given_up():
        if time.monotonic() >= next_report:
            next_report += _REPORT_SECONDS
            _log.warning(
                "Process %d of a program was killed but has not ended. Its slot runs no other program until it has. If this does not stop,"
                " see `cat /proc/%d/stack` as root, or restart the machine.",
                process.pid,
                process.pid,
            )
        time.sleep(_LOOK_SECONDS)

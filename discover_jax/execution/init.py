"""Runs as pid 1 inside a sandbox: starts the script in a child, reaps orphans, and ends with the child.

Started as `python init.py SCRIPT ARGUMENT`. The kernel kills pid 1 with the worker, and the whole sandbox with pid 1. Code of a program
in pid 1 could undo that: a thread that calls exec leaves the parent's death signal behind. So no program runs in pid 1, and pid 1 makes
itself not dumpable: although it has the program's uid, the kernel then refuses its memory (/proc/1/mem), as it refuses ptrace.

Uses only the standard library. It imports little, since a copy of it stays in memory until the sandbox ends.
"""

import ctypes
import os
import signal
import sys
import types

_PR_SET_DUMPABLE = 4


def _set_dumpable(dumpable: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def _run(script: str) -> None:
    """Runs the script as the main module. Its argument is the next one of the command line."""
    del sys.argv[0]
    main = types.ModuleType("__main__")
    main.__file__ = script  # processes that the program spawns import it again by this name
    sys.modules["__main__"] = main
    with open(script, "rb") as file:
        source = file.read()
    exec(compile(source, script, "exec", dont_inherit=True), main.__dict__)


def _wait_for(child: int) -> int:
    """Reaps all children until this one has ended, and returns its exit status in shell convention."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> None:
    _set_dumpable(False)  # before there is a child: what it runs must never see another state
    child = os.fork()
    if child == 0:
        _set_dumpable(True)  # the worker of an ordinary user measures its memory
        _run(sys.argv[1])
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel ignores it for pid 1, as all signals from inside that have no handler
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # only the child holds the pipes
    os._exit(_wait_for(child))


if __name__ == "__main__":
    main()

"""Work that runs in a thread of its own while the caller does something else."""

import threading
import time
from collections.abc import Callable

_running: set["BackgroundWork"] = set()


def is_running() -> bool:
    """Whether any work has not ended. Python's orderly end would wait for the threads that it has started in turn."""
    return bool(_running)


class BackgroundWork:
    """Work that starts at once in a thread of its own.

    The thread does not keep the process alive: a caller that needs the result must call `wait`.

    Args:
      work: called once. What it raises is raised by `wait`.
      name: of the thread.
    """

    def __init__(self, work: Callable[[], None], name: str):
        self._work = work
        self._error: BaseException | None = None
        self._seconds = 0.0
        self._ended = threading.Event()  # after Ctrl-C in `Thread.join`, Python 3.11 takes the thread for ended
        _running.add(self)
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._seconds = time.monotonic() - started
            _running.discard(self)
            self._ended.set()

    @property
    def failed(self) -> bool:
        """Whether the work has already failed."""
        return self._error is not None

    def wait(self) -> float:
        """Waits until the work has ended, and returns the seconds that it took. Raises its error if it failed.

        Ctrl-C ends the wait, not the work; it can be called again.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._seconds

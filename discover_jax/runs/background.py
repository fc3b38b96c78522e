"""Work that runs in a thread of its own while the caller does something else."""

import threading
import time
from collections.abc import Callable


class BackgroundWork:
    """Work that starts at once in a thread of its own.

    The thread does not keep the process alive: a caller that needs the result must call `wait`.

    Args:
      work: called once. What it raises is raised by `check` and `wait`.
      name: of the thread.
    """

    def __init__(self, work: Callable[[], None], name: str):
        self._work = work
        self._error: BaseException | None = None
        self._seconds = 0.0
        self._ended = threading.Event()  # after Ctrl-C in `Thread.join`, Python 3.11 takes the thread for ended
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._seconds = time.monotonic() - started
            self._ended.set()

    def check(self) -> None:
        """Returns at once. Raises the error if the work has already failed."""
        if self._error is not None:
            raise self._error

    def wait(self) -> float:
        """Waits until the work has ended, and returns the seconds that it took. Raises its error if it failed.

        Ctrl-C ends the wait, not the work; it can be called again.
        """
        self._ended.wait()
        self.check()
        return self._seconds

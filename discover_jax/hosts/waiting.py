"""A message for users whose process waits long for others."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

PATIENCE_SECONDS = 15.0
"""Seconds before the message is printed."""


@contextlib.contextmanager
def reminder(text: Callable[[], str]) -> Iterator[None]:
    """Prints `text()` once on standard error if the context lasts longer than `PATIENCE_SECONDS`."""
    timer = threading.Timer(PATIENCE_SECONDS, lambda: print(text(), file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

"""Silences what orbax and asyncio log about a failure: a traceback for each array, which the error of the caller reports once."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

_LOGGERS = ("absl", "asyncio")


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.name != "asyncio" and "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drops the records of orbax and asyncio, of all threads, until the context ends. Contexts may overlap in several threads.

    Others log with absl, too, while a checkpoint is written in the background. Their records stay.
    """

    def keep(record: logging.LogRecord) -> bool:  # a new function each time: removing a filter removes only its own
        return _is_of_others(record)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)

"""The warning of a kernel that uses the reference because it does not support its arguments."""

import functools

from absl import logging

SLOWER = "kernel of %s on %s: reference, which is many times slower"
"""Start of each warning that an operation uses the reference; logging fills in operation and platform."""


@functools.cache
def warn_reference(operation: str, reason: str) -> None:
    """Logs once that an operation uses the reference although it has a kernel, and why."""
    logging.warning(SLOWER + ", because %s", operation, "gpu", reason)

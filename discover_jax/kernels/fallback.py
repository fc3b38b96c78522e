"""The warning of a kernel that uses the reference because it does not support its arguments."""

import functools

from absl import logging

SLOWER = "reference, which is many times slower"


@functools.cache
def warn_reference(operation: str, reason: str, platform: str = "gpu") -> None:
    """Logs once that an operation uses the reference although it has a kernel, and why."""
    logging.warning("kernel of %s on %s: %s, because %s", operation, platform, SLOWER, reason)

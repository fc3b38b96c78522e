"""Exit codes of commands. Schedulers decide by them whether to start a run again (docs/troubleshooting.md, Exit codes).

When one process of a run fails, all others end with its code, so that the scheduler sees the cause whichever process it asks.
"""

FAILED = 1
"""A bug of this project or an error of jax, with a traceback."""
USER_ERROR = 2
"""The user must change something; the message says what. Starting the same command again gives the same error."""
LOST = 3
"""A process was killed, its host is down, or a host cannot be reached. Starting the same command again resumes the run."""
INTERRUPTED = 130
"""Ctrl-C."""

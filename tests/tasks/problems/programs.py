"""A program that runs in this process instead of a sandbox, for tests of verifiers."""

import time
from pathlib import Path

import numpy as np

from discover_jax.tasks.problem import Rejection, Timed


class InProcess:
    """Executes the code. Values arrive as the sandbox sends them: tuples as lists, numpy's scalars as Python's, arrays as copies."""

    def __init__(self, code: str):
        self._code = code
        self._start()

    def _start(self):
        self._names: dict = {"__name__": "program"}
        exec(self._code, self._names)

    def call(self, name, *arguments, seconds=None, fresh=False):
        return self.time(name, *arguments, seconds=seconds, fresh=fresh).value

    def time(self, name, *arguments, seconds=None, fresh=False):
        if fresh:
            self._start()
        if name not in self._names:
            raise Rejection(f"The program does not define {name}().")
        arguments = [_sent(argument) for argument in arguments]
        wall, cpu = time.perf_counter(), time.process_time()
        value = self._names[name](*arguments)
        return Timed(_sent(value), time.perf_counter() - wall, time.process_time() - cpu)


class Returns:
    """A program each of whose functions returns the value as it is, like a transport that was fooled."""

    def __init__(self, value):
        self.value = value

    def call(self, name, *arguments, seconds=None, fresh=False):
        return self.value

    def time(self, name, *arguments, seconds=None, fresh=False):
        return Timed(self.value, 1.0, 1.0)


def _sent(value):
    if isinstance(value, list | tuple):
        return [_sent(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value.copy() if isinstance(value, np.ndarray) else value


def page_of(problem) -> Path:
    """The problem's page in docs/, named as the module that defines it."""
    module = getattr(problem.evaluate, "func", problem.evaluate).__module__
    return Path(__file__).parents[3] / "docs" / "problems" / f"{module.rpartition('.')[2]}.md"

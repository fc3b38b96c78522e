"""Problems for tests of calls: squares of hidden numbers, and checks that misbehave if the program's value says so."""

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

from discover_jax.types import Evaluation, Program, Rejection

HIDDEN = (3.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Squares:
    """`square(x)` must be right for hidden numbers. With `fresh`, each call starts the program again."""

    public_dir: Path
    fingerprint: str = "squares"
    fresh: bool = False
    calls: bool = True
    evaluate_seconds: float = 20.0
    evaluate_gib: float = 1.0
    hidden_inputs: bool = False
    least_score: float = -math.inf

    @property
    def public_dirs(self) -> list[Path]:
        return [self.public_dir]

    def evaluate(self, program: Program) -> Evaluation:
        wall = cpu = 0.0
        for x in HIDDEN:
            timed = program.time("square", x, fresh=self.fresh, seconds=3.0)
            if type(timed.value) is not float or timed.value != x * x:
                raise Rejection(f"square({x}) is not {timed.value!r}")
            wall, cpu = wall + timed.wall_s, cpu + timed.cpu_s
        return Evaluation(float(len(HIDDEN)), "all right", {"wall": wall, "cpu": cpu})


@dataclasses.dataclass(frozen=True)
class Paused(Squares):
    """Lets time pass between the calls, and times the last one."""

    fingerprint: str = "paused"
    pause: float = 1.0

    def evaluate(self, program: Program) -> Evaluation:
        for x in HIDDEN:
            time.sleep(self.pause)
            timed = program.time("square", x)
            if timed.value != x * x:
                raise Rejection(f"square({x}) is not {timed.value!r}")
        return Evaluation(float(len(HIDDEN)), "all right", {"wall": timed.wall_s, "cpu": timed.cpu_s})


@dataclasses.dataclass(frozen=True)
class Naive(Squares):
    """A careless check: what the program returns may make it hang, exhaust memory, crash or fail."""

    fingerprint: str = "naive"
    evaluate_seconds: float = 2.0

    def evaluate(self, program: Program) -> Evaluation:
        value = program.call("run")
        if isinstance(value, list):
            return Evaluation(1.0, metrics=dict(enumerate(value)))
        if value == "hang":
            while True:
                pass
        if value == "crash":
            os.abort()
        if isinstance(value, dict):
            return Evaluation(float(len(bytearray(value["bytes"]))))
        return Evaluation(value)  # whatever its type


@dataclasses.dataclass(frozen=True)
class Forgetful(Squares):
    """A check that returns no evaluation of negative numbers, and asks for a call of no time after 0."""

    fingerprint: str = "forgetful"

    def evaluate(self, program: Program) -> Evaluation:
        value = program.call("run")
        if value == 0:
            program.call("run", seconds=value)
        return Evaluation(value) if value > 0 else None  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Echo(Squares):
    """A careless check that repeats what the program returns: the reason of a rejection, or a feedback that is also a metric's name."""

    fingerprint: str = "echo"

    def evaluate(self, program: Program) -> Evaluation:
        value = program.call("run")
        if isinstance(value, list):
            raise Rejection(value[0])
        return Evaluation(1.0, value, {value: 1.0})


@dataclasses.dataclass(frozen=True)
class Sums(Squares):
    """Sums three calls, and goes on after every error."""

    fingerprint: str = "sums"

    def evaluate(self, program: Program) -> Evaluation:
        total = 0.0
        for _ in range(3):
            with contextlib.suppress(Exception):
                total += program.call("run")
        return Evaluation(total)

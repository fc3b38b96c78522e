"""What a problem is: a task whose solutions are checked by a function. One small file defines one.

A competition compares a table with answers. A problem calls functions of the program, in its sandbox, and checks what they return.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.rewards import check_rewards
from discover_jax.types import Evaluation, Program, Rejection, Timed

_PACKAGE = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
__all__ = ["Evaluation", "Problem", "Program", "Record", "Rejection", "Timed"]


@dataclasses.dataclass(frozen=True)
class Record:
    """A published score to compare with.

    Attributes:
      name: who or what reached it.
      score: in the problem's direction and unit.
      source: where it was published.
    """

    name: str
    score: float
    source: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """The definition of a problem.

    Attributes:
      id: short name: letters, digits, dot, dash, underscore.
      description: for the prompt: what the program's functions get and return, what makes a solution valid, and how it is scored.
      evaluate: (program) -> Evaluation. Runs outside the sandbox, in a process of its own, with limits on time and memory. Values from the
        program are untrusted: check that numbers are finite first. An exception, including one that an unexpected value causes, rejects the
        solution, with the exception's text as the reason.
      higher_is_better: the direction of scores.
      score_name: as prompts and summaries show it.
      interface: the line that names the functions to define, such as "`run()` returns centers and radii".
      seed_program: a plain valid program to start from; empty: the first programs are written from nothing.
      ideas: suggestions for improvements; may be empty.
      records: published scores; never invented.
      packages: Python packages that programs may need, by their names for pip, such as "numba". The prompt names these, with versions, and
        a run without one of them does not start. Empty: the prompt names those for tables and models that are installed. Programs can
        import whatever is installed in either case.
      files: name -> text of each file that programs see in data/.
      transform: name in TRANSFORMS, from score to reward.
      failure_reward: reward of a program that failed; must be below that of every valid solution that is worth having.
      hidden_inputs: whether `evaluate` calls functions with inputs that later programs must not know. Then what programs print is not kept,
        and errors are cut: both could tell the next prompts.
      reuse_output: whether a child may read the value that its parent returned last, from parent_output.json in its working directory. Then
        a construction can be improved over many steps, and a program need not score alone. Not with `hidden_inputs`, which a value could
        tell.
      noisy: whether scores vary between evaluations of one program, as times do. Then the best programs can be evaluated again
        (config.finalists).
      evaluate_seconds: limit of `evaluate` itself, without the time of calls.
      evaluate_gib: memory limit of `evaluate`, in GiB.

    Raises:
      ConfigError: a value is not allowed, or direction and transform contradict each other.
    """

    id: str
    description: str
    evaluate: Callable[[Program], Evaluation]
    higher_is_better: bool = True
    score_name: str = "score"
    interface: str = "`run()` takes no arguments and returns the solution"
    seed_program: str = ""
    ideas: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    packages: tuple[str, ...] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transform: str = "identity"
    failure_reward: float = 0.0
    hidden_inputs: bool = False
    reuse_output: bool = False
    noisy: bool = False
    evaluate_seconds: float = 60.0
    evaluate_gib: float = 2.0

    def __post_init__(self):
        def refuse(problem: str) -> ConfigError:
            return ConfigError(f"Problem {self.id!r}: {problem}")

        if not isinstance(self.id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.id):
            raise refuse("the id must consist of letters, digits, '.', '-' and '_', since it names folders.")
        for name in ("description", "score_name", "interface"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise refuse(f"{name} must be a non-empty string; got {value!r}.")
        if not callable(self.evaluate):
            raise refuse(f"evaluate must be a function; got {self.evaluate!r}.")
        if self.reuse_output and self.hidden_inputs:
            raise refuse("reuse_output and hidden_inputs exclude each other: the value that a parent returned could tell the inputs.")
        if isinstance(self.packages, str) or not all(isinstance(name, str) and re.fullmatch(_PACKAGE, name) for name in self.packages):
            raise refuse(f"packages must be names for pip without versions, such as ('numpy', 'numba'); got {self.packages!r}.")
        for name in self.files:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise refuse(f"files has the name {name!r}; a name consists of letters, digits, '.', '-' and '_'.")
        for name in ("evaluate_seconds", "evaluate_gib"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise refuse(f"{name} must be a positive number; got {value!r}.")
        if not all(math.isfinite(record.score) for record in self.records):
            raise refuse("the scores of records must be finite.")
        check_rewards(refuse, self.transform, self.score_name, self.higher_is_better, self.failure_reward)

"""The data that flows through a step: parents, prompts, rollouts, executions, evaluations, grades, attempts.

All types are immutable. Arrays are numpy on the host, and their names list the axes (P prompt tokens, T generated tokens).
This module imports neither jax nor numpy, so that the processes that run and grade programs start quickly.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

PARENT_OUTPUT = "parent_output.json"
"""The file in a program's working directory with the value that its parent returned (`Problem.reuse_output`)."""
TOO_LONG = "too-long:"
"""Start of `State.output` if the value is too long for children."""
_LATER = {"later": True}
"""Marks fields that files of earlier versions do not have (see `records.from_row`)."""


def children_read(output: str) -> bool:
    """Whether a value is stored for children, by its `State.output`."""
    return output != "" and not output.startswith(TOO_LONG)


@dataclasses.dataclass(frozen=True)
class State:
    """A program that ran and was graded, or the empty seed from which a search starts.

    Attributes:
      id: unique within a run. It depends only on (step, group, index), so a resumed run gives the same ids. "seed" for the seed.
      parent_id: the state whose program was shown in the prompt; None only for the seed.
      code: the program; empty for a seed without a program.
      value: reward of the program, which the search maximises; None for a seed without a program.
      score: the same signal in the metric's own direction and unit, as prompts show it; None for a seed without a program.
      stdout: head and tail of the program's output, already trimmed for a prompt.
      step: step of its attempt, from 0; -1 for the seed.
      adapter_step: number of optimiser steps that the adapter had seen when it wrote the program.
      task: id of its competition; empty for the seed, from which the search of every competition starts.
      feedback: what the evaluation of a problem's solution says about it.
      output: SHA-256 of the value that it returned, if its children may read it (`Problem.reuse_output`), after TOO_LONG if it is too long
        for them; otherwise empty. States with the same code but other values differ by it.
      rows: results of the rows behind `score` (see `row_results`); empty if there are none.
    """

    id: str
    parent_id: str | None
    code: str
    value: float | None
    score: float | None
    stdout: str
    step: int
    adapter_step: int
    task: str = ""
    feedback: str = dataclasses.field(default="", metadata=_LATER)
    output: str = dataclasses.field(default="", metadata=_LATER)
    rows: str = dataclasses.field(default="", metadata=_LATER)

    @property
    def is_seed(self) -> bool:
        return self.parent_id is None


SEED = State(id="seed", parent_id=None, code="", value=None, score=None, stdout="", step=-1, adapter_step=0)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt of one group of rollouts: its parent, text and token ids."""

    group: int
    parent_id: str
    text: str
    tokens_P: "np.ndarray"  # int32


class StopReason(enum.Enum):
    """Why a rollout ended."""

    STOP_TOKEN = "stop_token"
    """The policy chose a stop token. It is the rollout's last token and is included in the loss."""
    MAX_TOKENS = "max_tokens"
    """The rollout reached the maximum number of generated tokens."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The tokens that the policy generated for a prompt.

    Attributes:
      group, index: group within the step, and index within the group.
      prompt_tokens_P: int32, token ids of the prompt.
      tokens_T: int32, generated token ids, including the stop token.
      logprobs_T: float32, log-probability of each token under the policy that sampled it, at the sampling temperature;
        0 where `chosen_T` is False.
      chosen_T: bool, False for forced tokens, which are excluded from the loss and from statistics.
      stop: why it ended.
      temperature: sampling temperature.
      routes_SLX: uint8 or uint16, the X experts that each of the L layers chose for each of the S = P + T - 1 input tokens. The update
        repeats this routing. None if it was not recorded.
    """

    group: int
    index: int
    prompt_tokens_P: "np.ndarray"
    tokens_T: "np.ndarray"
    logprobs_T: "np.ndarray"
    chosen_T: "np.ndarray"
    stop: StopReason
    temperature: float = 1.0
    routes_SLX: "np.ndarray | None" = None


RolloutKey = tuple[int, int]
"""Group and index of a rollout within its step."""


class RunKind(enum.Enum):
    """What a run does with its scores. The value is its name in files."""

    TRAIN = "train"
    """Scores select parents and update the adapter."""
    SEARCH = "search"
    """Scores select parents only; the policy stays the base model."""

    @property
    def learns(self) -> bool:
        return self is RunKind.TRAIN


class Outcome(enum.Enum):
    """How the attempt to run and grade a program ended."""

    OK = "ok"
    """The program ran, its submission is valid, and it has a score."""
    FORMAT_ERROR = "format_error"
    """The rollout has no program: the answer has no fenced Python block, or edits that do not apply; the detail says which."""
    EXCEPTION = "exception"
    """The program raised an exception; the detail has the end of the traceback."""
    INVALID_SUBMISSION = "invalid_submission"
    """The program ran, but its submission is invalid; the detail says why."""
    TIMEOUT = "timeout"
    """The program exceeded the time limit, counted from its own start."""
    OUT_OF_MEMORY = "out_of_memory"
    """The program exceeded the memory limit."""
    OUTPUT_FLOOD = "output_flood"
    """The program printed more than the limit."""
    RESULT_TOO_BIG = "result_too_big"
    """The program's submission is larger than the limit."""
    KILLED = "killed"
    """A signal killed the program, for example a segmentation fault."""
    SANDBOX_ERROR = "sandbox_error"
    """The host failed. The program is run again; this never becomes a reward."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """The sandbox's result for one program.

    Attributes:
      outcome: how it ended. OK means only that the program returned bytes; grading decides whether they are valid.
      result: the submission as CSV, or for a problem the value that was returned last (see `execution.values`); None if there is none, or
        if the verdict on it is not OK.
      stdout: head and tail of standard output and error, of limited length.
      detail: end of the traceback, or the reason, of limited length; empty if OK.
      seconds: wall time of the program, from its own start.
      cached: whether the result comes from an earlier execution of an identical program.
    """

    outcome: Outcome
    result: bytes | None
    stdout: str
    detail: str
    seconds: float
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """A program's answer to one call of a function.

    Attributes:
      outcome: OK if the function returned.
      value: the returned value (see `execution.values`); None if there is none.
      detail: end of the traceback, or the reason, of limited length; empty if OK.
      wall_s, cpu_s: time from the request to the end of the answer, and CPU time of the program's processes since the end of the previous
        answer, in seconds. Both are measured outside the sandbox.
    """

    outcome: Outcome
    value: bytes | None
    detail: str
    wall_s: float
    cpu_s: float


@dataclasses.dataclass(frozen=True)
class Grade:
    """The grade of a submission.

    Attributes:
      valid: whether the submission is valid.
      reason: why it is invalid; empty if valid.
      score: the score that the search may see, in the metric's own direction: on the private answers for the reward `grade`, on the
        held-out rows for `holdout`; None if invalid.
      private_score: score on the private answers, for the record only; equals `score` for the reward `grade` and for problems.
      feedback: what the evaluation of a problem's solution says about it; empty for competitions.
      metrics: further numbers of that evaluation, by name.
      rows: results of the rows behind `score` (see `row_results`); empty if there are none.
      selection_score: score on rows that no reward and no prompt sees, only the choice of the best program; None if there are none.
      selection_rows: results of the rows behind `selection_score`.
    """

    valid: bool
    reason: str
    score: float | None
    private_score: float | None
    feedback: str = dataclasses.field(default="", metadata=_LATER)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict, metadata=_LATER)
    rows: str = dataclasses.field(default="", metadata=_LATER)
    selection_score: float | None = dataclasses.field(default=None, metadata=_LATER)
    selection_rows: str = dataclasses.field(default="", metadata=_LATER)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of checking a valid solution.

    Attributes:
      score: finite, in the problem's own direction and unit.
      feedback: what the next prompt shows of it; longer texts are cut.
      metrics: further numbers by name, for the journal and the report.
    """

    score: float
    feedback: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Rejection(Exception):
    """Raised by `evaluate`: the solution is not valid. Its text is the reason, which the next prompt shows."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """A returned value with the time of the call, measured outside the sandbox.

    Attributes:
      value: as `Program.call` returns it.
      wall_s: wall time in seconds, including the transport of arguments and value.
      cpu_s: CPU time of all of the program's processes and threads since the end of the previous call, in seconds. So work that the
        program does between calls counts for the next one. Without a control group, a lower bound: it can miss children that ended.
    """

    value: Any
    wall_s: float
    cpu_s: float


class Program(Protocol):
    """A program in its sandbox, as `evaluate` sees it.

    Arguments and values are None, booleans, numbers, strings, lists, tuples, dicts with string keys, and numpy arrays of booleans or
    numbers. Values arrive as plain Python objects and arrays that own their memory; tuples arrive as lists. Nothing is unpickled.

    Both methods raise Rejection if the call fails: the function is missing or raises, the value cannot be sent or is too large, or time or
    memory is exceeded. `evaluate` need not catch it.
    """

    def call(self, name: str, *arguments: Any, seconds: float | None = None, fresh: bool = False) -> Any:
        """Calls a function of the program and returns its value.

        Args:
          name: of the function.
          arguments: of the function. The program sees them only now.
          seconds: limit of this call; by default, what is left of the program's time.
          fresh: whether to start the program again in a new sandbox first. Otherwise it keeps its state between calls.
        """
        ...

    def time(self, name: str, *arguments: Any, seconds: float | None = None, fresh: bool = False) -> Timed:
        """`call`, with the time that it took."""
        ...


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The executor's result for one program: its execution and grade."""

    outcome: Outcome
    grade: Grade
    execution: Execution


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A rollout and its result: a row of the journal.

    Attributes:
      id, parent_id, task, step, group, index: its position in the run. If it has a score, its State has the same `id`. `task` is the
        competition's id.
      code: the program in the rollout; None if there is none.
      outcome, detail, stdout: how it ended.
      score, private_score: see Grade; None for a failure.
      reward: basis of the advantage, higher is better; the task's failure reward for a failure.
      adapter_step: optimiser steps that the adapter had seen.
      tokens, stop: length of the rollout and why it ended.
      feedback, metrics, rows, selection_score, selection_rows: see Grade.
      output: see State.
    """

    id: str
    parent_id: str
    task: str
    step: int
    group: int
    index: int
    code: str | None
    outcome: Outcome
    detail: str
    stdout: str
    score: float | None
    private_score: float | None
    reward: float
    adapter_step: int
    tokens: int
    stop: StopReason
    feedback: str = dataclasses.field(default="", metadata=_LATER)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict, metadata=_LATER)
    output: str = dataclasses.field(default="", metadata=_LATER)
    rows: str = dataclasses.field(default="", metadata=_LATER)
    selection_score: float | None = dataclasses.field(default=None, metadata=_LATER)
    selection_rows: str = dataclasses.field(default="", metadata=_LATER)

    def state(self) -> State | None:
        """The state of this attempt for the archive; None if it has no score."""
        if self.outcome is not Outcome.OK or self.code is None:
            return None
        return State(
            id=self.id,
            parent_id=self.parent_id,
            code=self.code,
            value=self.reward,
            score=self.score,
            stdout=self.stdout,
            step=self.step,
            adapter_step=self.adapter_step,
            task=self.task,
            feedback=self.feedback,
            output=self.output,
            rows=self.rows,
        )


@dataclasses.dataclass(frozen=True)
class LoweredFunction:
    """A jitted function of a run, lowered on abstract arguments but not compiled. Dry runs compile it to measure its memory.

    Attributes:
      name: name for display, such as "prefill" or "decode".
      lowered: a `jax.stages.Lowered`.
      live: abstract arrays on the device while it runs, whether arguments or not, by name ("cache"). The weights, the adapter and the
        optimiser state are on the device in addition.
    """

    name: str
    lowered: Any
    live: dict[str, Any]

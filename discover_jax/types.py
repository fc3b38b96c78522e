"""The data that flows through a step: parents, prompts, rollouts, executions, grades, attempts.

All of it is immutable. Arrays are numpy on the host; each names its axes (P prompt tokens, T generated tokens).
Nothing here imports jax, so that the workers which run programs start quickly.
"""

import dataclasses
import enum
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class State:
    """A program that ran and was graded, or the empty seed from which a search starts.

    Attributes:
      id: unique within a run and a function of (step, group, index), so that a resumed run names states alike; "seed" for the seed.
      parent_id: the state whose program was shown in the prompt; None for the seed alone.
      code: the program; empty for the seed.
      value: what the search maximises: the reward of the program, higher is better; None for the seed.
      score: the same signal in the metric's own direction and unit, as prompts show it; None for the seed.
      stdout: head and tail of what the program printed, already trimmed for a prompt.
      step: the step that made it, from 0; -1 for the seed.
      adapter_step: number of optimiser steps that the adapter had seen when it wrote the program.
      task: id of the competition that it is for; empty for the seed, from which every competition's search starts.
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

    @property
    def is_seed(self) -> bool:
        return self.parent_id is None


SEED = State(id="seed", parent_id=None, code="", value=None, score=None, stdout="", step=-1, adapter_step=0)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What one group of rollouts is asked: the parent it builds on, the text shown, and its token ids."""

    group: int
    parent_id: str
    text: str
    tokens_P: np.ndarray  # int32


class StopReason(enum.Enum):
    """Why a rollout ended."""

    STOP_TOKEN = "stop_token"
    """The policy chose a stop token; it is the last of the rollout's tokens and bears loss like any other."""
    MAX_TOKENS = "max_tokens"
    """The budget of generated tokens was spent."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The tokens that the policy generated for a prompt.

    Attributes:
      group, index: which group of the step, and which member of the group.
      prompt_tokens_P: int32, the prompt's ids.
      tokens_T: int32, generated ids, the stop token included.
      logprobs_T: float32, log-probability of each token under the policy that sampled it, at the sampling temperature;
        0 where `chosen_T` is False.
      chosen_T: bool, False for tokens that were forced and so bear neither loss nor statistics.
      stop: why it ended.
      temperature: that it was sampled at.
      routes_SLX: uint8 or uint16, the X experts that each of L layers chose for each of the S = P + T - 1 tokens that were read, by which
        the update repeats the sampler's routing; None if they were not recorded.
    """

    group: int
    index: int
    prompt_tokens_P: np.ndarray
    tokens_T: np.ndarray
    logprobs_T: np.ndarray
    chosen_T: np.ndarray
    stop: StopReason
    temperature: float = 1.0
    routes_SLX: np.ndarray | None = None


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
    """It ran, its submission is valid, and it has a score."""
    FORMAT_ERROR = "format_error"
    """The rollout holds no program: no fenced Python block in the final channel."""
    EXCEPTION = "exception"
    """The program raised; the traceback's tail is in the detail."""
    INVALID_SUBMISSION = "invalid_submission"
    """It ended well, but what it returned cannot be graded; the detail says why."""
    TIMEOUT = "timeout"
    """It did not end within the time limit, counted from its own start."""
    OUT_OF_MEMORY = "out_of_memory"
    """It hit the memory limit."""
    OUTPUT_FLOOD = "output_flood"
    """It printed more than the limit."""
    RESULT_TOO_BIG = "result_too_big"
    """Its submission is larger than the limit."""
    KILLED = "killed"
    """It died by a signal: a segmentation fault, say."""
    SANDBOX_ERROR = "sandbox_error"
    """The host's fault. Retried; never a reward."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """What came back from the sandbox for one program.

    Attributes:
      outcome: how it ended; OK means only that the program returned bytes, which are a claim until graded.
      csv: the submission's bytes, or None.
      stdout: head and tail of standard output and error, bounded.
      detail: traceback's tail or reason, bounded; empty when OK.
      seconds: wall time of the program, from its own start.
      cached: True when the result was taken from an identical earlier execution.
    """

    outcome: Outcome
    csv: bytes | None
    stdout: str
    detail: str
    seconds: float
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on a submission.

    Attributes:
      valid: whether it can be graded at all.
      reason: why not; empty when valid.
      score: the signal that the search may see, in the metric's own direction: the private answers for the reward `grade`,
        the held-out rows for `holdout`; None when invalid.
      private_score: score on the private answers, for the record only; equals `score` for the reward `grade`.
    """

    valid: bool
    reason: str
    score: float | None
    private_score: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the executor hands back for one program: how it ran and what it was worth."""

    outcome: Outcome
    grade: Grade
    execution: Execution


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One rollout with everything that became of it: a row of the journal.

    Attributes:
      id, parent_id, task, step, group, index: where it belongs; `id` is that of the State it becomes if it has a score, `task` the
        competition's.
      code: the program taken from the rollout; None when there was none.
      outcome, detail, stdout: how it ended.
      score, private_score: see Grade; None for a failure.
      reward: what the advantages see, higher is better; the task's failure reward for a failure.
      adapter_step: optimiser steps that the adapter had seen.
      tokens, stop: length of the rollout and why it ended.
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

    def state(self) -> State | None:
        """The state that this attempt adds to the archive, or None if it has no score."""
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
        )


@dataclasses.dataclass(frozen=True)
class LoweredFunction:
    """A jitted function of a run on abstract arguments, lowered but not compiled; dry runs compile it to learn its memory.

    Attributes:
      name: as people know it: "prefill", "decode".
      lowered: a `jax.stages.Lowered`.
      live: abstract arrays that lie on the device while it runs, arguments or not, by what they are ("cache"); beside them the weights,
        the adapter and the optimiser's memory lie there.
    """

    name: str
    lowered: Any
    live: dict[str, Any]

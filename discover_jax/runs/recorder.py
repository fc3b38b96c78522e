"""Everything that a run writes or shows: journal, best/, rollouts, metrics, trackers, report and console.

The first process of a run has a `RunRecorder`, the others a `NullRecorder`, so the loop does not ask which process it is in.
It does not write checkpoints: all processes write them together, see `checkpoints`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from discover_jax.archive.archive import lineage
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.report.page import ReportWriter
from discover_jax.runs.attempts import rollout_rows
from discover_jax.runs.best import bundle_dir, grade_of, write_best
from discover_jax.runs.console import Console, Improvement, StepProgress
from discover_jax.runs.disclosure import NAME as DISCLOSURE
from discover_jax.runs.finalists import Choice, write_finalists
from discover_jax.runs.host_state import HostState
from discover_jax.runs.metrics import MetricsWriter, read_metrics
from discover_jax.runs.outputs import Outputs
from discover_jax.runs.restore import RunState
from discover_jax.runs.rollouts import write_rollouts
from discover_jax.runs.summary import Result, closing_lines, step_row
from discover_jax.runs.tracking import Trackers
from discover_jax.runs.workdir import Workdir
from discover_jax.tasks.prepare import AnyTask
from discover_jax.text.tokenizer import Tokenizer
from discover_jax.types import Attempt, Outcome, Prompt, Rollout, RolloutKey, RunKind, State, Verdict, children_read

PHASES = {
    "sampling": "time/sample_s",
    "running programs": "time/execute_s",
    "waiting for the checkpoint": "time/checkpoint_wait_s",
    "learning": "time/update_s",
    "measuring": "time/update_s",
    "saving": "time/save_s",
    "checkpoint": "time/checkpoint_s",
    "testing finalists": "time/execute_s",
}
"""Phases of a step, in order, and the metric that each one's seconds count towards."""

_SHORTENED_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a step did, for the recorder.

    Attributes:
      step: from 0.
      prompts_G: one for each group.
      parent_outputs_G: for each group, the value that its programs could read of their parent; empty for none.
      rollouts, verdicts, advantages: by rollout. No verdict without a program; no advantage if left out of the update.
      attempts: in the order of their keys.
      frontiers: after the step, by competition id.
      metrics: measured by the stages, see `metrics.SCHEMA`.
    """

    step: int
    prompts_G: Sequence[Prompt]
    parent_outputs_G: Sequence[bytes]
    rollouts: Mapping[RolloutKey, Rollout]
    verdicts: Mapping[RolloutKey, Verdict]
    advantages: Mapping[RolloutKey, float]
    attempts: Sequence[Attempt]
    frontiers: Mapping[str, Frontier]
    metrics: Mapping[str, float | None]


class Recorder(Protocol):
    """What the loop reports to.

    Methods raise RunError where a file or standard output cannot be written. The run can then be resumed from its last checkpoint.
    """

    def begin_step(self, step: int) -> None:
        """A step begins; `step` counts from 0."""
        ...

    def phase(self, name: str, detail: str = "") -> None:
        """The step enters a phase, one of `PHASES`. `detail` says how much there is to do."""
        ...

    def note(self, text: str) -> None:
        """Shows something that the user should know and that is not an error."""
        ...

    def prompts_shortened(self, details: Sequence[str], groups: int, max_tokens: int) -> None:
        """Notes that some prompts of the step were shortened: one detail for each."""
        ...

    def progress(self, progress: StepProgress) -> None:
        """Shows the progress of sampling and of programs."""
        ...

    def passes(self, done: int, total: int) -> None:
        """Shows how many microbatches the update has done."""
        ...

    def record(self, record: StepRecord) -> None:
        """Writes everything about a step except its checkpoint."""
        ...

    def host_state(self, frontiers: Mapping[str, Frontier]) -> dict[str, Any]:
        """The host part of the step's checkpoint, as JSON."""
        ...

    def end_step(self) -> None:
        """The step's checkpoint is being written: updates the report and shows the step's line."""
        ...

    def choose(self, choices: Mapping[str, Choice]) -> None:
        """The best program of each competition was chosen by retests; empty if there are none."""
        ...

    def finish(self) -> None:
        """The last step is done: shows the result of the run."""
        ...


class NullRecorder:
    """Records nothing: the recorder of all processes but the first."""

    def begin_step(self, step: int) -> None: ...

    def phase(self, name: str, detail: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def prompts_shortened(self, details: Sequence[str], groups: int, max_tokens: int) -> None: ...

    def progress(self, progress: StepProgress) -> None: ...

    def passes(self, done: int, total: int) -> None: ...

    def record(self, record: StepRecord) -> None: ...

    def host_state(self, frontiers: Mapping[str, Frontier]) -> dict[str, Any]:
        return {}

    def end_step(self) -> None: ...

    def choose(self, choices: Mapping[str, Choice]) -> None: ...

    def finish(self) -> None: ...


class RunRecorder:
    """The recorder of the first process.

    Args:
      workdir: of the run.
      journal: of the run, set back to where the run resumes.
      console, trackers: where progress and metrics are shown.
      tasks: of the run.
      tokenizer: of the model, to decode replies.
      rerun_scripts: text of best/rerun.sh by competition id.
      state: where the run stands.
      run_again: (task, state) -> the verdict on the state's program, from the cache or by another run.
      kind, seed, last_step: of the run; `last_step` is excluded.
    """

    def __init__(
        self,
        workdir: Workdir,
        journal: Journal,
        console: Console,
        trackers: Trackers,
        tasks: Sequence[AnyTask],
        tokenizer: Tokenizer,
        rerun_scripts: Mapping[str, str],
        state: RunState,
        run_again: Callable[[AnyTask, State], Verdict],
        *,
        kind: RunKind,
        seed: int,
        last_step: int,
    ):
        self._workdir, self._journal, self._console, self._trackers = workdir, journal, console, trackers
        self._tasks, self._tokenizer, self._rerun_scripts, self._state = tasks, tokenizer, rerun_scripts, state
        self._run_again, self._kind, self._seed, self._last_step = run_again, kind, seed, last_step
        self._metrics, self._report = MetricsWriter(workdir.metrics_path), ReportWriter(workdir.path)
        self._frontiers, self._outputs = dict(state.frontiers), Outputs(workdir.outputs_dir)
        self._rows: list[dict[str, Any]] = []
        self._improvements: list[Improvement] = []
        self._clock = _Clock()
        self._shortened = 0
        self._choices: dict[str, Choice] = {}
        self._checkpoint_seconds: float | None = None

    def begin(self, name: str, lines: Sequence[str]) -> None:
        """The run starts or resumes: shows its name and the opening lines, and drops metrics of steps that will be repeated."""
        self._metrics.truncate(self._state.step)
        self._trackers.begin(self._state.step)
        self._rows = read_metrics(self._workdir.metrics_path)
        method = "test-time training" if self._kind.learns else "search without training"
        self._console.start(f"{name}: {', '.join(task.id for task in self._tasks)}, {method}", list(lines))
        self._report.write()

    def begin_step(self, step: int) -> None:
        self._console.step(step, self._last_step)
        self._shortened = 0
        self._clock = _Clock()
        self._clock.enter(PHASES["sampling"])  # selecting parents and writing prompts counts as sampling

    def phase(self, name: str, detail: str = "") -> None:
        self._clock.enter(PHASES[name])
        self._console.phase(name, detail)

    def note(self, text: str) -> None:
        self._console.note(text)

    def prompts_shortened(self, details: Sequence[str], groups: int, max_tokens: int) -> None:
        self._shortened = len(details)
        more = f" And {len(details) - _SHORTENED_SHOWN} more." if len(details) > _SHORTENED_SHOWN else ""
        count = f"{len(details)} of {groups} prompts were shortened to {max_tokens:,} tokens (config.sampling.max_prompt_tokens)."
        self._console.note(f"{count} {' '.join(details[:_SHORTENED_SHOWN])}{more}")

    def progress(self, progress: StepProgress) -> None:
        self._console.progress(progress)

    def passes(self, done: int, total: int) -> None:
        self._console.passes(done, total)

    def record(self, record: StepRecord) -> None:
        self.phase("saving")
        self._journal.append(record.attempts)
        self._improvements = []
        for task in self._tasks:
            best, previous = record.frontiers[task.id].best, self._frontiers[task.id].best
            if best is not None and (previous is None or best.id != previous.id):
                step, group, index = map(int, best.id.split("-"))
                if step == record.step:
                    self._write_best(task, best, record.verdicts[group, index], record.parent_outputs_G[group])
                else:  # a program of an earlier step, after a ranking by posterior scores
                    self._write_best(task, best, self._run_again(task, best), b"")
            self._improvements.append(Improvement(task.id if len(self._tasks) > 1 else "", best, previous, task.calls))
        self._frontiers = dict(record.frontiers)
        self._keep_outputs(record)
        rows = rollout_rows(record.rollouts, record.prompts_G, record.attempts, record.advantages, record.verdicts, self._tokenizer)
        write_rollouts(self._workdir.rollouts_dir, record.step, rows)

        # The row comes before the checkpoint: after a kill before that is complete, the step is repeated, and `begin` drops the row.
        self._clock.enter(PHASES["checkpoint"])
        seconds = self._clock.seconds
        row = step_row(
            record.step,
            record.attempts,
            best={id: frontier.best for id, frontier in record.frontiers.items()},
            timings={
                **seconds,
                PHASES["checkpoint"]: self._checkpoint_seconds,
                "time/step_s": sum(seconds.values()),
                "prompt/shortened": self._shortened,
            },
            learning_metrics=record.metrics,
        )
        self._metrics.write(row)
        self._trackers.write(row)
        self._rows.append(row)

    def _keep_outputs(self, record: StepRecord) -> None:
        """Stores what children of this step's archived programs read. The checkpoint, which needs it, is written later."""
        archived = {state.id for frontier in record.frontiers.values() for state in frontier.archive.states}
        for attempt in record.attempts:
            if children_read(attempt.output) and attempt.id in archived:
                self._outputs.put(record.verdicts[attempt.group, attempt.index].execution.result or b"")

    def _write_best(
        self, task: AnyTask, best: State, verdict: Verdict, parent_output: bytes, *, retested: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the bundle of a program. If the cache lost its verdict, so that it had to run again, and it failed, keeps the old one."""
        if verdict.outcome is not Outcome.OK:
            self.note(
                f"The cache of verdicts has no result of {best.id}, the best program of {task.id}, and when it ran again, it failed"
                f" ({verdict.outcome.value.replace('_', ' ')}). best/ keeps the program before; the journal has this one."
            )
            return
        write_best(
            bundle_dir(self._workdir.best_dir, task.id, alone=len(self._tasks) == 1),
            lineage=lineage(self._journal.read(), best.id),
            submission=verdict.execution.result or b"",
            calls=task.calls,
            parent_output=parent_output,
            grade=grade_of(task, best, verdict, self._seed, parent_output) | ({"retested": dict(retested)} if retested else {}),
            disclosure=(self._workdir.path / DISCLOSURE).read_bytes(),
            rerun=self._rerun_scripts[task.id],
        )

    def host_state(self, frontiers: Mapping[str, Frontier]) -> dict[str, Any]:
        archived = [state for frontier in frontiers.values() for state in frontier.archive.to_json()]
        return HostState.of(self._state.first_step, archived, self._state.rewards, self._journal).to_json()

    def end_step(self) -> None:
        self._report.write()
        self._checkpoint_seconds = self._clock.stop()[PHASES["checkpoint"]]
        self._console.step_done(self._rows[-1], self._improvements)

    def choose(self, choices: Mapping[str, Choice]) -> None:
        if not choices:
            return
        self._choices = dict(choices)
        for id, choice in choices.items():
            state, verdict = choice.chosen.state, choice.verdicts[choice.chosen.state.id]
            if not state.is_seed:
                self._write_best(choice.task, state, verdict, b"", retested=choice.row(choice.chosen))
            self._console.note(f"{id}: {choice.task.metric.name} of the chosen program {choice.text}.")
        write_finalists(self._workdir.path, choices)
        self._report.write()

    def finish(self) -> None:
        lines = closing_lines(self._results(), self._rows, workdir=self._workdir, kind=self._kind)
        self._console.finish([*lines, f"report       {self._report.path}"])

    def _results(self) -> list[Result]:
        """The result of each competition. Private scores are read only now, when all choices have been made."""
        private = {attempt.id: attempt.private_score for attempt in self._journal.read()}
        results = []
        for task in self._tasks:
            choice = self._choices.get(task.id)
            frontier = self._frontiers[task.id]
            best = choice.chosen.state if choice is not None else frontier.best
            private_score = private.get(best.id) if best is not None else None
            results.append(Result(task, best, private_score, choice.text if choice is not None else "", frontier.seed.score))
        return results


class _Clock:
    """Seconds spent in each phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """Ends the current phase and starts the next."""
        self.stop()
        self._phase = phase

    def stop(self) -> dict[str, float]:
        """Ends the current phase; the seconds of all phases."""
        now = time.monotonic()
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = None, now
        return self.seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the phases that have ended."""
        return dict(self._seconds)

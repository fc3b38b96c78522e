"""What a run prints: bars on a terminal, plain lines everywhere else.

The console counts steps from 1; metrics, journal and folders count from 0.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import rich.console
import rich.progress
import rich.text

from discover_jax.exceptions import RunError
from discover_jax.runs.pace import Pace
from discover_jax.types import Outcome, State
from discover_jax.untrusted_text import printable


@dataclasses.dataclass(frozen=True)
class Improvement:
    """The best state of a competition before and after a step.

    Attributes:
      name: empty if the run has one competition only.
      exact: whether small gains count, as for a problem: then scores are shown with nine digits instead of four places.
    """

    name: str
    best: State | None
    previous: State | None
    exact: bool = False

    def score_text(self, score: float) -> str:
        return f"{score:.9g}" if self.exact else f"{score:.4f}"


@dataclasses.dataclass(frozen=True)
class StepProgress:
    """Progress of a step.

    Attributes:
      rollouts_done, rollouts_total: over all processes.
      programs_done, programs_total: programs that this host has run, and those submitted to it so far.
      tokens_per_s: tokens generated a second, over all rollouts.
      failures: number by kind, of the rollouts and programs that have ended.
    """

    rollouts_done: int
    rollouts_total: int
    programs_done: int
    programs_total: int
    tokens_per_s: float
    failures: Mapping[Outcome, int]

    @property
    def share(self) -> float:
        """Fraction of the rollouts that have ended."""
        return self.rollouts_done / self.rollouts_total


class Console(Protocol):
    """Where a run shows its progress. Nothing here changes the results of a run.

    Every method except `close` may raise RunError if standard output can no longer be written: a closed pipe, or a full disk.
    """

    def start(self, title: str, lines: list[str]) -> None:
        """Shows what is about to run. Called once."""
        ...

    def loading(self, done: int, total: int) -> None:
        """The weights are being read: `done` of `total` bytes of this process."""
        ...

    def step(self, step: int, steps: int) -> None:
        """A step begins: `step` counts from 0; `steps` is their number in the whole run."""
        ...

    def phase(self, name: str, detail: str = "") -> None:
        """The step enters a phase, such as "sampling". `detail` says how much work the phase has."""
        ...

    def progress(self, progress: StepProgress) -> None:
        """Shows the progress of sampling and programs. May be called often; the console decides when to print."""
        ...

    def passes(self, done: int, total: int) -> None:
        """Shows the progress of the update: passes over microbatches. May be called often."""
        ...

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        """A step ended with this row of metrics. `bests` has one entry for each competition."""
        ...

    def note(self, text: str) -> None:
        """Shows something that the user should know and that is not an error."""
        ...

    def finish(self, lines: list[str]) -> None:
        """Shows the result of the run. Called once."""
        ...

    def close(self) -> None:
        """Restores the terminal. Must be called however the run ends; may be called twice."""
        ...


class QuietConsole:
    """Prints nothing: the console of all processes but the first, and of tests and library use."""

    def start(self, title: str, lines: list[str]) -> None: ...

    def loading(self, done: int, total: int) -> None: ...

    def step(self, step: int, steps: int) -> None: ...

    def phase(self, name: str, detail: str = "") -> None: ...

    def progress(self, progress: StepProgress) -> None: ...

    def passes(self, done: int, total: int) -> None: ...

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, lines: list[str]) -> None: ...

    def close(self) -> None: ...


def make_console() -> Console:
    """Bars if standard output is a terminal with cursor control, otherwise plain lines."""
    console = rich.console.Console(highlight=False)
    # isatty is checked too: with FORCE_COLOR, rich treats a log file as a terminal and would draw bars into it.
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return TerminalConsole(console)
    return PlainConsole()


def _print_line(text: str) -> None:
    """Prints and flushes, so that a log file can be followed.

    Raises:
      RunError: standard output cannot be written.
    """
    try:
        print(printable(text), flush=True)
    except OSError as error:
        # Discard the rest of the buffer: writing it when the interpreter exits would fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise RunError(
            f"Standard output can no longer be written ({error}), so the run stops. Start the same command again: it resumes from the last"
            " checkpoint."
        ) from error


def step_line(row: dict[str, Any], bests: Sequence[Improvement], steps: int) -> str:
    """The line of a step: mean and highest reward, best score of the run and its change, valid fraction, seconds, failures by kind."""
    width = len(str(steps))
    parts = [
        f"step {row['step'] + 1:>{width}}/{steps}",
        f"mean {row['reward/mean']:.4f}",
        f"max {row['reward/max']:.4f}",
        *(f"best {best.name + ' ' if best.name else ''}{_best(best)}" for best in bests),
        f"valid {row['rollouts/valid_frac']:4.0%}",
    ]
    if row.get("time/step_s") is not None:
        parts.append(f"{row['time/step_s']:.1f} s")
    parts.append(_failures({outcome: row.get(f"outcome/{outcome.value}", 0) for outcome in Outcome}))
    return "  ".join(filter(None, parts))


_FAILURES = {
    Outcome.FORMAT_ERROR: ("format error", "format errors"),
    Outcome.EXCEPTION: ("exception", "exceptions"),
    Outcome.INVALID_SUBMISSION: ("invalid submission", "invalid submissions"),
    Outcome.TIMEOUT: ("timeout", "timeouts"),
    Outcome.OUT_OF_MEMORY: ("out of memory", "out of memory"),
    Outcome.OUTPUT_FLOOD: ("output flood", "output floods"),
    Outcome.RESULT_TOO_BIG: ("result too big", "results too big"),
    Outcome.KILLED: ("killed", "killed"),
    Outcome.SANDBOX_ERROR: ("sandbox error", "sandbox errors"),
}
"""Singular and plural of each kind of failure."""


def _failures(counts: Mapping[Outcome, int]) -> str:
    """Failures by kind, most frequent first; "" if there are none."""
    failed = [(outcome, count) for outcome, count in counts.items() if count and outcome is not Outcome.OK]
    return ", ".join(_counted(count, outcome) for outcome, count in sorted(failed, key=lambda item: -item[1]))


def _counted(count: int, outcome: Outcome) -> str:
    """The number and the kind of failures, as "2 exceptions"."""
    singular, plural = _FAILURES[outcome]
    return f"{count} {singular if count == 1 else plural}"


def _id(state: State | None) -> str | None:
    return state.id if state is not None else None


def _best(improvement: Improvement) -> str:
    """The best score and its change, padded so that the columns of successive lines align."""
    best, previous = improvement.best, improvement.previous
    if best is None or best.score is None:
        return "none yet        "
    if previous is None or previous.score is None:
        change = "(first)"
    elif best.score == previous.score:
        change = ""
    else:
        change = f"({best.score - previous.score:{'+.3g' if improvement.exact else '+.4f'}})"
    return f"{improvement.score_text(best.score)} {change:<9}"


class PlainConsole:
    """Lines without control codes. Progress lines are at least `interval` seconds apart, and at least a twentieth of the step's time.

    Args:
      write: called with each line; by default it prints and flushes.
      interval: in seconds.
      clock: a monotonic clock, in seconds.
    """

    def __init__(self, write: Callable[[str], None] | None = None, interval: float = 5.0, clock: Callable[[], float] = time.monotonic):
        self._write = write if write is not None else _print_line
        self._interval = interval
        self._clock = clock
        self._pace = Pace(clock)
        self._last = clock()
        self._steps = 1
        self._phase = ""

    def start(self, title: str, lines: list[str]) -> None:
        self._write(title)
        for line in lines:
            self._write(f"  {line}")

    def loading(self, done: int, total: int) -> None:
        if self._due():
            self._write(f"    reading weights: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    def step(self, step: int, steps: int) -> None:
        self._steps = steps
        self._last = self._clock()
        self._pace.step(step, steps)

    def phase(self, name: str, detail: str = "") -> None:
        self._phase = name
        self._pace.phase(name)
        if detail:
            self._write_phase(detail, self._pace.left(1.0))

    def progress(self, progress: StepProgress) -> None:
        if self._due():
            self._write_phase(
                f"rollouts {progress.rollouts_done}/{progress.rollouts_total}",
                f"programs {progress.programs_done}/{progress.programs_total}",
                f"{progress.tokens_per_s:,.0f} tokens/s",
                self._pace.left(progress.share),
                _failures(progress.failures),
            )

    def passes(self, done: int, total: int) -> None:
        if self._due():
            self._write_phase(f"{done}/{total} passes over microbatches", self._pace.left(done / total))

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        self._write(step_line(row, bests, self._steps).rstrip())

    def note(self, text: str) -> None:
        self._write(f"note: {text}")

    def finish(self, lines: list[str]) -> None:
        for line in lines:
            self._write(line)

    def close(self) -> None: ...

    def _write_phase(self, *parts: str) -> None:
        """Writes a line of the phase from the parts that are not empty."""
        self._write(f"    {self._phase}: {'  '.join(filter(None, parts))}")

    def _due(self) -> bool:
        """Whether the last progress line is old enough. If so, the time of the next one counts from now."""
        now = self._clock()
        if now - self._last < max(self._interval, self._pace.elapsed / 20):
            return False
        self._last = now
        return True


_BARS = ("rollouts", "programs", "update")
"""The bars of a step, below the bar of the run."""


class TerminalConsole:
    """Lines of finished steps, and below them a bar for the run and one each for the rollouts, programs and update of the step."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._pace = Pace()
        self._steps = 1
        self._phase = self._best = ""
        self._run = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description:<9}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._weights: rich.progress.TaskID | None = None

    def start(self, title: str, lines: list[str]) -> None:
        self._print(rich.text.Text(printable(title), style="bold"))
        for line in lines:
            self._print(rich.text.Text(printable(f"  {line}")))

    def loading(self, done: int, total: int) -> None:
        if self._weights is None:
            self._weights = self._run.add_task("weights", total=None, note="")
            self._run.start()
        self._run.update(self._weights, completed=done // 10**6, total=total // 10**6, note="MB", refresh=True)
        if done >= total:
            self._run.remove_task(self._weights)
            self._run.stop()
            self._weights = None

    def step(self, step: int, steps: int) -> None:
        self._steps = steps
        self._pace.step(step, steps)
        if not self._tasks:
            self._tasks = {name: self._run.add_task(name, total=None, note="") for name in ("step", *_BARS)}
            self._run.start()
        self._run.update(self._tasks["step"], completed=step, total=steps)
        for name in _BARS:
            self._run.reset(self._tasks[name], total=None, note="")

    def phase(self, name: str, detail: str = "") -> None:
        self._phase = f"{name}, {detail}" if detail else name
        self._pace.phase(name)
        if self._tasks:
            self._run.update(self._tasks["step"], note=f"{self._best}{self._phase}", refresh=True)
        else:
            self._print(rich.text.Text(f"  {name} ...", style="dim"))

    def progress(self, progress: StepProgress) -> None:
        if self._tasks:
            done, total = progress.rollouts_done, progress.rollouts_total
            self._show_left(progress.share)
            self._run.update(self._tasks["rollouts"], completed=done, total=total, note=f"{progress.tokens_per_s:,.0f} tokens/s")
            done, total = progress.programs_done, progress.programs_total
            self._run.update(self._tasks["programs"], completed=done, total=total, note=_failures(progress.failures))

    def passes(self, done: int, total: int) -> None:
        if self._tasks:
            self._show_left(done / total)
            self._run.update(self._tasks["update"], completed=done, total=total, note="passes over microbatches")

    def _show_left(self, share: float) -> None:
        left = self._pace.left(share)
        self._run.update(self._tasks["step"], note=f"{self._best}{self._phase}{'  ' if left else ''}{left}")

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        scores = [best.score_text(best.best.score) for best in bests if best.best is not None and best.best.score is not None]
        self._best = f"best {scores[0]}  " if len(bests) == len(scores) == 1 else ""
        if self._tasks:
            self._run.update(self._tasks["step"], completed=row["step"] + 1, note=self._best)
        improved = any(_id(best.best) != _id(best.previous) for best in bests)
        self._print(rich.text.Text(step_line(row, bests, self._steps), style="green" if improved else ""))

    def note(self, text: str) -> None:
        self._print(rich.text.Text(printable(f"note: {text}"), style="yellow"))

    def finish(self, lines: list[str]) -> None:
        self.close()
        for number, line in enumerate(lines):
            self._print(rich.text.Text(printable(line), style="bold" if number == 0 else ""))

    def close(self) -> None:
        self._run.stop()

    def _print(self, text: rich.text.Text) -> None:
        # Printing through the console of the bars keeps them below. Soft wrapping keeps paths whole, for copying.
        self._console.print(text, soft_wrap=True)

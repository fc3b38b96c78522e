"""What a person sees while a run works: bars on a terminal, plain lines everywhere else.

Steps are counted from 1 here, as people do; metrics, journal and folders count from 0.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import rich.console
import rich.progress
import rich.text

from discover_jax.exceptions import RunError
from discover_jax.types import Outcome, State


@dataclasses.dataclass(frozen=True)
class Improvement:
    """The best state of a competition before and after a step; `name` is empty where a run has but one."""

    name: str
    best: State | None
    previous: State | None


class Console(Protocol):
    """How a run reports on itself. Nothing here changes a run's results.

    Every method but `close` may raise RunError when standard output can no longer be written: it was a pipe whose reader ended, or a
    file on a full disk.
    """

    def start(self, title: str, lines: list[str]) -> None:
        """Says what is about to run, once."""
        ...

    def loading(self, done: int, total: int) -> None:
        """The weights are being read: bytes so far, of all that this process reads."""
        ...

    def step(self, step: int, steps: int) -> None:
        """A step begins: `step` from 0, of `steps` in the whole run."""
        ...

    def phase(self, name: str) -> None:
        """What the step does now, as a few words: "sampling", "update"."""
        ...

    def progress(self, rollouts_done: int, rollouts_total: int, programs_done: int, programs_total: int, tokens_per_s: float) -> None:
        """How far the step is; may be called as often as one likes. `tokens_per_s` of all rollouts together."""
        ...

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        """A step ended with this row of metrics; `bests` has one entry for each competition."""
        ...

    def note(self, text: str) -> None:
        """Something to know that is no error."""
        ...

    def finish(self, lines: list[str]) -> None:
        """The run's result, once."""
        ...

    def close(self) -> None:
        """Gives the terminal back; call it however the run ends. May be called twice."""
        ...


class QuietConsole:
    """Says nothing: of several processes only the first speaks."""

    def start(self, title: str, lines: list[str]) -> None: ...

    def loading(self, done: int, total: int) -> None: ...

    def step(self, step: int, steps: int) -> None: ...

    def phase(self, name: str) -> None: ...

    def progress(self, rollouts_done: int, rollouts_total: int, programs_done: int, programs_total: int, tokens_per_s: float) -> None: ...

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, lines: list[str]) -> None: ...

    def close(self) -> None: ...


def make_console() -> Console:
    """Bars if standard output is a terminal that can move its cursor, else plain lines."""
    console = rich.console.Console(highlight=False)
    # Asked of the stream itself: rich takes FORCE_COLOR for a terminal, too, and would draw bars into a log file.
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return TerminalConsole(console)
    return PlainConsole()


def _print_line(text: str) -> None:
    """Prints and flushes, so that a log can be followed.

    Raises:
      RunError: standard output cannot be written.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # What is left in the stream's buffer would fail once more when the interpreter ends; it goes nowhere instead.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise RunError(
            f"Standard output can no longer be written ({error}), so the run stops. Nothing of it is lost: the same command resumes at the"
            " last checkpoint."
        ) from error


def step_line(row: dict[str, Any], bests: Sequence[Improvement], steps: int) -> str:
    """One line on a step: mean and highest reward, best score of the run and its change, valid fraction, failures by kind, seconds."""
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
    failures = {outcome: row.get(f"outcome/{outcome.value}", 0) for outcome in Outcome if outcome is not Outcome.OK}
    failures = {outcome: count for outcome, count in failures.items() if count}
    if failures:
        ranked = sorted(failures.items(), key=lambda item: -item[1])
        parts.append(", ".join(f"{count} {outcome.value.replace('_', ' ')}" for outcome, count in ranked))
    return "  ".join(parts)


def _best(improvement: Improvement) -> str:
    """The best score with its change, at one width, so that lines stay below each other."""
    best, previous = improvement.best, improvement.previous
    if best is None or best.score is None:
        return "none yet        "
    if previous is None or previous.score is None:
        change = "(first)"
    elif best.score == previous.score:
        change = ""
    else:
        change = f"({best.score - previous.score:+.4f})"
    return f"{best.score:.4f} {change:<9}"


def _progress_text(rollouts_done: int, rollouts_total: int, programs_done: int, programs_total: int, tokens_per_s: float) -> str:
    return f"rollouts {rollouts_done}/{rollouts_total}  programs {programs_done}/{programs_total}  {tokens_per_s:,.0f} tokens/s"


class NullConsole:
    """Says nothing; for tests and for use as a library."""

    def start(self, title: str, lines: list[str]) -> None: ...
    def loading(self, done: int, total: int) -> None: ...
    def step(self, step: int, steps: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def progress(self, rollouts_done: int, rollouts_total: int, programs_done: int, programs_total: int, tokens_per_s: float) -> None: ...
    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None: ...
    def note(self, text: str) -> None: ...
    def finish(self, lines: list[str]) -> None: ...
    def close(self) -> None: ...


class PlainConsole:
    """Lines without control codes; of progress at most one in `interval` seconds."""

    def __init__(self, write: Callable[[str], None] | None = None, interval: float = 5.0, clock: Callable[[], float] = time.monotonic):
        self._write = write if write is not None else _print_line
        self._interval = interval
        self._clock = clock
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

    def phase(self, name: str) -> None:
        self._phase = name

    def progress(self, rollouts_done: int, rollouts_total: int, programs_done: int, programs_total: int, tokens_per_s: float) -> None:
        if self._due():
            text = _progress_text(rollouts_done, rollouts_total, programs_done, programs_total, tokens_per_s)
            self._write(f"    {self._phase}: {text}" if self._phase else f"    {text}")

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        self._write(step_line(row, bests, self._steps).rstrip())

    def note(self, text: str) -> None:
        self._write(f"note: {text}")

    def finish(self, lines: list[str]) -> None:
        for line in lines:
            self._write(line)

    def close(self) -> None: ...

    def _due(self) -> bool:
        """Whether the last line of progress is long enough ago; if so, the next one is written now."""
        now = self._clock()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True


class TerminalConsole:
    """Finished steps scroll by; below them one bar for the run and one each for the step's rollouts and programs."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._steps = 1
        self._run = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description:<9}"),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._weights: rich.progress.TaskID | None = None

    def start(self, title: str, lines: list[str]) -> None:
        self._print(rich.text.Text(title, style="bold"))
        for line in lines:
            self._print(rich.text.Text(f"  {line}"))

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
        if not self._tasks:
            self._tasks = {name: self._run.add_task(name, total=None, note="") for name in ("step", "rollouts", "programs")}
            self._run.start()
        self._run.update(self._tasks["step"], completed=step, total=steps)
        for name in ("rollouts", "programs"):
            self._run.reset(self._tasks[name], total=None, note="")

    def phase(self, name: str) -> None:
        if self._tasks:
            self._run.update(self._tasks["step"], note=name)
        else:
            self._print(rich.text.Text(f"  {name} ...", style="dim"))

    def progress(self, rollouts_done: int, rollouts_total: int, programs_done: int, programs_total: int, tokens_per_s: float) -> None:
        if self._tasks:
            note = f"{tokens_per_s:,.0f} tokens/s"
            self._run.update(self._tasks["rollouts"], completed=rollouts_done, total=rollouts_total, note=note)
            self._run.update(self._tasks["programs"], completed=programs_done, total=programs_total)

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        if self._tasks:
            self._run.update(self._tasks["step"], completed=row["step"] + 1, note="")
        improved = any(best.best != best.previous for best in bests)
        self._print(rich.text.Text(step_line(row, bests, self._steps), style="green" if improved else ""))

    def note(self, text: str) -> None:
        self._print(rich.text.Text(f"note: {text}", style="yellow"))

    def finish(self, lines: list[str]) -> None:
        self.close()
        for number, line in enumerate(lines):
            self._print(rich.text.Text(line, style="bold" if number == 0 else ""))

    def close(self) -> None:
        self._run.stop()

    def _print(self, text: rich.text.Text) -> None:
        # The bars' own console prints above them; soft wrapping keeps paths whole, for copying.
        self._console.print(text, soft_wrap=True)

"""Plain lines: content, frequency, no control codes. Terminal: finished steps stay, bars disappear."""

import io
import os
import pty
import re
import subprocess
import sys

import rich.console

from discover_jax.runs.console import Improvement, PlainConsole, QuietConsole, StepProgress, TerminalConsole, make_console, step_line
from discover_jax.types import Outcome, State

ROW = {
    "step": 2,
    "reward/mean": 0.52,
    "reward/max": 0.7,
    "rollouts/valid_frac": 0.875,
    "outcome/ok": 14,
    "outcome/exception": 1,
    "outcome/format_error": 4,
    "outcome/out_of_memory": 0,
    "time/step_s": 12.34,
}


def best(score: float) -> State:
    return State("a", "seed", "x", score, score, "", 0, 0)


def numbers(line: str) -> list[str]:
    """The signed numbers of a line, in order."""
    return re.findall(r"[+-]?\d[\d,.]*(?<![,.])", line)


def bests(after, before):
    return [Improvement("", after, None if before is None else best(before))]


def progress(rollouts: int, programs: int, failures=None) -> StepProgress:
    return StepProgress(rollouts, 16, programs, 16, 1234.5, failures or {})


def test_step_line_of_several_competitions():
    line = step_line(ROW, [Improvement("boats", best(0.71), best(0.7)), Improvement("trains", None, None)], 10)
    assert re.search(r"\bboats\b.*\b0\.7100\b.*\+0\.0100\b.*\btrains\b", line)


def test_step_line_of_a_problem_shows_small_gains():
    line = step_line(ROW, [Improvement("", best(2.6359828), best(2.6359827), exact=True)], 10)
    assert re.search(r"\bbest 2\.6359828 \(\+1e-07\)", line)


def test_step_line():
    line = step_line(ROW, bests(best(0.71), 0.7), 10)
    assert numbers(line) == ["3", "10", "0.5200", "0.7000", "0.7100", "+0.0100", "88", "12.3", "4", "1"]
    assert re.search(r"\bmean 0\.5200\b.*\bmax 0\.7000\b.*\bbest 0\.7100\b.*\bvalid +88%", line)
    assert re.search(r"\b4 format errors\b.*\b1 exception\b", line)
    assert "-0.0100" in numbers(step_line(ROW, bests(best(0.69), 0.7), 10))  # a metric where lower is better
    for improvement in (bests(best(0.69), None), bests(best(0.7), 0.7), bests(None, None)):
        assert not any(number[0] in "+-" for number in numbers(step_line(ROW, improvement, 10)))
    assert len(numbers(step_line(ROW, bests(None, None), 10))) == len(numbers(line)) - 2  # no best score, no improvement
    columns = {
        step_line(ROW, bests(*args), 10).index("valid") for args in [(best(0.71), 0.7), (best(0.7), None), (best(0.7), 0.7), (None, None)]
    }
    assert len(columns) == 1


def test_plain_progress_is_infrequent():
    lines, now = [], [100.0]
    console = PlainConsole(lines.append, interval=5.0, clock=lambda: now[0])
    console.loading(0, 13_761_264_768)
    now[0] += 5.0
    console.loading(2_000_000_000, 13_761_264_768)
    now[0] = 100.0
    assert numbers(lines.pop()) == ["2.0", "13.8"]
    console.start("title", ["a", "b"])
    console.step(2, 10)
    console.phase("sampling")
    for second in range(1, 13):
        now[0] = 100.0 + second
        console.progress(progress(second, second // 2))
    console.step_done(ROW, bests(best(0.71), 0.7))
    console.note("careful")
    console.finish(["done"])
    console.close()
    assert lines[:3] == ["title", "  a", "  b"]
    lefts = {5: "11", 10: "6"}  # seconds: 5 s x 11/5, and 10 s x 6/10
    assert [numbers(line) for line in lines[3:5]] == [[str(n), "16", str(n // 2), "16", "1,234", left] for n, left in lefts.items()]
    assert all("sampling" in line for line in lines[3:5])
    assert numbers(lines[5])[:3] == ["3", "10", "0.5200"]
    assert lines[6].endswith("careful")
    assert lines[7:] == ["done"]


def test_plain_lines_show_failures_and_remaining_time():
    lines, now = [], [0.0]
    console = PlainConsole(lines.append, interval=5.0, clock=lambda: now[0])
    for step in (0, 1):  # the first step takes twice as long, since it compiles
        console.step(step, 10)
        for phase, seconds in (("sampling", 140), ("learning", 50), ("saving", 0), ("checkpoint", 10)):
            console.phase(phase)
            now[0] += seconds * (2 - step)
    console.step(2, 10)
    console.phase("sampling")
    now[0] += 50
    console.progress(progress(4, 2, {Outcome.OK: 1, Outcome.TIMEOUT: 1, Outcome.FORMAT_ERROR: 2, Outcome.KILLED: 0}))
    now[0] += 100
    console.phase("learning", "12 rollouts")
    now[0] += 20
    console.passes(4, 16)
    now[0] += 40
    console.passes(12, 16)  # more than the usual 50 s: 60 s for 12 passes
    console.passes(13, 16)
    console.phase("saving")
    console.phase("checkpoint", "3 MB")
    expected = [  # phase; progress; time left of the step (min or s) and of the run (min); failures
        ("sampling", ["4", "16", "2", "16", "1,234", "2", "26", "2", "1"]),
        ("learning", ["12", "60", "24"]),
        ("learning", ["4", "16", "40", "24"]),
        ("learning", ["12", "16", "30", "24"]),
        ("checkpoint", ["3", "10", "24"]),
    ]
    assert [(line.split()[0].strip(":"), numbers(line)) for line in lines] == expected
    assert re.search(r"\b2 format errors\b.*\b1 timeout\b", lines[0])


def test_lines_are_less_frequent_in_long_steps():
    lines, now = [], [0.0]
    console = PlainConsole(lines.append, interval=5.0, clock=lambda: now[0])
    console.step(0, 1)
    for second in range(7200):
        now[0] = float(second)
        console.progress(progress(second // 500, 0))
    assert 70 < len(lines) < 130  # one every 5 s would be 1,440


def test_plain_without_a_terminal(capsys):
    console = make_console()
    assert isinstance(console, PlainConsole)
    console.note("[bold] stays as it is")
    assert capsys.readouterr().out.endswith("[bold] stays as it is\n")


_SAY = """
import sys
from discover_jax.exceptions import RunError
from discover_jax.runs.console import make_console
try:
    console = make_console()
    console.start(type(console).__name__, ["x" * 100] * 2000)
    console.step(0, 1)
    console.close()
except RunError as error:
    sys.exit(str(error))
"""


def test_forced_colour_draws_no_bars_to_a_pipe():
    said = subprocess.run([sys.executable, "-c", _SAY], env=os.environ | {"FORCE_COLOR": "1"}, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("PlainConsole\n")
    assert "\x1b" not in said.stdout


def test_terminal_gets_bars():
    ours, theirs = pty.openpty()
    speaker = subprocess.Popen([sys.executable, "-c", _SAY], env=os.environ | {"TERM": "xterm"}, stdout=theirs)
    os.close(theirs)
    text = b""
    try:
        while data := os.read(ours, 65536):
            text += data
    except OSError:  # Linux reports a closed other side this way
        pass
    os.close(ours)
    assert speaker.wait() == 0
    assert b"TerminalConsole" in text
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")


def test_failing_standard_output_is_an_error():
    with open("/dev/full", "w") as full:
        said = subprocess.run([sys.executable, "-c", _SAY], stdout=full, stderr=subprocess.PIPE, text=True)
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert "[Errno 28]" in said.stderr
    speaker = subprocess.Popen([sys.executable, "-c", _SAY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert speaker.stdout is not None
    speaker.stdout.close()
    _, stderr = speaker.communicate()
    assert speaker.returncode == 1
    assert stderr.count("\n") == 1
    assert "Broken pipe" in stderr


def test_terminal():
    file = io.StringIO()
    console = TerminalConsole(rich.console.Console(file=file, force_terminal=True, width=100, highlight=False))
    for done in (0, 7_000_000_000, 13_761_264_768):
        console.loading(done, 13_761_264_768)
    console.start("title", ["[red]a"])
    console.phase("loading")
    console.progress(progress(0, 0))
    console.step(2, 10)
    console.phase("sampling")
    console.progress(progress(3, 1, {Outcome.TIMEOUT: 2}))
    console.phase("learning", "12 rollouts in 3 microbatches")
    console.passes(2, 6)
    console.step_done(ROW, bests(best(0.71), 0.7))
    console.finish(["done", "/a/long/path/" * 20])
    console.close()
    text = file.getvalue()
    for part in (
        "7000/13761",
        "title",
        "[red]a",
        "3/10",
        "0.5200",
        "2 timeout",
        "12 rollouts in 3 microbatches",
        "2/6",
        "done",
        "/a/long/path/" * 20,
    ):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again


def test_quiet_console_is_a_console():
    console = QuietConsole()
    console.step(0, 1)
    console.step_done(ROW, bests(None, None))
    console.close()

"""The time left in a step and in the run, computed by hand."""

import re

import pytest

from discover_jax.runs.pace import Pace, duration


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def pace(now):
    return Pace(lambda: now[0])


def lefts(text: str) -> list[str]:
    """The durations in a text: of the step, then of the run."""
    return re.findall(r"\d+ (?:s|min|h \d+ min|d \d+ h)\b", text)


def do(pace, now, step, steps, **phases):
    pace.step(step, steps)
    for name, seconds in phases.items():
        pace.phase(name)
        now[0] += seconds


def test_first_step_estimates_only_the_current_phase(pace, now):
    pace.phase("loading")
    assert (pace.elapsed, pace.left(0.5)) == (0.0, "")
    pace.step(0, 3)
    pace.phase("sampling")
    now[0] = 40.0
    assert pace.left(0.0) == pace.left(1.0) == ""
    assert re.fullmatch(r"~60 s\b.*\bsampling\b.*", pace.left(0.4))
    pace.phase("learning")
    assert pace.left(0.5) == ""
    now[0] = 50.0
    assert re.fullmatch(r"~30 s\b.*\blearning\b.*", pace.left(0.25))


def test_later_steps_use_medians_of_the_last_five_without_the_first(pace, now):
    for step, seconds in enumerate((1000, 50, 60, 70, 9000, 80)):
        do(pace, now, step, 20, sampling=seconds, learning=10, checkpoint=2)
    pace.step(6, 20)
    pace.phase("sampling")
    now[0] += 10
    assert lefts(pace.left(0.1)) == ["72 s", duration(72 + 13 * 82)]  # 70 - 10, and 10 + 2
    now[0] += 70  # longer than usual: estimated from finished rollouts
    assert lefts(pace.left(0.8)) == ["32 s", duration(32 + 13 * 82)]
    pace.phase("learning")
    now[0] += 4
    assert lefts(pace.left(1.0)) == ["8 s", duration(8 + 13 * 82)]
    pace.phase("checkpoint")
    now[0] += 5
    assert lefts(pace.left(1.0)) == ["0 s", duration(13 * 82)]


def test_second_step_uses_the_first(pace, now):
    do(pace, now, 4, 6, sampling=80, learning=20)
    pace.step(5, 6)
    assert lefts(pace.left(0.0)) == ["2 min", "2 min"]  # it is the last step


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3540, "59 min"), (3600, "1 h 00 min"), (90_000, "25 h 00 min"), (200_000, "2 d 8 h")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_phases_that_recur_within_a_step_add_up(pace, now):
    """As the waves of an update: waiting for programs, then learning, twice."""
    for step in range(4):
        pace.step(step, 6)
        for name, seconds in (("sampling", 100), ("programs", 6), ("learning", 20), ("programs", 4), ("learning", 30), ("saving", 5)):
            pace.phase(name)
            now[0] += seconds
    pace.step(4, 6)
    for name, seconds in (("sampling", 100), ("programs", 6), ("learning", 12)):
        pace.phase(name)
        now[0] += seconds
    assert lefts(pace.left(0.6)) == ["47 s", duration(47 + 165)]  # 50 - 12 of learning, 10 - 6 of programs, and 5
    pace.phase("programs")
    assert lefts(pace.left(0.0)) == ["47 s", duration(47 + 165)]
    now[0] += 4
    pace.phase("learning")
    now[0] += 30
    assert lefts(pace.left(0.5)) == ["13 s", duration(13 + 165)]  # 50 - 42, and 5

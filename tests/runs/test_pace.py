"""What is left of step and run, by hand."""

import pytest

from discover_jax.runs.pace import Pace, duration


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def pace(now):
    return Pace(lambda: now[0])


def test_in_the_first_step_only_sampling_can_be_told(pace, now):
    assert (pace.elapsed, pace.left(0.5)) == (0.0, "")
    pace.step(0, 3)
    now[0] = 40.0
    assert pace.left(0.0) == pace.left(1.0) == ""
    assert pace.left(0.4) == "~60 s of sampling left"


def test_later_steps_take_the_median_of_the_last_five_without_the_first(pace, now):
    for step, seconds in enumerate((1000, 50, 60, 70, 9000, 80)):
        pace.step(step, 20)
        now[0] += seconds
    pace.step(6, 20)
    now[0] += 10
    assert pace.left(0.1) == f"~60 s left, of the run {duration(60 + 13 * 70)}"
    now[0] += 70  # longer than usual: what rollouts tell
    assert pace.left(0.8) == f"~20 s left, of the run {duration(20 + 13 * 70)}"
    assert pace.left(1.0) == f"~0 s left, of the run {duration(13 * 70)}"


def test_with_one_step_to_go_by_it_is_better_than_nothing(pace, now):
    pace.step(4, 6)
    now[0] = 100.0
    pace.step(5, 6)
    assert pace.left(0.0) == "~2 min left, of the run 2 min"  # none comes after it


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3540, "59 min"), (3600, "1 h 00 min"), (90_000, "25 h 00 min"), (200_000, "2 d 8 h")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said

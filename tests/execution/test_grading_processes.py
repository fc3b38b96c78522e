"""No submission can end a run by its grading: it exceeds limits, ends the process or makes the grading fail, and is invalid."""

import multiprocessing
import pickle
import re

import pytest
from tiny_competition import BrokenGrading, FragileGrading, LostAnswers, TinyTask

from discover_jax.exceptions import GradingError
from discover_jax.execution.backend import borrowed
from discover_jax.execution.grading import Graders, memory_for
from discover_jax.execution.limits import GIB, MIB
from discover_jax.types import Execution, Outcome, Verdict


def graders_of(task: TinyTask):
    graders = Graders(pickle.dumps([task]), slots=1, seconds=60.0)
    yield graders
    graders.close()
    graders.release()


@pytest.fixture(scope="module")
def fragile(task):
    yield from graders_of(FragileGrading(task.public_dir))


@pytest.fixture(scope="module")
def broken(task):
    yield from graders_of(BrokenGrading(task.public_dir))


@pytest.fixture(scope="module")
def lost(task):
    yield from graders_of(LostAnswers(task.public_dir))


def verdict_on(graders: Graders, csv: bytes) -> Verdict:
    return graders.verdict(0, Execution(Outcome.OK, csv, "", "", 1.0), [])


def test_grading_that_fails_for_the_sample_too_is_the_competitions_fault(broken):
    with pytest.raises(GradingError, match=r"ZeroDivisionError.*sample submission.*Fix the competition's metric"):
        verdict_on(broken, b"good")


@pytest.mark.parametrize(
    ("csv", "said"),
    [(b"memory", "6 bytes needs more than 4.0 GiB"), (b"exit", "process .* ended"), (b"raise", "KeyError"), (b"digits", "ValueError")],
)
def test_submission_that_breaks_the_grading_is_invalid(fragile, csv, said):
    """Also the first one of a run."""
    verdict = verdict_on(fragile, csv)
    assert verdict.outcome is Outcome.INVALID_SUBMISSION
    assert not verdict.grade.valid
    assert re.search(said, verdict.grade.reason), verdict.grade.reason
    assert verdict_on(fragile, b"good").grade.score == 1.0


def test_submission_whose_grading_hangs_is_invalid(fragile, monkeypatch):
    assert verdict_on(fragile, b"good").outcome is Outcome.OK
    with monkeypatch.context() as patch:
        patch.setattr(fragile, "_seconds", 0.5)
        verdict = verdict_on(fragile, b"hang")
    assert verdict.outcome is Outcome.INVALID_SUBMISSION
    assert "longer than 0.5 s" in verdict.grade.reason
    assert verdict_on(fragile, b"good").grade.score == 1.0


def test_answers_that_cannot_be_loaded_are_never_the_submissions_fault(lost):
    with pytest.raises(GradingError, match="DataError: The answers changed"):
        verdict_on(lost, b"good")


def test_memory_grows_with_the_submission():
    assert memory_for(bytes(100)) == 4 * GIB
    assert memory_for(bytes(128 * MIB)) == 8 * GIB


def test_further_processes_start_when_submissions_are_graded_at_once(task, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    before = set(multiprocessing.active_children())
    graders = Graders(pickle.dumps([FragileGrading(task.public_dir)]), slots=8, seconds=60.0)

    def names() -> list[str]:
        return sorted(child.name for child in set(multiprocessing.active_children()) - before)

    try:
        for _ in range(2):
            assert verdict_on(graders, b"good").grade.score == 1.0
            assert names() == ["grading-0"]
        with borrowed(graders._free):
            verdict_on(graders, b"good")
            assert names() == ["grading-0", "grading-1"]
        assert graders._free.qsize() == 3
    finally:
        graders.close()
        graders.release()

"""The final choice, from verdicts that are given by hand."""

import types

import pytest

from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.runs import finalists, recorder
from discover_jax.types import SEED, Attempt, Execution, Grade, Outcome, RunKind, StopReason, Verdict

METRIC = types.SimpleNamespace(higher_is_better=True, name="accuracy")


def _task(name):
    return types.SimpleNamespace(id=name, metric=METRIC, selection_rows=0, score_rows=100, calls=None, public_dirs=(name,))


def _verdict(result, detail="it did not end within 20 s"):
    """Of a score, or of an outcome that is a failure."""
    if isinstance(result, Outcome):
        return Verdict(result, Grade(False, "no score", None, None), Execution(result, None, "", detail, 20.0))
    return Verdict(Outcome.OK, Grade(True, "", score=result, private_score=result), Execution(Outcome.OK, b"", "", "", 1.0))


def _choice(results, again=None, detail="it did not end within 20 s"):
    """The choice for programs, by code: the results of the run and of each retest.

    Args:
      again: the results of the run for programs that run again, because the cache lost their verdicts.
      detail: of failures.
    """
    again = again or {}
    tasks = [_task("run"), *map(_task, ("retest 1", "retest 2"))]
    attempts = [
        Attempt(code, SEED.id, "run", 0, 0, index, code, Outcome.OK, "", "", scores[0], scores[0], scores[0], 0, 1, StopReason.STOP_TOKEN)
        for index, (code, scores) in enumerate(results.items())
    ]
    frontier = Frontier.start(16).after(attempts, reusable=set(results), children=0)

    def run_programs(programs):
        assert programs, "a retest of nothing"
        return [_verdict(again.get(code, results[code][0]) if number == 0 else results[code][number], detail) for code, number in programs]

    return finalists.choose(tasks[:1], {"run": frontier}, {"run": [1, 2]}, tasks, run_programs, count=4)["run"]


TIMEOUT = Outcome.TIMEOUT


@pytest.mark.parametrize(
    ("results", "chosen", "said"),
    [
        ({"a": (0.8, 0.7, 0.7), "b": (0.7, 0.75, 0.75)}, "b", "best of 2 finalists, 4 more program runs"),
        ({"a": (0.8, TIMEOUT, 0.0), "b": (0.7, 0.6, 0.6)}, "b", "3 more program runs; 1 failed in a retest (1 by timeout)"),
        (
            {"a": (0.8, 0.7, TIMEOUT), "b": (0.7, 0.6, TIMEOUT)},
            "a",
            "4 more program runs; 1 retest does not count, because all of its programs failed",
        ),
        ({"a": (0.8, TIMEOUT, TIMEOUT), "b": (0.7, TIMEOUT, TIMEOUT)}, "a", "unknown: no finalist of 2 has a score in a retest"),
    ],
    ids=("all run", "a timeout", "a retest without a score", "no score"),
)
def test_choice_and_its_failures(results, chosen, said):
    choice = _choice(results)
    assert choice.chosen.state.id == chosen
    assert said in choice.text
    assert choice.to_json()["retests_left_out"] == sum(
        all(isinstance(scores[retest], Outcome) for scores in results.values()) for retest in (1, 2)
    )


def test_a_long_reason_keeps_the_outcome():
    """A program chose the end of the reason: the outcome must not come from there."""
    choice = _choice({"a": (0.8, Outcome.EXCEPTION, 0.0), "b": (0.7, 0.6, 0.6)}, detail=f"{'x' * 3000} ok: no failure")
    failed = choice.finalists[1]
    assert failed.failure.startswith("exception: x")
    assert failed.failure.endswith("no failure")
    assert len(failed.failure) <= 500
    assert "1 failed in a retest (1 by exception)" in choice.text


def test_a_program_that_fails_when_it_runs_again_is_not_chosen():
    """The cache of verdicts was deleted: nothing that this program returned could go to best/."""
    choice = _choice({"a": (0.8, 0.9, 0.9), "b": (0.7, 0.6, 0.6)}, again={"a": TIMEOUT})
    assert choice.chosen.state.id == "b"
    assert choice.runs == 2
    assert choice.left_out == 0
    assert "1 failed in a retest (1 by timeout)" in choice.text


def test_without_any_program_that_runs_again_the_highest_reward_stays():
    choice = _choice({"a": (0.8, 0.9, 0.9), "b": (0.7, 0.6, 0.6)}, again={"a": TIMEOUT, "b": TIMEOUT})
    assert (choice.chosen.state.id, choice.runs, choice.left_out) == ("a", 0, 0)
    assert "unknown: no finalist of 2 has a score in a retest" in choice.text


@pytest.mark.parametrize("fails", [True, False])
def test_best_is_kept_if_the_chosen_program_has_no_result(tmp_path, monkeypatch, fails):
    """The verdict of the choice, whose only source is another run of the program, says that it failed."""
    outcome = TIMEOUT if fails else 0.8
    choice = _choice({"a": (0.8, 0.9, 0.9)}, again={"a": outcome})
    written, notes = [], []
    monkeypatch.setattr(recorder, "write_best", lambda folder, **_: written.append(folder))
    monkeypatch.setattr(recorder, "grade_of", lambda *_: {})
    (tmp_path / "disclosure.json").write_text("{}")
    workdir = types.SimpleNamespace(
        path=tmp_path, best_dir=tmp_path / "best", metrics_path=tmp_path / "metrics.jsonl", outputs_dir=tmp_path / "outputs"
    )
    state = types.SimpleNamespace(frontiers={})
    console = types.SimpleNamespace(note=notes.append)
    journal = Journal(tmp_path / "journal.jsonl")
    one = recorder.RunRecorder(
        workdir,  # pyright: ignore[reportArgumentType]
        journal,
        console,  # pyright: ignore[reportArgumentType]
        None,  # pyright: ignore[reportArgumentType]
        [choice.task],
        None,  # pyright: ignore[reportArgumentType]
        {"run": ""},
        state,  # pyright: ignore[reportArgumentType]
        lambda task, state: _verdict(TIMEOUT),
        kind=RunKind.TRAIN,
        seed=0,
        last_step=1,
    )
    monkeypatch.setattr(one._report, "write", lambda: None)
    one.choose({"run": choice})
    assert written == ([] if fails else [tmp_path / "best"])
    assert any("best/ keeps the program before" in note for note in notes) == fails

"""The final choice, from verdicts that are given by hand."""

import types

import pytest

from discover_jax.archive.frontier import Frontier
from discover_jax.runs import finalists
from discover_jax.types import SEED, Attempt, Execution, Grade, Outcome, StopReason, Verdict

METRIC = types.SimpleNamespace(higher_is_better=True)


def _task(name):
    return types.SimpleNamespace(id=name, metric=METRIC, selection_rows=0, score_rows=100, calls=None, public_dirs=(name,))


def _verdict(result):
    """Of a score, or of an outcome that is a failure."""
    if isinstance(result, Outcome):
        return Verdict(result, Grade(False, "no score", None, None), Execution(result, None, "", "it did not end within 20 s", 20.0))
    return Verdict(Outcome.OK, Grade(True, "", score=result, private_score=result), Execution(Outcome.OK, b"", "", "", 1.0))


def _choice(results):
    """The choice for programs, by code: the results of the run and of each retest."""
    tasks = [_task("run"), *map(_task, ("retest 1", "retest 2"))]
    attempts = [
        Attempt(code, SEED.id, "run", 0, 0, index, code, Outcome.OK, "", "", scores[0], scores[0], scores[0], 0, 1, StopReason.STOP_TOKEN)
        for index, (code, scores) in enumerate(results.items())
    ]
    frontier = Frontier.start(16).after(attempts, reusable=set(results), children=0)

    def run_programs(programs):
        return [_verdict(results[code][number]) for code, number in programs]

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

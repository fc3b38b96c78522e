"""What holds for all bundled problems."""

import pickle

import pytest
from programs import Returns, page_of

from discover_jax.tasks.problem import Rejection
from discover_jax.tasks.problems import autocorrelation, circle_packing, counting_inversions, erdos_overlap, online_bin_packing
from discover_jax.tasks.rewards import reward_of

PROBLEMS = (
    circle_packing.PROBLEM_26,
    circle_packing.PROBLEM_32,
    erdos_overlap.PROBLEM,
    autocorrelation.PROBLEM_1,
    autocorrelation.PROBLEM_2,
    online_bin_packing.PROBLEM,
    counting_inversions.PROBLEM,
)
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
# Of bad valid solutions: circles of radius 1e-6, h = 1 on half of [0, 2], one narrow peak among 1,000 pieces, a bin for each item, and a
# count that takes 100 times as long as the reference.
BAD_SCORES = {
    "circle-packing-26": 26e-6,
    "circle-packing-32": 32e-6,
    "erdos-overlap": 1.0,
    "autocorrelation-1": 2000.0,
    "autocorrelation-2": 0.1,
    "online-bin-packing": 1.5,
    "counting-inversions": 0.01,
}


def test_ids():
    assert {problem.id for problem in PROBLEMS} == set(BAD_SCORES)


@every_problem
def test_bad_solutions_are_worth_more_than_failures_and_less_than_records(problem):
    def reward(score):
        return reward_of(score, problem.transform, problem.higher_is_better, problem.failure_reward)

    assert reward(BAD_SCORES[problem.id]) > problem.failure_reward
    for record in problem.records:
        assert reward(record.score) > reward(BAD_SCORES[problem.id])


@every_problem
def test_texts_are_filled_in(problem):
    for text in (problem.description, problem.interface, problem.seed_program):
        assert text.strip()
    assert "{" not in problem.description + problem.interface
    assert max(map(len, problem.description.splitlines())) <= 140
    assert 5 <= len(problem.seed_program.splitlines()) <= 40


@every_problem
def test_page_shows_the_records_and_a_command(problem):
    page = page_of(problem).read_text()
    records, run = page.partition("## Published records")[2].split("## Run")
    shown = [line for line in records.splitlines() if line.startswith(f"| `{problem.id}` |")]
    assert shown == [f"| `{problem.id}` | {record.name} | {record.score!r} | {record.source} |" for record in problem.records]
    assert f"--config.task.competition={problem.id.rstrip('0123456789')}" in run
    assert f"`{problem.id}`" in page.partition("## ")[0]


@every_problem
def test_evaluate_can_be_sent_to_a_process(problem):
    assert callable(pickle.loads(pickle.dumps(problem.evaluate)))


@pytest.mark.parametrize("problem", PROBLEMS[:-1], ids=lambda problem: problem.id)  # counting inversions takes seconds
@pytest.mark.parametrize("value", [None, float("nan"), "1", {}, [], [[]], [[[]]]], ids=repr)
def test_hostile_values(problem, value):
    with pytest.raises(Rejection, match="must"):
        problem.evaluate(Returns(value))

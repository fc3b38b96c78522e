"""The advantages of a step: objectives from the config and the step's number, by hand from rewards."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from discover_jax import config as settings
from discover_jax import stages, task_checks, typed_settings
from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.exceptions import ConfigError
from discover_jax.learning.advantages import entropic, frontier, max_at_k
from discover_jax.learning.estimates import GradedGroup, Objective, estimate_step
from discover_jax.learning.signals import Diversity, FailureHandling
from discover_jax.runs.metrics import SCHEMA
from discover_jax.runs.workdir import _LATER_SETTINGS
from discover_jax.types import Attempt, Outcome, RunKind, State, StopReason

REWARDS = [0.2, 0.9, 0.5, 0.5]


def attempts(rewards, group=0, task="boats"):
    """One group; None is a failure, with reward 0."""
    fields = {"detail": "", "stdout": "", "private_score": None, "adapter_step": 0, "tokens": 3, "stop": StopReason.STOP_TOKEN}
    return [
        Attempt(
            f"0-{group}-{index}",
            "seed",
            task,
            0,
            group,
            index,
            code=f"{group}, {index}",
            outcome=Outcome.EXCEPTION if reward is None else Outcome.OK,
            score=reward,
            reward=reward or 0.0,
            **fields,
        )
        for index, reward in enumerate(rewards)
    ]


def train(**changes):
    config = settings.default_config()
    config.train.update(ConfigDict(changes))
    return config.train


def values(estimates, group=0):
    return [estimates.advantages[group, index] for index in range(4)]


def test_the_default_objective_is_the_reports_to_the_bit():
    objective = typed_settings.objective_of_step(train(), 3)
    assert (objective.estimator, objective.beta, objective.failures) == ("entropic", 2.0, FailureHandling("reward"))
    group = [0.2, 0.9, None, 0.5]
    estimates = estimate_step([GradedGroup(attempts(group), best=5.0)], objective=objective, diversity=Diversity())
    np.testing.assert_array_equal(values(estimates), entropic([0.2, 0.9, 0.0, 0.5], beta=2.0).values_K)
    assert not {"advantage/k", "advantage/frontier_weight"} & estimates.metrics.keys()


def test_k_and_weight_follow_the_step():
    section = train(advantage="max_at_k", max_at_k=1, max_at_k_last=3, max_at_k_steps=5, steps=10)
    assert [typed_settings.objective_of_step(section, step).k for step in range(7)] == [1, 2, 2, 3, 3, 3, 3]
    assert {typed_settings.objective_of_step(train(advantage="max_at_k", steps=10), step).k for step in range(10)} == {4}
    section = train(advantage="frontier", frontier_start=2, steps=5)
    assert [typed_settings.objective_of_step(section, step).weight for step in range(5)] == [0, 0, 0, 0.5, 1]
    section = train(advantage="frontier", frontier_start=2, frontier_steps=1, steps=5)
    assert [typed_settings.objective_of_step(section, step).weight for step in range(5)] == [0, 0, 1, 1, 1]


def test_metrics_name_what_the_schedule_set():
    objective = Objective("frontier", k=2, weight=0.25)
    estimates = estimate_step([GradedGroup(attempts(REWARDS))], objective=objective, diversity=Diversity())
    assert (estimates.metrics["advantage/k"], estimates.metrics["advantage/frontier_weight"]) == (2.0, 0.25)
    assert estimates.metrics.keys() <= SCHEMA.keys()
    np.testing.assert_array_equal(values(estimates), frontier(REWARDS, k=2, weight=0.25).values_K)


@pytest.mark.parametrize("estimator", ["mean_baseline", "entropic", "entropic_loo", "entropic_adaptive", "max_at_k", "frontier"])
def test_every_estimator_takes_placed_failures(estimator):
    """The failure gets 0.5 - (the standard deviation of 0.5, 0.7, 0.9), as if this had been its reward."""
    group, as_if = [0.5, None, 0.9, 0.7], [0.5, 0.5 - np.std([0.5, 0.7, 0.9]), 0.9, 0.7]
    handling = FailureHandling("spread", 1.0)
    placed = estimate_step([GradedGroup(attempts(group))], objective=Objective(estimator, k=2, failures=handling), diversity=Diversity())
    expected = estimate_step([GradedGroup(attempts(as_if))], objective=Objective(estimator, k=2), diversity=Diversity())
    np.testing.assert_array_equal(values(placed), values(expected))


def run(section, tasks=("boats",), first=10):
    """What `stages.estimate` reads of a run, which begins with step `first`."""
    notes = []
    return types.SimpleNamespace(
        config=types.SimpleNamespace(train=section, diversity=settings.default_config().diversity),
        kind=RunKind.TRAIN,
        last_step=first + section.steps,
        recorder=types.SimpleNamespace(note=notes.append, notes=notes),
        tasks=[types.SimpleNamespace(id=id, transform="identity", signals=list, failure_reward=0.0) for id in tasks],
    )


def state(value):
    return State(id="0-0-9", parent_id="seed", code="best", value=value, score=value, stdout="", step=0, adapter_step=0)


def test_the_frontier_is_the_best_of_the_groups_own_competition_before_the_step():
    section = train(advantage="frontier", max_at_k=1, frontier_steps=1, steps=4)
    one = run(section, tasks=("boats", "houses", "trees"))
    groups = [types.SimpleNamespace(task=task) for task in one.tasks]
    seeded = Frontier(Archive((), 10), seed=State("seed", None, "program", 0.8, 0.8, "", -1, 0))
    frontiers = {"boats": Frontier(Archive((), 10), best=state(0.4)), "houses": Frontier(Archive((), 10)), "trees": seeded}
    rows = [row for group, task in enumerate(one.tasks) for row in attempts(REWARDS, group, task.id)]
    estimates = stages.estimate(one, groups, rows, frontiers, 10, range(len(groups)))
    for group, best in enumerate([0.4, None, 0.8]):
        np.testing.assert_array_equal(values(estimates, group), frontier(REWARDS, k=1, best=best).values_K)
    section = train(advantage="frontier", max_at_k=2, frontier_steps=1, steps=4, frontier_base="group")
    estimates = stages.estimate(run(section), groups[:1], rows[:4], frontiers, 10, range(1))
    np.testing.assert_array_equal(values(estimates), frontier(REWARDS, k=2).values_K)


def test_copies_of_archived_programs_and_of_the_seed_count_as_failures_if_asked():
    one = run(train(advantage="mean_baseline"))
    one.config.diversity.copies = "fail"
    seed = State("seed", None, "program", 0.2, 0.2, "", -1, 0)
    frontiers = {"boats": Frontier(Archive((state(0.5),), 10), seed=seed)}
    estimates = stages.estimate(one, [types.SimpleNamespace(task=one.tasks[0])], attempts(REWARDS), frontiers, 10, range(1))
    np.testing.assert_allclose(values(estimates), np.array([0.0, 0.9, 0.0, 0.0]) - 0.9 / 4)
    assert estimates.metrics["diversity/copy_frac"] == 0.75


def test_copies_of_noisy_scores_without_row_results_cannot_be_recognised():
    tasks = [
        types.SimpleNamespace(id=id, noisy=noisy, has_row_results=rows) for id, noisy, rows in (("a", True, True), ("b", False, False))
    ]
    task_checks.check_copies("fail", 0.0, tasks)
    blind = types.SimpleNamespace(id="houses", noisy=True, has_row_results=False)
    task_checks.check_copies("keep", 0.0, [*tasks, blind])
    with pytest.raises(ConfigError, match=r"diversity\.copies.*houses"):
        task_checks.check_copies("fail", 0.0, [*tasks, blind])


def test_a_tolerance_for_copies_needs_a_task_without_results_of_rows():
    boats, circles = (types.SimpleNamespace(id=id, noisy=rows, has_row_results=rows) for id, rows in (("boats", True), ("circles", False)))
    task_checks.check_copies("fail", 1e-6, [boats, circles])
    with pytest.raises(ConfigError, match=r"diversity\.copy_tolerance.*boats"):
        task_checks.check_copies("fail", 1e-6, [boats])


def test_a_copy_gets_the_failure_reward_of_its_own_competition_and_only_its_own_archive_counts():
    one = run(train(advantage="mean_baseline"), tasks=("boats", "houses"))
    one.config.diversity.copies = "fail"
    one.tasks[1].failure_reward = -3.0
    groups = [types.SimpleNamespace(task=task) for task in one.tasks]
    rows = [row for group, task in enumerate(one.tasks) for row in attempts([0.2, 0.9, 0.6, 0.4], group, task.id)]
    frontiers = {"boats": Frontier(Archive((state(0.2),), 10)), "houses": Frontier(Archive((state(0.9),), 10))}
    estimates = stages.estimate(one, groups, rows, frontiers, 10, range(len(groups)))
    for group, rewards in enumerate(([0.0, 0.9, 0.6, 0.4], [0.2, -3.0, 0.6, 0.4])):
        np.testing.assert_allclose(values(estimates, group), np.array(rewards) - np.mean(rewards))


def test_the_schedule_counts_the_steps_of_this_run():
    """A run that continues another one begins with a later step."""
    section = train(advantage="max_at_k", max_at_k=1, max_at_k_last=3, steps=3)
    one = run(section)
    for step, k in ((10, 1), (11, 2), (12, 3)):
        estimates = stages.estimate(
            one, [types.SimpleNamespace(task=one.tasks[0])], attempts(REWARDS), {"boats": Frontier(Archive((), 10))}, step, range(1)
        )
        np.testing.assert_array_equal(values(estimates), max_at_k(REWARDS, k=k).values_K)


def test_groups_that_are_too_small_for_k_are_reported_with_the_number():
    one = run(train(advantage="max_at_k", max_at_k=4, steps=3))
    estimates = stages.estimate(
        one, [types.SimpleNamespace(task=one.tasks[0])], attempts(REWARDS), {"boats": Frontier(Archive((), 10))}, 10, range(1)
    )
    stages.join_estimates(one, [estimates])
    assert not estimates.advantages
    assert "at least 5" in one.recorder.notes[0]


def test_ranks_cannot_be_compared_with_the_best_so_far():
    tasks = [types.SimpleNamespace(id="boats", transform="identity"), types.SimpleNamespace(id="houses", transform="rank_in_group")]
    task_checks.check_objective(train(advantage="frontier"), tasks[:1])
    task_checks.check_objective(train(advantage="frontier", frontier_base="group"), tasks)
    task_checks.check_objective(train(), tasks)
    with pytest.raises(ConfigError, match=r"frontier_base.*houses"):
        task_checks.check_objective(train(advantage="frontier"), tasks)


def test_earlier_runs_had_the_defaults_of_the_new_settings():
    known = settings.settings()
    names = [name for name in known if name.startswith(("train.max_at_k", "train.f"))]
    assert len(names) == 8
    assert {name: known[name].default for name in names} == {name: _LATER_SETTINGS[name] for name in names}

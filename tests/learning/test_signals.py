"""Signals of a group: the rewards by default; novelty bonus and duplicates by hand on small programs."""

import dataclasses

import numpy as np
import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.learning.advantages import advantage_metrics, estimate_groups
from discover_jax.learning.signals import Diversity, FailureHandling, diversity_metrics, group_signals, place_failures
from discover_jax.runs.summary import step_row
from discover_jax.text.structure import structure_distance, structure_parts
from discover_jax.types import Attempt, Outcome, StopReason

A, B, C = "def run():\n    return 1", "def run():\n    return 2", "def run():\n    for i in range(9):\n        print(i)\n    return i"
RENAMED_C = C.replace("i)", "k)").replace("i in", "k in").replace("return i", "return k")


def attempt(index, code, reward=0.5, outcome=Outcome.OK):
    score = reward if outcome is Outcome.OK else None
    fields = {"detail": "", "stdout": "", "private_score": None, "adapter_step": 0, "tokens": 3, "stop": StopReason.STOP_TOKEN}
    return Attempt(f"0-0-{index}", "seed", "boats", 0, 0, index, code=code, outcome=outcome, score=score, reward=reward, **fields)


GROUP = [
    attempt(0, A, 0.5),
    attempt(1, C, 0.75),
    attempt(2, RENAMED_C, 0.75),
    attempt(3, None, 0.0, Outcome.FORMAT_ERROR),
    attempt(4, B, 0.0, Outcome.EXCEPTION),
    attempt(5, None, 0.0, Outcome.FORMAT_ERROR),
]


def test_by_default_signals_are_the_rewards():
    signals = group_signals(GROUP, list, Diversity())
    assert signals.values_K.tolist() == [0.5, 0.75, 0.75, 0.0, 0.0, 0.0]
    assert signals.included_K.all()


def test_the_bonus_is_the_distance_to_the_nearest_program_with_a_score():
    """Copies of each other get no bonus. Failures get no bonus either, and do not count as neighbours."""
    signals = group_signals(GROUP, list, Diversity(novelty_bonus=0.2))
    distance = structure_distance(structure_parts(A), structure_parts(C))
    assert 0.3 < distance < 1.0
    np.testing.assert_allclose(signals.values_K, [0.5 + 0.2 * distance, 0.75, 0.75, 0.0, 0.0, 0.0])
    assert group_signals([GROUP[0], GROUP[4]], list, Diversity(novelty_bonus=0.2)).values_K.tolist() == [0.5, 0.0]


def test_dropped_duplicates_are_those_after_the_first():
    """Rollouts without a program are not duplicates of each other."""
    signals = group_signals(GROUP, list, Diversity(duplicates="drop"))
    assert signals.included_K.tolist() == [True, True, False, True, True, True]


KNOWN = {(0.5, "bits: a"), (0.9, "bits: d")}
COPIES = [
    dataclasses.replace(attempt(0, B, 0.5), rows="bits: a"),  # the results of an earlier step, by other code
    dataclasses.replace(attempt(1, C, 0.75), rows="bits: b"),
    dataclasses.replace(attempt(2, A, 0.75), rows="bits: b"),  # the results of the one before
    dataclasses.replace(attempt(3, C, 0.5), rows="bits: c"),  # a known score on other rows
    attempt(4, B, -3.0, Outcome.EXCEPTION),
]


def test_copies_of_earlier_programs_can_count_as_failures():
    signals = group_signals(COPIES, list, Diversity(copies="fail"), known=KNOWN, failure_reward=-3.0)
    assert signals.values_K.tolist() == [-3.0, 0.75, -3.0, 0.5, -3.0]
    assert signals.failed_K.tolist() == [True, False, True, False, True]
    assert signals.included_K.all()
    kept = group_signals(COPIES, list, Diversity(), known=KNOWN, failure_reward=-3.0)
    assert kept.values_K.tolist() == [0.5, 0.75, 0.75, 0.5, -3.0]
    assert kept.failed_K.tolist() == [False] * 4 + [True]


def test_copies_get_no_bonus_and_are_placed_like_failures():
    diversity = Diversity(copies="fail", novelty_bonus=0.5)
    bonus = group_signals(COPIES, list, diversity, known=KNOWN, failure_reward=-3.0)
    assert bonus.values_K[[0, 2, 4]].tolist() == [-3.0] * 3
    signals = group_signals(COPIES, list, Diversity(copies="fail"), known=KNOWN, failure_reward=-3.0)
    (placed,) = place_failures([signals], [COPIES], FailureHandling("spread", 2.0))
    assert placed.values_K.tolist() == [0.25, 0.75, 0.25, 0.5, 0.25]  # the spread of 0.5 and 0.75 is 0.125


def test_a_problem_has_no_rows_so_equal_scores_make_a_copy():
    group = [attempt(0, A, 0.5), attempt(1, B, 0.5), attempt(2, C, 0.25)]
    assert group_signals(group, list, Diversity(copies="fail")).values_K.tolist() == [0.5, 0.0, 0.25]
    assert group_signals(group, list, Diversity(copies="fail"), known={(0.5, "")}).values_K.tolist() == [0.0, 0.0, 0.25]
    assert diversity_metrics([group], [{(0.5, "")}])["diversity/copy_frac"] == pytest.approx(2 / 3)


def test_scores_within_the_tolerance_are_copies():
    """A packing with a smaller rounding margin is the same packing. Each is compared with all before it, copies included."""
    scores = (2.0 + 3e-7, 1.0, 1.0 + 9e-7, 1.0 + 18e-7, 2.0 - 2e-6, 1.5)
    group = [attempt(index, A, score) for index, score in enumerate(scores)]
    diversity = Diversity(copies="fail", copy_tolerance=1e-6)
    signals = group_signals(group, list, diversity, known={(2.0, ""), (1.5, "bits: a"), (None, "")}, failure_reward=-1.0)
    assert signals.failed_K.tolist() == [True, False, True, True, False, False]
    known = [{(2.0, ""), (1.5, "bits: a")}]
    assert diversity_metrics([group], known, copy_tolerance=1e-6)["diversity/copy_frac"] == 0.5
    assert diversity_metrics([group], known)["diversity/copy_frac"] == 0.0
    of_rows = [dataclasses.replace(one, rows=f"bits: {index}") for index, one in enumerate(group)]
    assert not group_signals(of_rows, list, diversity, known={(2.0, "bits: z")}).failed_K.any()  # rows decide, however close the scores


@pytest.mark.parametrize("tolerance", [-1e-9, float("inf"), float("nan")])
def test_refuses_tolerances_that_mean_nothing(tolerance):
    with pytest.raises(ConfigError, match="copy_tolerance"):
        Diversity(copy_tolerance=tolerance)


@pytest.mark.parametrize(("others", "used"), [([B], False), ([B, C], True)])
def test_groups_with_too_few_distinct_programs_have_no_signal_for_the_adaptive_estimator(others, used):
    """Seven copies and one other program leave two rollouts, which would get advantages of -1 and 1e12."""
    group = [attempt(index, A, 0.5) for index in range(7)] + [
        attempt(7 + index, code, 0.75 + index / 8) for index, code in enumerate(others)
    ]
    signals = group_signals(group, list, Diversity(duplicates="drop"))
    assert signals.included_K.sum() == 1 + len(others)
    (estimated,) = estimate_groups([signals.values_K[signals.included_K]], "entropic_adaptive")
    assert (estimated is not None) == used
    assert estimated is None or np.abs(estimated.values_K).max() < 100
    assert advantage_metrics([estimated])["groups/unused_frac"] == (0.0 if used else 1.0)


@pytest.mark.parametrize(
    ("rewards", "diversity", "constant", "unused"),
    [
        ((0.5, 0.5), Diversity(), 1.0, 1.0),
        ((0.5, 0.75), Diversity(), 0.0, 0.0),
        ((0.5, 0.5, 0.5), Diversity(novelty_bonus=0.1), 1.0, 0.0),  # two copies and a different program
        ((0.5, 0.5), Diversity(novelty_bonus=0.1), 1.0, 1.0),
        ((0.5, 0.6), Diversity(duplicates="drop"), 0.0, 1.0),  # one program with two rewards, because of noise
    ],
)
def test_a_step_counts_groups_of_equal_rewards_and_groups_without_a_signal_separately(rewards, diversity, constant, unused):
    codes = (A, A, C)
    attempts = [attempt(index, codes[index], reward) for index, reward in enumerate(rewards)]
    if diversity == Diversity():
        attempts[1] = attempt(1, B, rewards[1])
    signals = group_signals(attempts, list, diversity)
    learning = advantage_metrics(estimate_groups([signals.values_K[signals.included_K]], "entropic"))
    row = step_row(0, attempts, best={"boats": None}, timings={}, learning_metrics=learning)
    assert (row["groups/constant_frac"], row["groups/unused_frac"]) == (constant, unused)


def test_the_bonus_is_added_after_the_task_s_transform():
    signals = group_signals(GROUP, lambda rewards: [10 * reward for reward in rewards], Diversity(novelty_bonus=0.2))
    assert signals.values_K[1] == 7.5
    assert 5.0 < signals.values_K[0] < 5.2


def test_metrics_of_a_step():
    groups = [GROUP, [attempt(0, A), attempt(1, A)], []]
    metrics = diversity_metrics(groups, [()] * 3)
    # Programs: A, C, C', B | A, A. Copies within their group: C', A. Structures: A, B, C.
    assert metrics["diversity/duplicate_frac"] == pytest.approx(2 / 6)
    assert metrics["diversity/distinct_frac"] == pytest.approx(3 / 6)
    parts = [structure_parts(code) for code in (A, C, C, B)]
    pairs = [structure_distance(parts[i], parts[j]) for i in range(4) for j in range(i)] + [0.0]
    assert metrics["diversity/distance"] == pytest.approx(np.mean(pairs))
    assert set(diversity_metrics([[attempt(0, None, outcome=Outcome.FORMAT_ERROR)]], [()]).values()) == {None}


@pytest.mark.parametrize("bad", [{"novelty_bonus": -0.1}, {"novelty_bonus": float("nan")}, {"duplicates": "some"}, {"copies": "drop"}])
def test_invalid_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Diversity(**bad)


SPREAD = FailureHandling("spread", 2.0)


def placed(groups, handling=SPREAD, diversity=None):
    """The signals after `place_failures`. A group is a list of rewards; None is a failure, with reward -9."""
    attempts_GK = [
        [attempt(i, None, -9.0, Outcome.TIMEOUT) if r is None else attempt(i, (A, B, C)[i % 3], r) for i, r in enumerate(group)]
        for group in groups
    ]
    signals_G = [group_signals(attempts_K, list, diversity or Diversity()) for attempts_K in attempts_GK]
    return [signals.values_K.tolist() for signals in place_failures(signals_G, attempts_GK, handling)]


def test_a_failure_is_placed_below_the_worst_valid_attempt():
    """0.5 and 0.75 have a standard deviation of 0.125; two of these below 0.5 is 0.25."""
    assert placed([[0.5, None, 0.75, None]]) == [[0.5, 0.25, 0.75, 0.25]]
    assert placed([[0.5, None, 0.75]], FailureHandling("spread", 0.0)) == [[0.5, 0.5, 0.75]]
    assert placed([[0.5, None, 0.75]], FailureHandling()) == [[0.5, -9.0, 0.75]]


def test_a_group_without_a_spread_of_its_own_uses_that_of_the_others():
    """The other groups have the spreads 0.125 and 0.25. Twice their mean is 0.375."""
    others = [[0.5, 0.75], [0.0, 0.5, None]]
    assert placed([[0.5, None], *others])[0] == [0.5, 0.125]  # one valid attempt
    assert placed([[0.5, 0.5, None], *others])[0] == [0.5, 0.5, 0.125]  # equal ones
    assert placed([[None, None], *others])[0] == [-9.0, -9.0]  # none
    assert placed([[0.5, None], [0.75, 0.75, None]]) == [[0.5, -9.0], [0.75, 0.75, -9.0]]  # no group shows a spread
    assert placed([[]]) == [[]]


def test_spreads_are_not_shared_between_tasks():
    own, other = [attempt(0, A, 0.5), attempt(1, None, -9.0, Outcome.TIMEOUT)], [attempt(0, A, 0.5), attempt(1, B, 0.75)]
    other = [dataclasses.replace(one, task="houses") for one in other]
    signals_G = [group_signals(group, list, Diversity()) for group in (own, other)]
    assert place_failures(signals_G, [own, other], SPREAD)[0].values_K.tolist() == [0.5, -9.0]


def test_dropped_duplicates_do_not_count_for_the_spread():
    """The fourth program is a copy of the first, so only 0.5 and 0.75 count, and a bonus for novelty would count too."""
    assert placed([[0.5, 0.75, None, 0.1]], diversity=Diversity(duplicates="drop"))[0][2] == 0.25
    assert placed([[0.5, 0.75, None]], diversity=Diversity(novelty_bonus=1.0))[0][2] > 0.25


def test_failures_no_longer_drown_the_other_differences():
    """With the failure reward, the advantages of the valid programs hardly differ. With "spread", the best stands out."""
    group = [0.80, 0.81, 0.79, 0.805, None, None, 0.795, 0.80]

    def share(handling):
        (values,) = placed([group], handling)
        values = [0.0 if value == -9.0 else value for value in values]
        (estimated,) = estimate_groups([values], "mean_baseline")
        assert estimated is not None
        valid = estimated.values_K[[reward is not None for reward in group]]
        return np.ptp(valid) / np.ptp(estimated.values_K)

    assert share(FailureHandling()) < 0.03
    assert share(FailureHandling("spread", 1.0)) > 0.7


@pytest.mark.parametrize(
    ("bad", "words"), [({"kind": "zero"}, "failures = 'zero'.*reward, spread"), ({"multiple": -1.0}, r"failure_spread.*-1\.0")]
)
def test_invalid_handling_of_failures_is_refused(bad, words):
    with pytest.raises(ConfigError, match=words):
        FailureHandling(**bad)

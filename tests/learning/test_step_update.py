"""The update in waves, on the bigram policy: by hand, and beside an update of all rollouts at once."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bigram import LIMITS, SLOPES, Bigram, base_gaps, by_hand, make_rollouts

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.packing import pack, pack_substeps, values_of_tokens
from discover_jax.learning.step_update import StepUpdate, UpdatePlan
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.learning.update import Update

PLAN = UpdatePlan(3, 1, row_tokens=24, rows=2, lengths=3)


@pytest.fixture(scope="module")
def tables():
    rng = np.random.default_rng(5)
    return jax.device_put(rng.normal(size=(7, 7)).astype(np.float32)), jax.device_put((0.3 * rng.normal(size=(7, 7))).astype(np.float32))


def groups_of(count, size=3, seed=1):
    """Rollouts of `count` groups, with their advantages."""
    rollouts, advantages = make_rollouts(seed, count * size)
    return [dataclasses.replace(r, group=i // size, index=i % size) for i, r in enumerate(rollouts)], advantages


def in_waves(update, plan, frozen, table, rollouts, waves, optimizer, on_pass=None):
    """State and metrics after these waves, each a list of (rollout, advantage)."""
    step = StepUpdate(update, frozen, init_train_state({"table": jnp.array(table)}, optimizer), plan, on_pass)
    if step.measures_ahead:
        step.measure_base(rollouts)
    for wave in waves:
        step.add(step.packed([rollout for rollout, _ in wave], [advantage for _, advantage in wave]))
    return step.finish()


def split(rollouts, advantages, count):
    return [[(rollouts[i], advantages[i]) for i in part] for part in np.array_split(np.arange(len(rollouts)), count)]


@pytest.mark.parametrize(
    ("loss", "reduction"), [*((loss, "token_mean") for loss in SLOPES), ("importance_sampling", "sum"), ("ppo", "sequence_mean")]
)
def test_gradient_is_that_of_the_closed_form_and_metrics_are_those_of_one_wave(tables, loss, reduction):
    """Gradient descent with rate 1 shows the gradient. A wave without a rollout in the update adds nothing."""
    frozen, table = tables
    rollouts, advantages = groups_of(3)
    optimizer = optax.sgd(1.0)
    update = Update(Bigram(), optimizer, loss=loss, reduction=reduction, limits=LIMITS)
    first, second, third = split(rollouts, advantages, 3)
    state, metrics = in_waves(update, dataclasses.replace(PLAN, waves=4), frozen, table, rollouts, [first, [], second, third], optimizer)
    _, expected, *_ = by_hand(frozen + table, rollouts, advantages, reduction, loss)
    np.testing.assert_allclose(table - state.lora["table"], expected, rtol=1e-4, atol=2e-6 * max(1.0, np.abs(expected).max()))
    batches = pack(rollouts, advantages, **PLAN.row_shape)
    _, whole = update.update(frozen, init_train_state({"table": jnp.array(table)}, optimizer), batches)
    filled = metrics.pop("update/filled_frac")
    assert 0 < filled <= 1
    assert metrics == pytest.approx({name: value for name, value in whole.items() if name != "update/filled_frac"}, rel=1e-5)


@pytest.mark.parametrize("dropped", [0, 4])
def test_kl_mean_is_over_all_rollouts_of_the_step(tables, dropped):
    """Also over those that the update leaves out, which are only known when the last program has ended."""
    frozen, table = tables
    rollouts, advantages = groups_of(3)
    gaps = base_gaps(frozen, rollouts)
    mean = sum(gap.sum() for gap in gaps) / sum(r.chosen_T.sum() for r in rollouts)
    kept = range(dropped, len(rollouts))
    shaped = [advantages[i] + 0.7 * (mean - gaps[i]) for i in kept]
    _, expected, *_ = by_hand(frozen + table, [rollouts[i] for i in kept], shaped, "token_mean")
    optimizer = optax.sgd(1.0)
    update = Update(Bigram(), optimizer, reduction="token_mean", kl_coefficient=0.7)
    waves = [[pair for pair in wave if pair[0].group * 3 + pair[0].index >= dropped] for wave in split(rollouts, advantages, 3)]
    state, metrics = in_waves(update, PLAN, frozen, table, rollouts, waves, optimizer)
    np.testing.assert_allclose(table - state.lora["table"], expected, rtol=1e-4, atol=2e-6)
    assert metrics["kl_base/mean"] == pytest.approx(mean, rel=1e-5)


def test_measuring_the_kl_changes_nothing_else(tables):
    frozen, table = tables
    rollouts, advantages = groups_of(3)
    results = []
    for measure_kl in (False, True):
        update = Update(Bigram(), adam(), measure_kl=measure_kl)
        state, metrics = in_waves(update, PLAN, frozen, table, rollouts, split(rollouts, advantages, 3), adam())
        assert ("kl_base/mean" in metrics) == measure_kl
        results.append((state.lora["table"], {name: value for name, value in metrics.items() if name != "kl_base/mean"}))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean"])
def test_optimiser_steps_take_whole_waves(tables, reduction):
    """Four waves in two optimiser steps are two updates of two waves each, with ratios to the sampler in the second. A step whose waves
    are all empty is skipped."""
    frozen, table = tables
    rollouts, advantages = groups_of(4)
    optimizer = adam(1e-2)
    update = Update(Bigram(), optimizer, reduction=reduction)
    waves = split(rollouts, advantages, 4)
    plan = dataclasses.replace(PLAN, waves=4, substeps=2)
    state, metrics = in_waves(update, plan, frozen, table, rollouts, waves, optimizer)
    parts = pack_substeps(rollouts, advantages, substeps=2, **PLAN.row_shape)
    expected, whole = update.update_in_substeps(frozen, init_train_state({"table": jnp.array(table)}, optimizer), parts)
    assert int(state.step) == int(expected.step) == 2
    np.testing.assert_allclose(state.lora["table"], expected.lora["table"], rtol=1e-5, atol=1e-6)
    assert {name: metrics[name] for name in ("loss", "grad_norm", "tokens", "logprob_gap/mean", "ratio/max")} == pytest.approx(
        {name: whole[name] for name in ("loss", "grad_norm", "tokens", "logprob_gap/mean", "ratio/max")}, rel=1e-4
    )
    state, _ = in_waves(update, plan, frozen, table, rollouts, [[], [], *waves[2:]], optimizer)
    assert int(state.step) == 1


def test_one_wave_is_the_update_of_earlier_versions_to_the_bit(tables):
    frozen, table = tables
    rollouts, advantages = groups_of(4)
    update = Update(Bigram(), adam(), reduction="sequence_mean", kl_coefficient=0.1)
    plan = dataclasses.replace(PLAN, waves=1, substeps=2)
    state, metrics = in_waves(update, plan, frozen, table, rollouts, split(rollouts, advantages, 1), adam())
    parts = pack_substeps(rollouts, advantages, substeps=2, **PLAN.row_shape)
    expected, whole = update.update_in_substeps(frozen, init_train_state({"table": jnp.array(table)}, adam()), parts)
    np.testing.assert_array_equal(state.lora["table"], expected.lora["table"])
    assert metrics == whole


@pytest.mark.parametrize("waves", [1, 2])
def test_without_any_rollout_the_state_is_kept(tables, waves):
    frozen, table = tables
    state = init_train_state({"table": jnp.array(table)}, adam())
    step = StepUpdate(Update(Bigram(), adam()), frozen, state, dataclasses.replace(PLAN, waves=waves))
    for _ in range(waves):
        step.add(step.packed([], []))
    after, metrics = step.finish()
    assert after is state
    assert metrics == {"tokens": 0.0, "update/skipped": 1.0}
    np.testing.assert_array_equal(state.lora["table"], table)
    assert StepUpdate(Update(Bigram(), adam()), frozen, None, dataclasses.replace(PLAN, waves=1)).packed([], []) == []


def test_progress_counts_all_passes(tables):
    frozen, table = tables
    rollouts, advantages = groups_of(3)
    calls = []
    update = Update(Bigram(), adam(), measure_kl=True)
    in_waves(update, PLAN, frozen, table, rollouts, split(rollouts, advantages, 3), adam(), lambda *count: calls.append(count))
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))
    assert all(done <= total for done, total in calls)


def test_a_gradient_that_is_not_finite_keeps_the_state(tables):
    frozen, table = tables
    rollouts, advantages = groups_of(3)
    bad = dataclasses.replace(rollouts[0], logprobs_T=np.where(rollouts[0].chosen_T, -1e4, 0).astype(np.float32))
    state = init_train_state({"table": jnp.array(table)}, adam())
    step = StepUpdate(Update(Bigram(), adam()), frozen, state, PLAN)
    waves = split([bad, *rollouts[1:]], advantages, 3)
    for wave in waves[:2]:
        step.add(step.packed(*zip(*wave, strict=True)))
    with pytest.raises(LearningError, match="not finite"):
        step.add(step.packed(*zip(*waves[2], strict=True)))
    np.testing.assert_array_equal(state.lora["table"], table)


def test_invalid_waves_are_refused(tables):
    frozen, _ = tables
    with pytest.raises(ConfigError, match=r"waves.*multiple of substeps = 2\b.*\b3\b"):
        dataclasses.replace(PLAN, substeps=2)
    step = StepUpdate(Update(Bigram(), adam()), frozen, None, PLAN)
    step.add([])
    with pytest.raises(ConfigError, match="3 waves; 1 were added"):
        step.finish()


@pytest.mark.parametrize("rows", [1, 3])
def test_values_of_tokens_undoes_packing(rows):
    """The advantages of tokens come back from the batches; those of masked tokens are 0."""
    rollouts, _ = groups_of(4)
    advantages = [np.arange(len(r.tokens_T)) + 100.0 * i for i, r in enumerate(rollouts)]
    shape = {"row_tokens": 24, "rows": rows, "lengths": 3}
    batches = pack(rollouts, advantages, **shape)
    found = values_of_tokens(rollouts, [batch.advantages_BT for batch in batches], **shape)
    for rollout, value, expected in zip(rollouts, found, advantages, strict=True):
        np.testing.assert_array_equal(value, np.where(rollout.chosen_T, expected, 0.0))
    with pytest.raises(LearningError, match=r"one for each of its \d+ tokens; got shape \(1,\)"):
        pack(rollouts, [np.zeros(1)] * len(rollouts), **shape)

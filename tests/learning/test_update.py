"""The update on a bigram policy, whose gradient has a closed form."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram import LIMITS, SLOPES, VOCAB, Bigram, base_gaps, by_hand, make_rollouts
from jax.extend.core import jaxprs_in_params

from discover_jax.exceptions import ConfigError, LearningError
from discover_jax.learning.packing import filled_frac, pack, pack_substeps
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.learning.update import Update


@pytest.fixture
def tables():
    rng = np.random.default_rng(5)
    return jax.device_put(rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)), jax.device_put(
        (0.3 * rng.normal(size=(VOCAB, VOCAB))).astype(np.float32)
    )


@pytest.mark.parametrize("reduction", ["sum", "token_mean", "sequence_mean"])
@pytest.mark.parametrize(("row_tokens", "rows", "chunk_tokens"), [(16, 1, 1024), (16, 2, 5), (40, 3, 12), (200, 1, 7)])
def test_gradient_and_metrics_equal_the_closed_form(tables, reduction, row_tokens, rows, chunk_tokens):
    """For any packing, number of microbatches and chunk size of the log-probabilities."""
    frozen, table = tables
    rollouts, advantages = make_rollouts(1)
    loss, expected, gaps, entropies = by_hand(frozen + table, rollouts, advantages, reduction)
    update = Update(Bigram(), adam(), reduction=reduction, chunk_tokens=chunk_tokens)
    batches = pack(rollouts, advantages, row_tokens=row_tokens, rows=rows)
    gradient, metrics = update.gradient(frozen, {"table": table}, batches)
    np.testing.assert_allclose(gradient["table"], expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())
    assert metrics == pytest.approx(
        {
            "loss": loss,
            "logprob_gap/mean": np.abs(gaps).mean(),
            "logprob_gap/max": np.abs(gaps).max(),
            "ratio/min": np.exp(gaps.min()),
            "ratio/max": np.exp(gaps.max()),
            "entropy": entropies.mean(),
            "grad_norm": np.linalg.norm(expected),
            "tokens": len(gaps),
        },
        rel=2e-5,
    )


@pytest.mark.parametrize("loss", sorted(SLOPES))
@pytest.mark.parametrize(("row_tokens", "rows"), [(16, 2), (200, 1)])
def test_every_loss_has_its_slope_for_any_packing(tables, loss, row_tokens, rows):
    frozen, table = tables
    rollouts, advantages = make_rollouts(1)
    update = Update(Bigram(), adam(), loss=loss, limits=LIMITS)
    batches = pack(rollouts, advantages, row_tokens=row_tokens, rows=rows)
    gradient, metrics = update.gradient(frozen, {"table": table}, batches)
    _, expected, gaps, _ = by_hand(frozen + table, rollouts, advantages, "sum", loss)
    np.testing.assert_allclose(gradient["table"], expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())
    of_token = np.concatenate([np.full(r.chosen_T.sum(), a) for r, a in zip(rollouts, advantages, strict=True)])
    ratios = np.exp(gaps)
    limited = {
        "truncated_importance_sampling": (ratios > 1.5).mean(),
        "ppo": (((of_token > 0) & (ratios > 1.3)) | ((of_token < 0) & (ratios < 0.9))).mean(),
    }
    assert metrics.get("ratio/limited_frac") == (pytest.approx(limited[loss]) if loss in limited else None)
    if loss in limited:
        assert 0 < limited[loss] < 1


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_kl_shaping_equals_the_closed_form(tables, reduction):
    """The base model is the table without the adapter. The mean is over all tokens of all microbatches."""
    frozen, table = tables
    rollouts, advantages = make_rollouts(1)
    gaps = base_gaps(frozen, rollouts)
    mean = sum(gap.sum() for gap in gaps) / sum(r.chosen_T.sum() for r in rollouts)
    shaped = [a + 0.7 * (mean - gap) for a, gap in zip(advantages, gaps, strict=True)]
    loss, expected, _, _ = by_hand(frozen + table, rollouts, shaped, reduction)
    update = Update(Bigram(), adam(), reduction=reduction, kl_coefficient=0.7)
    for row_tokens, rows in ((16, 1), (16, 2), (200, 1)):
        (batches,), kl_metrics = update.shape(frozen, [pack(rollouts, advantages, row_tokens=row_tokens, rows=rows)])
        assert kl_metrics == {"kl_base/mean": pytest.approx(mean, rel=1e-5)}
        gradient, metrics = update.gradient(frozen, {"table": table}, batches)
        assert metrics["loss"] == pytest.approx(loss, rel=2e-5)
        np.testing.assert_allclose(gradient["table"], expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())


def test_the_kl_can_be_measured_without_a_penalty(tables):
    frozen, table = tables
    rollouts, advantages = make_rollouts(1)
    batches = pack(rollouts, advantages, row_tokens=24, rows=1)
    gaps = base_gaps(frozen, rollouts)
    mean = sum(gap.sum() for gap in gaps) / sum(r.chosen_T.sum() for r in rollouts)
    results = []
    for measure_kl in (False, True):
        update = Update(Bigram(), adam(), measure_kl=measure_kl)
        measured = update.measure(frozen, {"table": table}, batches)
        state, metrics = update.update(frozen, init_train_state({"table": jnp.array(table)}, adam()), batches)
        assert metrics.get("kl_base/mean") == measured.get("kl_base/mean") == (pytest.approx(mean, rel=1e-5) if measure_kl else None)
        assert "kl_base/mean" not in update.measure(frozen, None, batches)
        results.append((state.lora["table"], {name: value for name, value in metrics.items() if name != "kl_base/mean"}))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize(("measure_kl", "passes"), [(False, 1), (True, 2)])
def test_progress_counts_every_pass_over_a_microbatch(tables, measure_kl, passes):
    frozen, table = tables
    rollouts, advantages = make_rollouts(1)
    substeps = pack_substeps(rollouts, advantages, substeps=2, row_tokens=24, rows=1)
    total = passes * sum(len(batches) for batches in substeps)
    assert total >= 5 * passes
    update, calls = Update(Bigram(), adam(), measure_kl=measure_kl), []
    state, metrics = update.update_in_substeps(
        frozen, init_train_state({"table": jnp.array(table)}, adam()), substeps, lambda *count: calls.append(count)
    )
    assert calls == [(done, total) for done in range(1, total + 1)]
    uncounted, same = update.update_in_substeps(frozen, init_train_state({"table": jnp.array(table)}, adam()), substeps)
    np.testing.assert_array_equal(state.lora["table"], uncounted.lora["table"])
    assert metrics == same
    calls.clear()
    batches = substeps[0]
    update.measure(frozen, {"table": table}, batches, lambda *count: calls.append(count))
    assert calls == [(done, passes * len(batches)) for done in range(1, passes * len(batches) + 1)]
    calls.clear()
    update.measure(frozen, None, batches, lambda *count: calls.append(count))  # the base model has no KL to itself
    assert calls == [(done, len(batches)) for done in range(1, len(batches) + 1)]


@pytest.mark.parametrize(("row_tokens", "rows"), [(16, 1), (40, 3)])
def test_substeps_are_successive_adam_steps_on_parts(tables, row_tokens, rows):
    """`ppo` with three substeps of three rollouts, and a KL whose mean is over all of them. Adam is computed by hand in float64."""
    frozen, table = tables
    rate, b1, b2, eps = 1e-2, 0.9, 0.95, 1e-8
    rollouts, advantages = make_rollouts(1)
    gaps = base_gaps(frozen, rollouts)
    mean = sum(gap.sum() for gap in gaps) / sum(r.chosen_T.sum() for r in rollouts)
    shaped = [a + 0.1 * (mean - gap) for a, gap in zip(advantages, gaps, strict=True)]
    expected, m, v, seen = np.asarray(table, np.float64), 0.0, 0.0, []
    for step in range(1, 4):
        part = slice(3 * (step - 1), 3 * step)
        _, gradient, log_ratios, entropies = by_hand(np.asarray(frozen, np.float64) + expected, rollouts[part], shaped[part], "sum", "ppo")
        seen.append((np.linalg.norm(gradient), log_ratios, entropies))
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        expected = expected - rate * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)

    optimizer = adam(rate, b1=b1, b2=b2, eps=eps)
    update = Update(Bigram(), optimizer, loss="ppo", limits=LIMITS, kl_coefficient=0.1)
    parts = pack_substeps(rollouts, advantages, substeps=3, row_tokens=row_tokens, rows=rows)
    state, metrics = update.update_in_substeps(frozen, init_train_state({"table": jnp.array(table)}, optimizer), parts)
    assert int(state.step) == 3
    np.testing.assert_allclose(state.lora["table"], expected, rtol=1e-5, atol=1e-6)
    norms, log_ratios, entropies = zip(*seen, strict=True)
    everything = np.concatenate(log_ratios)
    of_metrics = {
        "tokens": everything.size,
        "logprob_gap/mean": np.abs(log_ratios[0]).mean(),  # only the first substep has the sampler's weights
        "logprob_gap/max": np.abs(log_ratios[0]).max(),
        "ratio/min": np.exp(everything.min()),
        "ratio/max": np.exp(everything.max()),
        "entropy": np.concatenate(entropies).mean(),
        "grad_norm": np.mean(norms),
        "kl_base/mean": mean,
        "update/skipped": 0.0,
    }
    assert {name: metrics[name] for name in of_metrics} == pytest.approx(of_metrics, rel=1e-4)
    assert metrics.keys() - of_metrics.keys() == {"loss", "ratio/limited_frac", "update/filled_frac"}


def test_a_substep_without_chosen_tokens_is_skipped(tables):
    frozen, table = tables
    optimizer = adam()
    update = Update(Bigram(), optimizer)
    parts = pack_substeps(*make_rollouts(4), substeps=2, row_tokens=24, rows=1)
    empty = [dataclasses.replace(batch, mask_BT=batch.mask_BT & False) for batch in parts[0]]
    state, metrics = update.update_in_substeps(
        frozen, init_train_state({"table": jnp.array(table)}, optimizer), [parts[0], empty, [], parts[1]]
    )
    assert int(state.step) == 2
    assert metrics["update/skipped"] == 0


def test_lowered_functions_are_those_that_an_update_runs(tables):
    frozen, table = tables
    batches = pack(*make_rollouts(4), row_tokens=24, rows=2)
    state = init_train_state({"table": jnp.array(table)}, adam())
    for options, names in (({}, ["gradient", "apply"]), ({"kl_coefficient": 0.1}, ["base", "gradient", "apply"])):
        update = Update(Bigram(), adam(), **options)
        functions = list(update.lowered_functions(frozen, state, rows=2, row_tokens=24))
        assert [function.name for function in functions] == names
        for function in functions:
            function.lowered.compile()
        lora = {"table": table}
        with_adapter = [function.name for function in update.lowered_measuring_functions(frozen, lora, rows=2, row_tokens=24)]
        assert with_adapter == ["measure", "base"][: 1 + bool(options)]
        assert [function.name for function in update.lowered_measuring_functions(frozen, None, rows=2, row_tokens=24)] == ["measure"]
        update.measure(frozen, lora, batches)
        assert update._base_gap._cache_size() == bool(options)


def test_the_gradient_does_not_depend_on_order_and_batching_of_rollouts(tables):
    frozen, table = tables
    rollouts, advantages = make_rollouts(2)
    update = Update(Bigram(), adam())
    whole, _ = update.gradient(frozen, {"table": table}, pack(rollouts, advantages, row_tokens=20, rows=2))
    order = np.random.default_rng(0).permutation(len(rollouts))
    shuffled, _ = update.gradient(frozen, {"table": table}, pack([rollouts[i] for i in order], advantages[order], row_tokens=20, rows=2))
    one_by_one = sum(
        np.asarray(update.gradient(frozen, {"table": table}, pack([r], [a], row_tokens=20, rows=2))[0]["table"])
        for r, a in zip(rollouts, advantages, strict=True)
    )
    np.testing.assert_allclose(shuffled["table"], whole["table"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one_by_one, whole["table"], rtol=1e-5, atol=1e-6)


def test_three_adam_steps_by_hand(tables):
    """Kingma and Ba's formula in float64, with the report's settings but a larger learning rate."""
    frozen, table = tables
    rate, b1, b2, eps = 1e-2, 0.9, 0.95, 1e-8
    optimizer = adam(rate, b1=b1, b2=b2, eps=eps)
    update = Update(Bigram(), optimizer)
    state = init_train_state({"table": jnp.array(table)}, optimizer)
    expected, m, v = np.asarray(table, np.float64), 0.0, 0.0
    for step in range(1, 4):
        rollouts, advantages = make_rollouts(10 + step)
        _, gradient, _, _ = by_hand(np.asarray(frozen, np.float64) + expected, rollouts, advantages, "sum")
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        expected = expected - rate * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        state, metrics = update.update(frozen, state, pack(rollouts, advantages, row_tokens=24, rows=1))
        assert int(state.step) == step
        assert metrics["update/skipped"] == 0
    np.testing.assert_allclose(state.lora["table"], expected, rtol=1e-5, atol=1e-6)


def test_clipping_changes_only_the_gradient_that_adam_gets(tables):
    frozen, table = tables
    rollouts, advantages = make_rollouts(3)
    batches = pack(rollouts, advantages, row_tokens=24, rows=1)
    optimizer = adam(max_grad_norm=0.5)
    update = Update(Bigram(), optimizer)
    gradient, before = update.gradient(frozen, {"table": table}, batches)
    state, metrics = update.update(frozen, init_train_state({"table": jnp.array(table)}, optimizer), batches)
    assert metrics["grad_norm"] == before["grad_norm"] > 0.5  # logged before clipping
    (mu,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if ".mu" in jax.tree_util.keystr(path)]
    np.testing.assert_allclose(mu, 0.1 * np.asarray(gradient["table"]) * 0.5 / before["grad_norm"], rtol=1e-5)


def test_an_update_without_chosen_tokens_is_skipped_and_keeps_the_state(tables):
    frozen, table = tables
    optimizer = adam()
    update = Update(Bigram(), optimizer)
    state = init_train_state({"table": jnp.array(table)}, optimizer)
    for batches in ([], [dataclasses.replace(b, mask_BT=b.mask_BT & False) for b in pack(*make_rollouts(4), row_tokens=24, rows=1)]):
        after, metrics = update.update(frozen, state, batches)
        assert after is state
        assert metrics == {"tokens": 0.0, "update/skipped": 1.0}
    np.testing.assert_array_equal(state.lora["table"], table)  # the buffers are valid, because they were not donated
    assert int(state.step) == 0
    assert update.measure(frozen, state.lora, []) == {}


def test_one_executable_serves_any_number_of_microbatches(tables):
    frozen, table = tables
    optimizer = adam()
    update = Update(Bigram(), optimizer)
    state = init_train_state({"table": jnp.array(table)}, optimizer)
    counts = set()
    for seed, count in ((1, 2), (2, 9), (3, 17)):
        batches = pack(*make_rollouts(seed, count), row_tokens=24, rows=1)
        counts.add(len(batches))
        state, _ = update.update(frozen, state, batches)
    assert len(counts) == 3
    assert update._accumulate._cache_size() == 1
    assert update._apply._cache_size() == 1


def test_a_gradient_that_is_not_finite_is_refused_and_keeps_the_state(tables):
    frozen, table = tables
    rollouts, advantages = make_rollouts(6)
    bad = dataclasses.replace(rollouts[0], logprobs_T=np.where(rollouts[0].chosen_T, -1e4, 0).astype(np.float32))
    optimizer = adam()
    state = init_train_state({"table": jnp.array(table)}, optimizer)
    with pytest.raises(LearningError, match=r"step 0 .*ratios .*\binf\b"):
        Update(Bigram(), optimizer).update(frozen, state, pack([bad, *rollouts[1:]], advantages, row_tokens=24, rows=1))
    np.testing.assert_array_equal(state.lora["table"], table)


def _sizes_of_last_axis(jaxpr, width):
    """Sizes of all intermediate arrays whose last axis has this width, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if shape and shape[-1] == width:
                yield int(np.prod(shape))
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes_of_last_axis(inner, width)


def test_the_logits_of_a_whole_row_are_never_in_memory(tables):
    """Chunks of at most 64 positions split a row of 1,000 into 16 chunks of 63. No pass then has an array of more than 63 x vocabulary."""
    wide = 11  # size of the vocabulary; the model's width is VOCAB = 7
    frozen = jnp.ones((VOCAB, wide))
    batches = pack(*make_rollouts(9), row_tokens=1000, rows=1)
    for chunk_tokens, largest in ((64, 63 * wide), (1000, 1000 * wide)):
        update = Update(Bigram(), adam(), chunk_tokens=chunk_tokens)
        lora = {"table": jnp.zeros((VOCAB, wide))}
        jaxpr = update._accumulate.trace(lora, lora, frozen, batches[0], np.ones((1, 1000), np.float32)).jaxpr
        assert max(_sizes_of_last_axis(jaxpr.jaxpr, wide)) == largest


def test_measure_gives_the_metrics_of_the_update_and_needs_no_adapter(tables):
    frozen, table = tables
    rollouts, advantages = make_rollouts(8)
    batches = pack(rollouts, advantages, row_tokens=24, rows=1)
    update = Update(Bigram(), adam())
    _, metrics = update.gradient(frozen, {"table": table}, batches)
    measured = update.measure(frozen, {"table": table}, batches)
    assert measured.pop("update/filled_frac") == pytest.approx(filled_frac(batches))
    assert measured == pytest.approx({key: value for key, value in metrics.items() if key not in ("loss", "grad_norm")}, rel=1e-6)
    _, _, gaps, _ = by_hand(frozen, rollouts, advantages, "sum")
    assert update.measure(frozen, None, batches)["logprob_gap/mean"] == pytest.approx(np.abs(gaps).mean(), rel=1e-5)


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match="loss 'ppo2'"):
        Update(Bigram(), adam(), loss="ppo2")
    with pytest.raises(ConfigError, match="reduction 'mean'"):
        Update(Bigram(), adam(), reduction="mean")
    with pytest.raises(ConfigError, match="chunk_tokens"):
        Update(Bigram(), adam(), chunk_tokens=0)
    for coefficient in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="kl_coefficient"):
            Update(Bigram(), adam(), kl_coefficient=coefficient)

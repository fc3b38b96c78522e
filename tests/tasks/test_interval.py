"""Intervals, compared with published values, Wilson's defining property and scipy's bootstrap."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.tasks.competition import Metric
from discover_jax.tasks.interval import RESAMPLES, Interval, binomial_interval, bootstrap_interval, wilson_interval
from discover_jax.tasks.metrics import LOG_LOSS, RMSE, ROC_AUC


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for right, rows in [(0, 10), (10, 10), (705, 870), (1, 2), (400, 1197)]:
        expected = stats.binomtest(right, rows).proportion_ci(0.95, method="wilson")
        assert wilson_interval(right / rows, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 5000).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_bounds_satisfy_the_definition_of_wilson(data):
    """(p - q)^2 = z^2 q (1 - q)/n at either bound q, or the bound is 0 or 1."""
    right, rows = data
    for bound in wilson_interval(right / rows, rows, z=2.0):
        if 0.0 < bound < 1.0:
            assert (right / rows - bound) ** 2 == pytest.approx(4.0 * bound * (1 - bound) / rows, abs=1e-12)


def test_width_on_the_rows_of_spaceship_titanic():
    low, high = wilson_interval(0.81, 870)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.0133, abs=5e-4)  # the known standard error


@pytest.mark.parametrize(("proportion", "rows"), [(1.01, 10), (-0.1, 10), (0.5, 0), (float("nan"), 10)])
def test_invalid_values_are_refused(proportion, rows):
    with pytest.raises(ValueError, match=r"(?i)proportion|rows"):
        wilson_interval(proportion, rows)


# ---------------------------------------------------------------------- bootstrap


def table(metric: Metric, rows: int, seed: int = 0, digits: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Answers and predictions that the metric accepts. Fewer digits give ties."""
    rng = np.random.default_rng(seed)
    if metric is RMSE:
        answers_R = rng.normal(100, 20, rows).round(2)
        return answers_R, answers_R + rng.normal(0, 5, rows).round(digits)
    answers_R = rng.random(rows) < 0.4
    return answers_R, np.clip(0.3 + 0.3 * answers_R + 0.25 * rng.normal(size=rows), 0, 1).round(digits)


METRICS = pytest.mark.parametrize("metric", [LOG_LOSS, RMSE, ROC_AUC], ids=lambda metric: metric.name)


@METRICS
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(3, 40), digits=st.sampled_from([1, 6]))
@pytest.mark.filterwarnings("ignore:Only one class")
def test_counts_match_scikit_learn_on_repeated_rows(metric, seed, rows, digits):
    answers_R, predictions_R = table(metric, rows, seed, digits)
    if len(np.unique(answers_R)) < 2:
        return
    counts_BR = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=3)
    for score, counts_R in zip(metric.resampled(answers_R, predictions_R, counts_BR), counts_BR, strict=True):
        drawn = np.repeat(np.arange(rows), counts_R)
        if metric is not RMSE and len(np.unique(answers_R[drawn])) < 2:
            assert np.isnan(score)
        else:
            assert score == pytest.approx(metric.function(answers_R[drawn], predictions_R[drawn]), rel=1e-9)


@pytest.mark.parametrize(
    "metric",
    [pytest.param(LOG_LOSS, marks=pytest.mark.slow), RMSE, pytest.param(ROC_AUC, marks=pytest.mark.slow)],
    ids=lambda metric: metric.name,
)
def test_against_scipys_bootstrap(metric):
    """The resamples differ, so the bounds agree only to the precision of a thousand resamples."""
    stats = pytest.importorskip("scipy.stats")
    answers_R, predictions_R = table(metric, 250)
    expected = stats.bootstrap(
        (answers_R, predictions_R), metric.function, paired=True, vectorized=False, method="percentile", n_resamples=1000, rng=1
    ).confidence_interval
    found = bootstrap_interval(metric, answers_R, predictions_R)
    assert found.bounds is not None
    width = expected.high - expected.low
    assert found.bounds == pytest.approx((expected.low, expected.high), abs=0.12 * width)
    assert found.bounds[0] < metric.function(answers_R, predictions_R) < found.bounds[1]
    assert f"{RESAMPLES:,} resamples" in found.method


def test_metric_without_counts_is_called_on_each_resample():
    answers_R, predictions_R = table(RMSE, 120)
    called = bootstrap_interval(dataclasses.replace(RMSE, resampled=None), answers_R, predictions_R)
    counted = bootstrap_interval(RMSE, answers_R, predictions_R)
    assert called == bootstrap_interval(dataclasses.replace(RMSE, resampled=None), answers_R, predictions_R)  # deterministic
    assert called.bounds is not None
    assert counted.bounds is not None
    assert called.bounds == pytest.approx(counted.bounds, abs=0.12 * (counted.bounds[1] - counted.bounds[0]))


@METRICS
def test_many_rows_take_little_time_and_memory(metric):
    answers_R, predictions_R = table(metric, 20_000)
    started = time.process_time()
    assert bootstrap_interval(metric, answers_R, predictions_R).bounds is not None
    assert time.process_time() - started < 20


def test_coverage_of_the_interval():
    """About 190 of 200 samples with a known error. The bootstrap is slightly narrow for few rows."""
    held = 0
    for seed in range(200):
        errors_R = np.random.default_rng(seed).normal(0, 5, 150)
        bounds = bootstrap_interval(RMSE, np.zeros(150), errors_R).bounds
        assert bounds is not None
        held += bounds[0] <= 5.0 <= bounds[1]
    assert 178 <= held <= 198


def test_reasons_for_no_interval():
    few = bootstrap_interval(RMSE, np.zeros(1), np.ones(1))
    assert few.text == "no interval: 1 row cannot be resampled"
    rare = np.arange(40) == 0  # a third of the resamples lack the only positive
    assert "area under the ROC curve could be computed for only" in bootstrap_interval(ROC_AUC, rare, rare.astype(float)).text

    def refuse(answers_R, predictions_R):
        raise ValueError("no")

    refusing = Metric("refusal", higher_is_better=True, function=refuse)
    assert "only 0 of 1,000 resamples" in bootstrap_interval(refusing, np.zeros(10), np.zeros(10)).text
    assert Interval(None, "so").to_json("x") == {"x": None, "x_method": "no interval: so"}
    assert binomial_interval(0.5, 100).to_json("x")["x"] == list(wilson_interval(0.5, 100))

"""Token losses, compared with values by hand; reductions, compared with plain loops over rollouts."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError
from discover_jax.learning.losses import LIMITED, LOSSES, REDUCTIONS, RatioLimits, importance_sampling, ppo, truncated_importance_sampling
from discover_jax.learning.packing import pack
from discover_jax.types import Rollout, StopReason


def test_importance_sampling_by_hand():
    """Ratio 3, advantage 2: the loss is -6, and so is its slope in logp. Large ratios are not clipped."""
    at = np.float32(np.log(0.6)), np.float32(np.log(0.2)), np.float32(2.0)
    assert importance_sampling(*at) == pytest.approx(-6, rel=1e-6)
    assert jax.grad(importance_sampling)(*at) == pytest.approx(-6, rel=1e-6)
    assert importance_sampling(np.float32(0), np.float32(-10), np.float32(1)) == pytest.approx(-np.exp(10), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "limited"),
    [  # the slope in logp_theta; clip to [0.9, 1.3], truncation at 1.5
        (1.0, 2.0, {"truncated_importance_sampling": -2.0, "ppo": -2.0, "reinforce": -2.0}, set()),
        (1.2, -2.0, {"truncated_importance_sampling": 2.4, "ppo": 2.4, "reinforce": 2.0}, set()),
        (1.4, 2.0, {"truncated_importance_sampling": -2.8, "ppo": 0.0, "reinforce": -2.0}, {"ppo"}),
        (1.4, -2.0, {"truncated_importance_sampling": 2.8, "ppo": 2.8, "reinforce": 2.0}, set()),
        (0.8, 2.0, {"truncated_importance_sampling": -1.6, "ppo": -1.6, "reinforce": -2.0}, set()),
        (0.8, -2.0, {"truncated_importance_sampling": 1.6, "ppo": 0.0, "reinforce": 2.0}, {"ppo"}),
        (3.0, 2.0, {"truncated_importance_sampling": -3.0, "ppo": 0.0, "reinforce": -2.0}, {"ppo", "truncated_importance_sampling"}),
        (3.0, -2.0, {"truncated_importance_sampling": 3.0, "ppo": 6.0, "reinforce": 2.0}, {"truncated_importance_sampling"}),
        (3.0, 0.0, {"truncated_importance_sampling": 0.0, "ppo": 0.0, "reinforce": 0.0}, {"truncated_importance_sampling"}),
    ],
)
def test_slopes_and_limits_by_hand(ratio, advantage, slope, limited):
    limits = RatioLimits(clip_low=0.1, clip_high=0.3, truncate=1.5)
    theta, sampler = np.float32(np.log(0.2 * ratio)), np.float32(np.log(0.2))
    for name, expected in slope.items():
        found = jax.grad(lambda theta, name=name: LOSSES[name](theta, sampler, np.float32(advantage), limits))(theta)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    acts = {name for name, acts_on in LIMITED.items() if acts_on(np.float32(ratio), np.float32(advantage), limits)}
    assert acts == limited


def test_values_by_hand():
    """Ratio 3 at logp_theta = log 0.6, with the default limits. `ppo` clips to 1.2; truncation and `reinforce` multiply log 0.6."""
    for advantage, clipped in ((2.0, -2.4), (-2.0, 6.0)):
        at = np.float32(np.log(0.6)), np.float32(np.log(0.2)), np.float32(advantage)
        assert ppo(*at) == pytest.approx(clipped, rel=1e-6)
        assert LOSSES["reinforce"](*at) == pytest.approx(-advantage * np.log(0.6), rel=1e-6)
        assert truncated_importance_sampling(*at) == pytest.approx(-2 * advantage * np.log(0.6), rel=1e-6)


def test_at_ratio_one_all_losses_have_the_same_gradient():
    logp, advantages = np.log(np.linspace(0.05, 0.95, 7)).astype(np.float32), np.linspace(-2, 3, 7).astype(np.float32)
    for loss in LOSSES.values():
        slopes = jax.grad(lambda theta, loss=loss: loss(theta, logp, advantages).sum())(logp)
        np.testing.assert_allclose(slopes, -advantages, rtol=1e-6)


def test_a_ratio_that_overflows_is_limited():
    """exp(200) is infinite in float32. The truncated weight is 2, and ppo's clipped branch has no gradient."""
    at = np.float32(0), np.float32(-200), np.float32(1)
    assert jax.grad(truncated_importance_sampling)(*at) == -2.0
    assert jax.grad(ppo)(*at) == 0.0


@pytest.mark.parametrize(
    "bad",
    [{"clip_low": 0.0}, {"clip_low": 1.1}, {"clip_high": -0.2}, {"clip_high": float("inf")}, {"truncate": 0.0}, {"truncate": float("nan")}],
)
def test_limits_are_checked(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RatioLimits(**bad)


def test_unknown_names_are_refused_with_the_list_of_known_ones():
    with pytest.raises(ConfigError, match=r"loss .*'dpo'.*importance_sampling, ppo, reinforce, truncated_importance_sampling"):
        LOSSES["dpo"]
    with pytest.raises(ConfigError, match=r"reduction .*'mean'.*sequence_mean, sum, token_mean"):
        REDUCTIONS["mean"]


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(10, 30),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_reductions_equal_loops_over_rollouts(chosen_of, row_tokens, rows, seed):
    """Each token has its own loss. For any packing, the weighted sum must be the reduction that the name states."""
    rng = np.random.default_rng(seed)
    losses = [rng.normal(size=len(chosen)).astype(np.float32) for chosen in chosen_of]
    rollouts = [
        # Pass the loss as the log-probability, so that the packed batch contains it.
        Rollout(0, i, np.ones(2, np.int32), np.ones(len(c), np.int32), np.where(c, loss, 0), np.array(c), StopReason.STOP_TOKEN)
        for i, (c, loss) in enumerate(zip(chosen_of, losses, strict=True))
    ]
    batches = pack(rollouts, np.ones(len(rollouts)), row_tokens=row_tokens, rows=rows)
    kept = [loss[np.array(c)].astype(np.float64) for c, loss in zip(chosen_of, losses, strict=True) if any(c)]
    expected = {"sum": 0.0, "token_mean": 0.0, "sequence_mean": 0.0}
    if kept:
        expected = {
            "sum": sum(k.sum() for k in kept),
            "token_mean": np.concatenate(kept).mean(),
            "sequence_mean": np.mean([k.mean() for k in kept]),
        }
    for name, reduce in REDUCTIONS.items():
        weights = reduce(batches)
        assert all(w.dtype == np.float32 and (w[~b.mask_BT] == 0).all() for w, b in zip(weights, batches, strict=True))
        total = sum(float((w * b.sampler_logprobs_BT).sum(dtype=np.float64)) for w, b in zip(weights, batches, strict=True))
        assert total == pytest.approx(expected[name], rel=1e-5, abs=1e-5)
